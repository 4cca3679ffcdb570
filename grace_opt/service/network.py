"""What the environment says about reaching a service: proxies and certificates. Its netrc is not asked for passwords.

httpx would read all of it, also for a server on this machine, and would let a netrc file take the place of our key.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
from collections.abc import Mapping
from urllib.request import getproxies, proxy_bypass_environment  # type: ignore[attr-defined]

import httpx

from grace_opt.errors import InputError

LAST_PORT = (1 << 16) - 1
PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")


def transport_options(url: str) -> dict[str, object]:
    """For `httpx.Client`, what a service at ``url`` is reached by.

    Raises:
        InputError: if the environment names a proxy or certificates that cannot be used.
    """
    target = httpx.URL(url)
    if (target.port or 1) > LAST_PORT:
        raise httpx.InvalidURL(f"there is no port {target.port}")
    proxy = proxy_of(target)
    options: dict[str, object] = {"trust_env": False, "proxy": proxy}
    if target.scheme == "https" or (proxy or "").startswith("https:"):
        options["verify"] = _certificates(os.environ)
    return options


def is_this_machine(host: str) -> bool:
    """Whether a host's name or address is of this machine alone: loopback, however it is written."""
    if host.rstrip(".") == "localhost" or host.rstrip(".").endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_ntoa(socket.inet_aton(host)))  # 127.1, 2130706433
        except OSError:
            return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def proxy_of(url: httpx.URL) -> str | None:
    """The proxy that the environment names for an address; None for none. Raises InputError for one of no use."""
    if is_this_machine(url.host):
        return None
    proxies = getproxies()  # the environment's, and on macOS and Windows the system's
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or _is_exempt(url, proxies):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        found = httpx.URL(proxy)
        if found.scheme not in PROXY_SCHEMES or not found.host or (found.port or 1) > LAST_PORT:
            raise ValueError("its address must be like http://host:port")
        httpx.HTTPTransport(proxy=proxy, trust_env=False, verify=False).close()
    except (ValueError, ImportError, httpx.InvalidURL) as error:
        why = "the package socksio is not installed" if isinstance(error, ImportError) else str(error)
        shown = proxy.rpartition("@")[2].removeprefix(f"{proxy.partition('://')[0]}://")  # without a password
        raise InputError(
            f"the environment's proxy {shown!r} cannot be used ({why}); unset {url.scheme.upper()}_PROXY and "
            f"ALL_PROXY, or name {url.host} in NO_PROXY"
        ) from None
    return proxy


def _is_exempt(url: httpx.URL, proxies: Mapping[str, str]) -> bool:
    """Whether NO_PROXY names a host: by its name, a domain, ``*``, its port, or a network that it is in."""
    named = {"no": proxies.get("no", "")}
    port = url.port or (443 if url.scheme == "https" else 80)
    if proxy_bypass_environment(url.host, named) or proxy_bypass_environment(f"{url.host}:{port}", named):
        return True
    try:
        address = ipaddress.ip_address(url.host)
    except ValueError:
        return False
    for part in named["no"].split(","):
        try:
            if address in ipaddress.ip_network(part.strip().strip("[]"), strict=False):
                return True
        except ValueError:  # a name
            continue
    return False


def _certificates(environment: Mapping[str, str]) -> ssl.SSLContext | bool:
    """The authorities that SSL_CERT_FILE and SSL_CERT_DIR name; those of certifi (True) if neither does."""
    file, folders = environment.get("SSL_CERT_FILE"), environment.get("SSL_CERT_DIR")
    if not file and not folders:
        return True
    for folder in (folders or "").split(os.pathsep):
        if folder and not os.path.isdir(folder):
            raise InputError(f"SSL_CERT_DIR names {folder}, which is not a folder; correct or unset it")
    try:
        context = ssl.create_default_context(cafile=file or None)
        for folder in filter(None, (folders or "").split(os.pathsep)):
            context.load_verify_locations(capath=folder)
    except OSError as error:  # no such file, or no certificates in it
        raise InputError(
            f"SSL_CERT_FILE names {file}, which cannot be read as certificates ({error.strerror or error}); "
            "correct or unset it"
        ) from None
    return context
