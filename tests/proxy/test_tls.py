"""The hello parser against real and hostile hellos, and minted certificates against real TLS clients."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from creto_proxy.errors import ConfigError
from creto_proxy.tls import NEED, BadHello, CertificateAuthority, Hello, Need, parse_client_hello, upstream_context


def hello_of(name: str | None, *, alpn: list[str] | None = None, newest: ssl.TLSVersion | None = None) -> bytes:
    """The first bytes a real OpenSSL client sends."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    if alpn:
        context.set_alpn_protocols(alpn)
    if newest is not None:
        context.maximum_version = newest
    out = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return out.read()


def extension(kind: int, content: bytes) -> bytes:
    return kind.to_bytes(2, "big") + len(content).to_bytes(2, "big") + content


def vector(width: int, content: bytes) -> bytes:
    return len(content).to_bytes(width, "big") + content


def server_name(name: bytes, kind: int = 0) -> bytes:
    return extension(0, vector(2, bytes([kind]) + vector(2, name)))


def message(*extensions: bytes, session: bytes = b"", suites: bytes = b"\x13\x01", tail: bytes = b"") -> bytes:
    body = b"\x03\x03" + bytes(32) + vector(1, session) + vector(2, suites) + b"\x01\x00"
    body += (vector(2, b"".join(extensions)) if extensions else b"") + tail
    return b"\x01" + vector(3, body)


def records(handshake: bytes, *sizes: int) -> bytes:
    """``handshake`` in records of the given sizes; the last takes the rest."""
    wire, at = b"", 0
    for size in (*sizes, len(handshake)):
        piece = handshake[at : at + size]
        wire += b"\x16\x03\x01" + vector(2, piece) if piece else b""
        at += size
    return wire


def verdict(data: bytes) -> object:
    """The parser's answer, or the text of its refusal, comparable either way."""
    try:
        return parse_client_hello(data)
    except BadHello as error:
        return f"refused: {error}"


def test_real_hello_gives_name_protocols_and_versions() -> None:
    hello = parse_client_hello(hello_of("API.Example.com", alpn=["h2", "http/1.1"]))
    assert hello == Hello("api.example.com", ("h2", "http/1.1"), False, (0x0304, 0x0303))


def test_older_client_offers_its_legacy_version() -> None:
    hello = parse_client_hello(hello_of("a.example", newest=ssl.TLSVersion.TLSv1_2))
    assert isinstance(hello, Hello)
    assert hello.versions == (0x0303,)


def test_hello_without_server_name_has_none() -> None:
    assert parse_client_hello(hello_of(None)) == Hello(None, (), False, (0x0304, 0x0303))
    assert parse_client_hello(records(message())) == Hello(None, (), False, (0x0303,))


@pytest.mark.parametrize("kind", [0xFE0D, 0xFFCE])
def test_encrypted_name_is_flagged(kind: int) -> None:
    hello = parse_client_hello(records(message(server_name(b"outer.example"), extension(kind, b"\x00"))))
    assert hello == Hello("outer.example", (), True, (0x0303,))


def test_grease_versions_are_left_out() -> None:
    listed = extension(43, vector(1, b"\x1a\x1a\x03\x04\x03\x03"))
    assert parse_client_hello(records(message(listed))) == Hello(None, (), False, (0x0304, 0x0303))


def test_one_trailing_dot_of_the_name_is_dropped() -> None:
    hello = parse_client_hello(records(message(server_name(b"example.com."))))
    assert isinstance(hello, Hello)
    assert hello.sni == "example.com"


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n", b"\x80\x2e\x01\x03\x01", b"\x00", b"SSH-2.0-x\r\n", b"\x17\x03\x03"]
)
def test_what_does_not_begin_like_a_handshake_is_not_tls(data: bytes) -> None:
    assert parse_client_hello(data) is None


def test_nothing_yet_needs_more() -> None:
    assert parse_client_hello(b"") is NEED


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_is_read(kind: type) -> None:
    assert parse_client_hello(kind(hello_of("a.example"))) == parse_client_hello(hello_of("a.example"))


BAD = {
    "a record is not a TLS handshake record": b"\x16\x02\x01\x00\x05hello",
    "a record says it is 0 bytes long": b"\x16\x03\x01\x00\x00",
    "a record says it is 16385 bytes long": b"\x16\x03\x01\x40\x01\x01",
    "the first handshake message is of type 2, not a ClientHello": records(b"\x02" + vector(3, bytes(40))),
    "the hello says it is 65540 bytes long": b"\x16\x03\x01\x40\x00\x01\x01\x00\x00",
    "the hello does not end where its record ends": records(message() + b"\x0b\x00\x00\x00"),
    "legacy_version is not of the TLS family": records(b"\x01" + vector(3, b"\x02\x00" + bytes(40))),
    "random is cut short": records(b"\x01" + vector(3, b"\x03\x03" + bytes(31))),
    "session id is too long": records(message(session=bytes(33))),
    "cipher suites is too short": records(message(suites=b"")),
    "cipher suites have an odd length": records(message(suites=b"\x13\x01\x00")),
    "extensions is cut short": records(message(tail=b"\x00\x05\x00")),
    "extensions is followed by stray bytes": records(message(server_name(b"a.example"), tail=b"\x00")),
    "extension 0 occurs twice": records(message(server_name(b"a.example"), server_name(b"b.example"))),
    "extension 0 is cut short": records(message(b"\x00\x00\x00\x09ab")),
    "server name list is too short": records(message(extension(0, b"\x00\x00"))),
    "server name list is followed by stray bytes": records(
        message(extension(0, vector(2, b"\x00" + vector(2, b"a.example")) + b"x"))
    ),
    "server name is too short": records(message(server_name(b""))),
    "server name is followed by stray bytes": records(
        message(extension(0, vector(2, (b"\x00" + vector(2, b"a.example")) * 2)))
    ),
    "protocol name is too short": records(message(extension(16, vector(2, b"\x00\x00")))),
    "protocol list is followed by stray bytes": records(message(extension(16, vector(2, b"\x02h2") + b"x"))),
    "supported versions have an odd length": records(message(extension(43, vector(1, b"\x03\x04\x03")))),
    "the hello is cut into too many records": records(message(extension(21, bytes(16000))), *[1] * 16000),
}


@pytest.mark.parametrize("reason", BAD)
def test_malformed_hello_is_refused_with_its_reason(reason: str) -> None:
    assert verdict(BAD[reason]) == f"refused: {reason}"


@pytest.mark.parametrize(
    "name",
    [
        b"127.0.0.1",
        b"::1",
        b"a..b",
        b".a",
        b"a b",
        b"a\x00.example",
        b"ex\xe4mple.com",
        b"-a.example",
        b"a" * 64,
        b"x:443",
    ]
    + [b"*.example.com", b"a/b", b".".join([b"a" * 63] * 5)],
)
def test_server_name_that_is_no_host_name_is_refused(name: bytes) -> None:
    assert verdict(records(message(server_name(name)))) == "refused: server name is not a host name"


def test_name_type_other_than_host_is_refused() -> None:
    assert verdict(records(message(server_name(b"a.example", kind=1)))) == "refused: server name is not a host name"


def test_every_prefix_needs_more_and_the_whole_answers() -> None:
    wire = records(message(server_name(b"a.example"), extension(16, vector(2, b"\x02h2"))), 1, 2, 3, 50)
    whole = parse_client_hello(wire)
    assert isinstance(whole, Hello)
    answers = [parse_client_hello(wire[:size]) for size in range(len(wire))]
    assert set(map(type, answers)) == {Need}
    assert parse_client_hello(wire + b"\x14\x03\x03\x00\x01\x01") == whole


def test_cutting_into_records_anywhere_changes_nothing() -> None:
    handshake = message(server_name(b"a.example"), extension(43, vector(1, b"\x03\x04")))
    whole = parse_client_hello(records(handshake))
    assert isinstance(whole, Hello)
    assert all(parse_client_hello(records(handshake, cut)) == whole for cut in range(1, len(handshake)))


@pytest.mark.parametrize("reason", BAD)
def test_a_prefix_of_a_malformed_hello_never_answers_otherwise(reason: str) -> None:
    wire, final = BAD[reason], f"refused: {reason}"
    step = max(1, len(wire) // 200)
    assert {verdict(wire[:size]) for size in range(0, len(wire), step)} <= {NEED, final}


REAL = records(message(server_name(b"a.example"), extension(16, vector(2, b"\x02h2\x08http/1.1"))))


@given(st.lists(st.tuples(st.integers(0, len(REAL) - 1), st.integers(0, 255)), max_size=4), st.binary(max_size=40))
def test_mutated_hello_is_answered_or_refused_and_prefixes_agree(edits: list[tuple[int, int]], tail: bytes) -> None:
    wire = bytearray(REAL)
    for at, value in edits:
        wire[at] = value
    data = bytes(wire) + tail
    final = verdict(data)
    assert final is None or final is NEED or isinstance(final, (Hello, str))
    assert {verdict(data[:size]) for size in range(1, len(data))} <= {NEED, final}


@given(st.binary(max_size=300))
def test_noise_after_a_record_header_never_raises_anything_else(noise: bytes) -> None:
    assert isinstance(verdict(b"\x16\x03\x01" + vector(2, noise or b"\x01")), (Hello, str, Need))


@given(st.lists(st.integers(1, 40), max_size=8), st.integers(0, 400))
def test_records_and_segments_together_change_nothing(sizes: list[int], cut: int) -> None:
    handshake = message(server_name(b"a.example"), extension(43, vector(1, b"\x03\x04\x03\x03")))
    wire = records(handshake, *sizes)
    assert verdict(wire) == Hello("a.example", (), False, (0x0304, 0x0303))
    assert verdict(wire[:cut]) in (NEED, verdict(wire))


@contextmanager
def serving(context: ssl.SSLContext) -> Iterator[int]:
    """A TLS server on loopback that answers every HTTP request with "minted", until the block ends."""
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
                            conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nminted")
                except OSError:
                    plain.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


@pytest.fixture(scope="module")
def authority() -> CertificateAuthority:
    return CertificateAuthority()


@pytest.fixture
def ca_file(authority: CertificateAuthority, tmp_path: Path) -> Path:
    return authority.write(tmp_path)


def strict_client(ca: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca)
    # What Python 3.13 turns on by default: RFC 5280 to the letter.
    context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


@pytest.mark.parametrize("name", ["api.example.com", "_dmarc.example", "127.0.0.1", "2001:db8::1"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_python_client_accepts_the_leaf(
    authority: CertificateAuthority, ca_file: Path, name: str, version: ssl.TLSVersion
) -> None:
    client = strict_client(ca_file)
    client.minimum_version = client.maximum_version = version
    client.set_alpn_protocols(["h2", "http/1.1"])
    with serving(authority.context(name)) as port, socket.create_connection(("127.0.0.1", port), 5) as plain:
        with client.wrap_socket(plain, server_hostname=name) as conn:
            assert conn.selected_alpn_protocol() == "http/1.1"
            conn.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert conn.recv(4096).endswith(b"minted")


def test_python_client_refuses_the_leaf_under_another_name(authority: CertificateAuthority, ca_file: Path) -> None:
    with serving(authority.context("a.example")) as port, socket.create_connection(("127.0.0.1", port), 5) as plain:
        with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
            strict_client(ca_file).wrap_socket(plain, server_hostname="b.example")


def test_client_that_trusts_another_runs_ca_refuses(authority: CertificateAuthority, tmp_path: Path) -> None:
    other = CertificateAuthority().write(tmp_path)
    with serving(authority.context("a.example")) as port, socket.create_connection(("127.0.0.1", port), 5) as plain:
        with pytest.raises(ssl.SSLCertVerificationError):
            strict_client(other).wrap_socket(plain, server_hostname="a.example")


def test_tls_1_1_is_refused(authority: CertificateAuthority) -> None:
    assert authority.context("a.example").minimum_version is ssl.TLSVersion.TLSv1_2
    assert upstream_context().minimum_version is ssl.TLSVersion.TLSv1_2


def test_renegotiation_is_refused(authority: CertificateAuthority) -> None:
    assert authority.context("a.example").options & ssl.OP_NO_RENEGOTIATION
    assert upstream_context().options & ssl.OP_NO_RENEGOTIATION


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
def test_openssl_verifies_the_chain(authority: CertificateAuthority, ca_file: Path) -> None:
    leaf = ca_file.with_name("leaf.pem")
    leaf.write_bytes(authority.leaf("a.example").public_bytes(Encoding.PEM))
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-verify_hostname", "a.example"]
    done = subprocess.run([*command, "-CAfile", str(ca_file), str(leaf)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
def test_openssl_client_completes_the_handshake(authority: CertificateAuthority, ca_file: Path) -> None:
    with serving(authority.context("a.example")) as port:
        command = [
            "openssl",
            "s_client",
            "-connect",
            f"127.0.0.1:{port}",
            "-servername",
            "a.example",
            "-alpn",
            "h2,http/1.1",
        ]
        command += ["-CAfile", str(ca_file), "-verify_return_error", "-verify_hostname", "a.example", "-brief"]
        done = subprocess.run(command, input="x", capture_output=True, text=True, timeout=60)
    said = done.stdout + done.stderr
    assert "Verification: OK" in said
    assert "Verified peername: a.example" in said


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs the curl command")
@pytest.mark.parametrize("name", ["api.example.com", "127.0.0.1"])
def test_curl_gets_the_answer(authority: CertificateAuthority, ca_file: Path, name: str) -> None:
    with serving(authority.context(name)) as port:
        command = ["curl", "-sS", "--http2", "--cacert", str(ca_file), "--connect-to", f"::127.0.0.1:{port}"]
        done = subprocess.run([*command, f"https://{name}/"], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("minted", "")


@pytest.mark.parametrize("name", ["", "a b", "*.example.com", "a..b", "exämple.com", "a.example:443", "a\nb"])
def test_no_certificate_is_made_out_for_what_is_no_name(authority: CertificateAuthority, name: str) -> None:
    with pytest.raises(ValueError, match="no certificate can be made out"):
        authority.context(name)


def test_context_is_made_once_per_name(authority: CertificateAuthority) -> None:
    assert authority.context("once.example") is authority.context("once.example")
    assert authority.context("once.example") is not authority.context("twice.example")


def test_least_recently_used_context_goes_first() -> None:
    authority = CertificateAuthority(contexts=2)
    a, b = authority.context("a.example"), authority.context("b.example")
    assert authority.context("a.example") is a
    authority.context("c.example")
    assert authority.context("a.example") is a
    assert authority.context("b.example") is not b


def test_context_is_renewed_before_its_certificate_ends() -> None:
    now = [1_800_000_000.0]
    authority = CertificateAuthority(clock=lambda: now[0])
    first = authority.context("a.example")
    ends = authority.leaf("a.example").not_valid_after_utc.timestamp()
    now[0] += 86400
    assert authority.context("a.example") is first
    now[0] = ends - 86400
    assert authority.context("a.example") is not first


def test_leaf_never_outlives_the_ca() -> None:
    now = [1_800_000_000.0]
    authority = CertificateAuthority(clock=lambda: now[0])
    ca = x509.load_pem_x509_certificate(authority.pem)
    now[0] = (ca.not_valid_after_utc - dt.timedelta(days=1)).timestamp()
    assert authority.leaf("a.example").not_valid_after_utc == ca.not_valid_after_utc


def test_ca_may_not_sign_another_ca_and_leaf_may_not_sign(authority: CertificateAuthority) -> None:
    ca = x509.load_pem_x509_certificate(authority.pem).extensions
    leaf = authority.leaf("a.example").extensions
    assert ca.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(ca=True, path_length=0)
    assert not leaf.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not leaf.get_extension_for_class(x509.KeyUsage).value.key_cert_sign


def test_private_keys_are_in_no_file(tmp_path: Path) -> None:
    authority = CertificateAuthority(tmp_path)
    authority.write(tmp_path)
    authority.context("a.example")
    assert [path.name for path in tmp_path.iterdir()] == ["ca.pem"]
    assert b"PRIVATE" not in (tmp_path / "ca.pem").read_bytes()
    assert "PRIVATE" not in repr(authority)


def test_without_memory_files_the_key_is_only_written_encrypted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ca_file: Path
) -> None:
    authority = CertificateAuthority(tmp_path)
    ca = authority.write(tmp_path)
    monkeypatch.delattr(os, "memfd_create", raising=False)
    seen: list[tuple[bytes, int]] = []
    load = ssl.SSLContext.load_cert_chain

    def spy(self: ssl.SSLContext, certfile: str, keyfile: str | None = None, password: str | None = None) -> None:
        seen.append((Path(certfile).read_bytes(), os.stat(certfile).st_mode & 0o777))
        load(self, certfile, keyfile, password)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", spy)
    context = authority.context("a.example")
    [(content, mode)] = seen
    assert b"BEGIN ENCRYPTED PRIVATE KEY" in content
    assert b"BEGIN PRIVATE KEY" not in content
    assert mode == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["ca.pem"]
    with serving(context) as port, socket.create_connection(("127.0.0.1", port), 5) as plain:
        with strict_client(ca).wrap_socket(plain, server_hostname="a.example") as conn:
            assert conn.version() == "TLSv1.3"


def test_upstream_context_verifies_name_and_chain(authority: CertificateAuthority, ca_file: Path) -> None:
    with serving(authority.context("a.example")) as port:
        with socket.create_connection(("127.0.0.1", port), 5) as plain:
            with pytest.raises(ssl.SSLCertVerificationError):
                upstream_context().wrap_socket(plain, server_hostname="a.example")
        with socket.create_connection(("127.0.0.1", port), 5) as plain:
            with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
                upstream_context(ca_file).wrap_socket(plain, server_hostname="b.example")
        with socket.create_connection(("127.0.0.1", port), 5) as plain:
            with upstream_context(ca_file).wrap_socket(plain, server_hostname="a.example") as conn:
                assert conn.selected_alpn_protocol() == "http/1.1"


def test_upstream_context_keeps_the_systems_roots(ca_file: Path) -> None:
    assert (
        upstream_context(ca_file).cert_store_stats()["x509_ca"] == upstream_context().cert_store_stats()["x509_ca"] + 1
    )


@pytest.mark.parametrize("content", [b"", b"not a certificate", None])
def test_unusable_extra_ca_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "extra.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        upstream_context(path)
    [problem] = caught.value.problems
    assert problem.startswith(f"{path}: ")
