"""A reverse proxy in front of a service: nginx, started by the tests, of no privileges and in a folder of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.support.patience import until

CONFIG = """
daemon off;
master_process off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port}{ssl};
        server_name {name};
        {locations}
    }}
}}
"""


def nginx_path() -> str:
    """Where nginx is."""
    path = os.environ.get("GRACE_OPT_NGINX") or shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if path is None:
        pytest.fail("there is no nginx; install it (apt-get install nginx-light) or name it in GRACE_OPT_NGINX")
    return path


@contextmanager
def nginx(folder: Path, port: int, locations: str, *, name: str, tls: bool = False) -> Iterator[None]:
    """nginx at a port of this machine, with the ``locations`` of its one server."""
    folder.mkdir()
    ssl = ""
    if tls:
        certificate(folder / "certificate.pem", folder / "key.pem", name)
        ssl = " ssl"
        locations = f"ssl_certificate {folder}/certificate.pem; ssl_certificate_key {folder}/key.pem;\n{locations}"
    config = folder / "nginx.conf"
    config.write_text(CONFIG.format(folder=folder, port=port, ssl=ssl, name=name, locations=locations))
    command = [nginx_path(), "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        until(lambda: process.poll() is not None or _answers(port), "nginx answers")
        assert process.poll() is None, process.communicate()[0].decode()
        yield
    finally:
        process.terminate()
        process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def certificate(path: Path, key_path: Path, name: str) -> None:
    """A certificate of a name, signed by itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, who = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(who)
        .issuer_name(who)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    key_path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
