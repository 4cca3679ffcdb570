"""Where users find the service: behind a reverse proxy that is another address than the one that it listens at."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from grace_opt.errors import InputError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OWN_SEGMENTS = ("api", "compare", "healthz", "login", "logout", "metrics", "runs", "solvers", "static")
PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Site:
    """What users see of the service.

    Attributes:
        origin: scheme, name and port that users type, such as ``https://solver.example.com``; None: the request's.
        root: the path below which the service is, such as ``/grace``; empty at the top.
        hosts: names under which requests may address the service; None: any.
    """

    origin: str | None = None
    root: str = ""
    hosts: tuple[str, ...] | None = LOOPBACK

    @property
    def url(self) -> str:
        """What links from elsewhere begin with; relative to the server where its public name is not known."""
        return (self.origin or "") + self.root

    def below(self, path: str) -> str:
        """The path that the service has for a request's path: proxies pass the root on, or take it away."""
        inner = path[len(self.root) :] if self.root and f"{path}/".startswith(f"{self.root}/") else path
        return inner.rstrip("/") or "/"

    def is_secure(self, scheme: str) -> bool:
        """Whether users come by HTTPS, with a request of this scheme."""
        return (self.origin or scheme).startswith("https")

    def is_own(self, origin: str, host: str) -> bool:
        """Whether a page of this origin is one of ours, asked with this Host header.

        A proxy may rewrite Host, and may speak HTTP where users speak HTTPS: the scheme counts only where it is known.
        """
        try:
            parts = urlsplit(origin)
            place = parts.hostname, parts.port or PORTS.get(parts.scheme)
        except ValueError:
            return False
        if parts.scheme not in PORTS or not parts.hostname:
            return False
        if self.origin is not None and parts.hostname == urlsplit(self.origin).hostname:
            return _origin(parts.scheme, *place) == self.origin
        return place == name_and_port(host, PORTS[parts.scheme])


def site_of(
    host: str,
    public_url: str | None = None,
    allowed_hosts: tuple[str, ...] = (),
    root_path: str | None = None,
    *,
    require_keys: bool = False,
) -> tuple[Site, str | None]:
    """The site of a server that binds to ``host``, and why it needs API keys (None: it does not).

    It does if other machines reach it: at its address, or by a name that it is told of. Without keys only requests
    that call it by a known name are answered, which keeps web pages elsewhere from reaching it through a visitor's
    browser; with keys that is up to ``allowed_hosts``, for a proxy may call it anything. Raises InputError for an
    address, a name or a path that is none.
    """
    origin, name, root = None, None, _root(root_path or "", "the root path")
    if public_url is not None:
        origin, name, path = _public(public_url)
        if root_path is not None and path not in ("", root):
            raise InputError(
                f"the public URL says that the root path is {path}, and --root-path {root}; give one of them"
            )
        root = path or root
    allowed = tuple(map(_allowed, allowed_hosts))
    named = [each for each in (host, name, *allowed) if each is not None and not is_loopback(each)]
    reason = f"as {named[0]} it is reached from other machines" if named else None
    if require_keys:
        reason = reason or "--require-keys asks for them"
    known = (*LOOPBACK, host.lower(), *([name] if name else []), *allowed)
    hosts = None if reason is not None and not allowed else tuple(dict.fromkeys(known))
    return Site(origin, root, hosts), reason


def is_loopback(host: str) -> bool:
    """Whether a server that binds to this host is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def networks(addresses: Sequence[str]) -> list[str]:
    """Addresses and networks of proxies that are trusted. Raises InputError for one that is none."""
    for each in addresses:
        try:
            ipaddress.ip_network(each)
        except ValueError:
            raise InputError(f"a trusted proxy is an address or a network such as 10.0.0.0/24, got {each!r}") from None
    return list(addresses)


def name_and_port(host: str, default: int | None = None) -> tuple[str | None, int | None]:
    """Name and port of a Host header; (None, None) if it is none."""
    try:
        parts = urlsplit(f"//{host}")
        name = parts.hostname
        return (name.rstrip(".") if name else None), parts.port or default
    except ValueError:
        return None, None


def _public(url: str) -> tuple[str, str, str]:
    """Origin, host name and path of a public URL."""
    try:
        parts = urlsplit(url.strip())
        name = parts.hostname.encode("idna").decode() if parts.hostname else ""  # as browsers send it
        port = parts.port
    except ValueError:
        name = ""
    if not name or parts.scheme not in PORTS or parts.query or parts.fragment or "@" in parts.netloc:
        raise InputError(f"the public URL must be such as https://solver.example.com/grace, got {url!r}")
    origin = _origin(parts.scheme, name, port or PORTS[parts.scheme])
    return origin, name, _root(parts.path, f"the path of the public URL {url}")


def _origin(scheme: str, name: str | None, port: int | None) -> str:
    """As browsers write it: without the scheme's own port."""
    shown = f"[{name}]" if name and ":" in name else name
    return f"{scheme}://{shown}" + ("" if port == PORTS[scheme] else f":{port}")


def _root(path: str, what: str) -> str:
    root = "/" + path.strip("/") if path.strip("/") else ""
    segments = root.split("/")[1:]
    if not all(re.fullmatch(r"[A-Za-z0-9._~-]+", each) and each.strip(".") for each in segments):
        raise InputError(f"{what} may have letters, digits and . _ ~ - between its slashes, got {path!r}")
    if segments and segments[0] in OWN_SEGMENTS:
        raise InputError(f"{what} cannot begin with /{segments[0]}, which the service has itself; choose another")
    return root


def _allowed(host: str) -> str:
    name = host.strip().strip("[]").rstrip(".").lower()
    try:
        ipaddress.ip_address(name)
    except ValueError:
        if not re.fullmatch(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?", name):
            raise InputError(f"an allowed host is a name such as solver.example.com, got {host!r}") from None
    return name
