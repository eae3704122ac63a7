"""The bundle and the variables, tried with the clients that are installed."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from creto_proxy import trust
from creto_proxy.tls import CertificateAuthority
from creto_proxy.trust import system_bundle, trust_environment, write_bundle

NO_DEFAULT = ssl.DefaultVerifyPaths("", "", "SSL_CERT_FILE", "", "SSL_CERT_DIR", "")


@pytest.fixture(scope="module")
def authority() -> CertificateAuthority:
    return CertificateAuthority()


@pytest.fixture(scope="module")
def port(authority: CertificateAuthority) -> Iterator[int]:
    """A server that answers as "localhost" under the run's CA."""
    context = authority.context("localhost")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            while True:
                try:
                    plain, _ = listener.accept()
                except OSError:
                    return
                plain.settimeout(60)
                try:
                    with context.wrap_socket(plain, server_side=True) as conn:
                        if conn.recv(65536):
                            conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nConnection: close\r\n\r\ntrusted")
                except OSError:
                    plain.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


@pytest.fixture
def environment(authority: CertificateAuthority, tmp_path: Path) -> dict[str, str]:
    """Nothing but the trust variables, the path and a home."""
    added = trust_environment(write_bundle(authority.pem, tmp_path), authority.write(tmp_path))
    return {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **added}


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def test_bundle_holds_the_systems_roots_and_the_ca(authority: CertificateAuthority, tmp_path: Path) -> None:
    roots = system_bundle()
    assert roots is not None
    bundle = write_bundle(authority.pem, tmp_path)
    content = bundle.read_bytes()
    assert content.count(b"BEGIN CERTIFICATE") == roots.read_bytes().count(b"BEGIN CERTIFICATE") + 1
    assert content.endswith(authority.pem)
    assert bundle.stat().st_mode & 0o777 == 0o644
    assert not list(tmp_path.glob("*.new"))


def test_bundle_can_be_loaded_whole(authority: CertificateAuthority, tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cafile=write_bundle(authority.pem, tmp_path))
    assert context.cert_store_stats()["x509_ca"] > 1


def test_only_certificates_are_taken_from_the_systems_file(
    authority: CertificateAuthority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "system.pem"
    other = CertificateAuthority()
    odd.write_bytes(
        b"# Some comment\n" + other.pem.rstrip() + b"\n-----BEGIN X509 CRL-----\nAA==\n-----END X509 CRL-----"
    )
    monkeypatch.setenv("SSL_CERT_FILE", str(odd))
    assert write_bundle(authority.pem, tmp_path).read_bytes() == other.pem + authority.pem


def test_operators_own_roots_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "corporate.pem"
    own.write_bytes(CertificateAuthority().pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(own))
    assert system_bundle() == own


def test_first_bundle_that_exists_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "tls-ca-bundle.pem"
    here.write_bytes(CertificateAuthority().pem)
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: NO_DEFAULT)
    monkeypatch.setattr(trust, "SYSTEM_BUNDLES", (tmp_path / "missing.crt", here))
    assert system_bundle() == here


def test_certifi_helps_out_where_the_system_has_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    certifi = pytest.importorskip("certifi")
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: NO_DEFAULT)
    monkeypatch.setattr(trust, "SYSTEM_BUNDLES", ())
    assert system_bundle() == Path(certifi.where())


def test_without_any_roots_the_bundle_is_the_ca(
    authority: CertificateAuthority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "system_bundle", lambda: None)
    assert write_bundle(authority.pem, tmp_path).read_bytes() == authority.pem


def test_node_gets_the_ca_alone_and_the_rest_the_bundle() -> None:
    variables = trust_environment(Path("/run/bundle.pem"), Path("/run/ca.pem"))
    assert variables.pop("UV_NATIVE_TLS") == "1"
    alone = {name for name, value in variables.items() if value == "/run/ca.pem"}
    assert alone == {"NODE_EXTRA_CA_CERTS", "DENO_CERT"}
    assert {value for name, value in variables.items() if name not in alone} == {"/run/bundle.pem"}
    assert {"SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE", "GIT_SSL_CAINFO"} <= set(
        variables
    )


PYTHON = {
    "urllib": "import urllib.request as r; print(r.urlopen('{url}', timeout=60).read().decode())",
    "requests": "import requests; print(requests.get('{url}', timeout=60).text)",
    "httpx": "import httpx; print(httpx.get('{url}', timeout=60).text)",
}


@pytest.mark.parametrize("library", PYTHON)
def test_python_libraries_trust_the_ca_by_environment(library: str, port: int, environment: dict[str, str]) -> None:
    if library != "urllib":
        pytest.importorskip(library)
    done = run([sys.executable, "-c", PYTHON[library].format(url=f"https://localhost:{port}/")], environment)
    assert done.stdout.strip() == "trusted", done.stderr


def test_python_without_the_environment_refuses(port: int, environment: dict[str, str]) -> None:
    bare = {name: environment[name] for name in ("PATH", "HOME")}
    done = run([sys.executable, "-c", PYTHON["urllib"].format(url=f"https://localhost:{port}/")], bare)
    assert "CERTIFICATE_VERIFY_FAILED" in done.stderr


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs the curl command")
def test_curl_trusts_the_ca_by_environment(port: int, environment: dict[str, str]) -> None:
    done = run(["curl", "-sS", f"https://localhost:{port}/"], environment)
    assert done.stdout == "trusted", done.stderr


@pytest.mark.skipif(shutil.which("git") is None, reason="needs the git command")
def test_git_trusts_the_ca_by_environment(port: int, environment: dict[str, str]) -> None:
    command = ["git", "ls-remote", f"https://localhost:{port}/x.git"]
    bare = {name: environment[name] for name in ("PATH", "HOME")}
    assert "certificate" in run(command, bare).stderr.lower()
    # The answer is no repository; git says so or lists nothing, either way it has believed the certificate.
    assert "certificate" not in run(command, environment).stderr.lower()


@pytest.mark.skipif(shutil.which("node") is None, reason="needs the node command")
def test_node_trusts_the_ca_by_environment(port: int, environment: dict[str, str]) -> None:
    script = f"fetch('https://localhost:{port}/').then(r => r.text()).then(console.log)"
    done = run(["node", "-e", script], environment)
    assert done.stdout.strip() == "trusted", done.stderr
