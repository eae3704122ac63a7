"""TLS on both sides: what a client's hello says, certificates for interception, and the context for upstreams.

The hello is read before anything is believed, from bytes that may be hostile or cut anywhere. The certificate
authority lives as long as one run: its key is made at start, stays in memory and is gone afterwards.
"""

from __future__ import annotations

import datetime as dt
import enum
import ipaddress
import os
import re
import secrets
import ssl
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from creto_proxy.errors import ConfigError
from creto_proxy.trust import system_bundle

# 16 KiB: a hello with post-quantum key shares is about 2 KiB; OpenSSL stops at 128 KiB (ssl/statem/statem_srvr.c).
MAX_HELLO = 16384
# Bytes on the wire for it, however finely a client cuts it into records.
MAX_HELLO_WIRE = 32768
ALPN, ALPN_HTTP2 = "http/1.1", "h2"

_HANDSHAKE, _CLIENT_HELLO = 22, 1
_SERVER_NAME, _ALPN, _SUPPORTED_VERSIONS = 0, 16, 43
# encrypted_client_hello (RFC 9849) and its predecessor encrypted_server_name.
_ENCRYPTED_NAMES = frozenset((0xFE0D, 0xFFCE))
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\Z")

_CLOCK_SKEW = dt.timedelta(hours=1)
_CA_LIFETIME = dt.timedelta(days=365)
_LEAF_LIFETIME = dt.timedelta(days=7)


class BadHello(ValueError):
    """The connection begins like TLS but is not a well-formed ClientHello. The text says what is wrong."""


class Need(enum.Enum):
    """``NEED``: no answer yet, ask again with more bytes."""

    MORE = "more"


NEED = Need.MORE


@dataclass(frozen=True, slots=True)
class Hello:
    """What a ClientHello says.

    sni: host name in lower case without trailing dot, None when none was sent. alpn: protocols in the client's order.
    ech: the real name may be encrypted, ``sni`` is then only the outer one (clients also send this for show, RFC 8701
    style, which cannot be told apart). versions: offered protocol versions, 0x0303 is TLS 1.2, 0x0304 is TLS 1.3.
    """

    sni: str | None
    alpn: tuple[str, ...]
    ech: bool
    versions: tuple[int, ...]


def parse_client_hello(data: bytes | bytearray | memoryview) -> Hello | None | Need:
    """The ClientHello at the start of ``data``; None when it is not TLS; ``NEED`` when it is not complete.

    Every prefix gives ``NEED`` or the answer of the whole, wherever segments or TLS records were cut. Looks at no more
    than ``MAX_HELLO_WIRE`` bytes. Raises BadHello. Source: RFC 8446 sections 4.1.2 and 5.1, RFC 6066 section 3.
    """
    wire = bytes(data[:MAX_HELLO_WIRE])
    if not wire:
        return NEED
    if wire[0] != _HANDSHAKE:
        return None
    message = bytearray()
    at = 0
    while True:
        if at + 5 >= MAX_HELLO_WIRE:
            raise BadHello("the hello is cut into too many records")
        header = wire[at : at + 5]
        if len(header) < 5:
            return NEED
        if header[0] != _HANDSHAKE or header[1] != 3:
            raise BadHello("a record is not a TLS handshake record")
        length = int.from_bytes(header[3:5], "big")
        if not 0 < length <= 16384:
            raise BadHello(f"a record says it is {length} bytes long")
        if at + 5 + length > MAX_HELLO_WIRE:
            raise BadHello("the hello is cut into too many records")
        received = wire[at + 5 : at + 5 + length]
        before = len(message)
        message += received
        size = _message_size(message)
        if size is not None and before + length > size:
            raise BadHello("the hello does not end where its record ends")
        if size is not None and len(message) == size:
            return _client_hello(bytes(message[4:]))
        if len(received) < length:
            return NEED
        at += 5 + length


def _message_size(message: bytearray) -> int | None:
    """Bytes of the handshake message with its header; None while its length has not come in."""
    if message and message[0] != _CLIENT_HELLO:
        raise BadHello(f"the first handshake message is of type {message[0]}, not a ClientHello")
    if len(message) < 4:
        return None
    size = 4 + int.from_bytes(message[1:4], "big")
    if size > MAX_HELLO:
        raise BadHello(f"the hello says it is {size} bytes long")
    return size


class _Cursor:
    """Reads fields of known width; whatever reaches past the end raises BadHello naming the field."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def done(self) -> bool:
        return self._at == len(self._data)

    def take(self, size: int, field: str) -> bytes:
        end = self._at + size
        if end > len(self._data):
            raise BadHello(f"{field} is cut short")
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def number(self, size: int, field: str) -> int:
        return int.from_bytes(self.take(size, field), "big")

    def vector(self, prefix: int, field: str, minimum: int = 0) -> bytes:
        taken = self.take(self.number(prefix, field), field)
        if len(taken) < minimum:
            raise BadHello(f"{field} is too short")
        return taken

    def end(self, field: str) -> None:
        if not self.done:
            raise BadHello(f"{field} is followed by stray bytes")


def _client_hello(body: bytes) -> Hello:
    cursor = _Cursor(body)
    legacy_version = cursor.number(2, "legacy_version")
    if legacy_version >> 8 != 3:
        raise BadHello("legacy_version is not of the TLS family")
    cursor.take(32, "random")
    if len(cursor.vector(1, "session id")) > 32:
        raise BadHello("session id is too long")
    if len(cursor.vector(2, "cipher suites", 2)) % 2:
        raise BadHello("cipher suites have an odd length")
    cursor.vector(1, "compression methods", 1)
    extensions = {} if cursor.done else _extensions(cursor.vector(2, "extensions"))
    cursor.end("extensions")
    return Hello(
        sni=_server_name(extensions[_SERVER_NAME]) if _SERVER_NAME in extensions else None,
        alpn=_protocols(extensions[_ALPN]) if _ALPN in extensions else (),
        ech=not _ENCRYPTED_NAMES.isdisjoint(extensions),
        versions=_versions(extensions[_SUPPORTED_VERSIONS]) if _SUPPORTED_VERSIONS in extensions else (legacy_version,),
    )


def _extensions(data: bytes) -> dict[int, bytes]:
    cursor = _Cursor(data)
    found: dict[int, bytes] = {}
    while not cursor.done:
        kind = cursor.number(2, "extension type")
        content = cursor.vector(2, f"extension {kind}")
        if kind in found:
            raise BadHello(f"extension {kind} occurs twice")
        found[kind] = content
    return found


def _server_name(data: bytes) -> str:
    """The one host name of the extension. Two would let two readers disagree on where the client is going."""
    cursor = _Cursor(data)
    names = _Cursor(cursor.vector(2, "server name list", 1))
    cursor.end("server name list")
    if names.number(1, "server name type") != 0:
        raise BadHello("server name is not a host name")
    raw = names.vector(2, "server name", 1)
    names.end("server name")
    name = raw.decode("latin-1").lower().removesuffix(".")
    if _is_address(name) or not _is_host_name(name):
        raise BadHello("server name is not a host name")
    return name


def _protocols(data: bytes) -> tuple[str, ...]:
    cursor = _Cursor(data)
    listed = _Cursor(cursor.vector(2, "protocol list", 2))
    cursor.end("protocol list")
    found = []
    while not listed.done:
        found.append(listed.vector(1, "protocol name", 1).decode("latin-1"))
    return tuple(found)


def _versions(data: bytes) -> tuple[int, ...]:
    cursor = _Cursor(data)
    listed = cursor.vector(1, "supported versions", 2)
    cursor.end("supported versions")
    if len(listed) % 2:
        raise BadHello("supported versions have an odd length")
    numbers = (int.from_bytes(listed[at : at + 2], "big") for at in range(0, len(listed), 2))
    # 0x0a0a, 0x1a1a, ... are there to keep servers from choking on the unknown (GREASE, RFC 8701).
    return tuple(number for number in numbers if number & 0x0F0F != 0x0A0A)


def _is_host_name(name: str) -> bool:
    return 0 < len(name) <= 253 and all(map(_LABEL.match, name.split(".")))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Minted:
    context: ssl.SSLContext
    renew_at: float


class CertificateAuthority:
    """Vouches for intercepted hosts towards one run's agent, and for nothing else.

    The CA and the leaf key are EC P-256 and never leave memory (see ``_loadable``). All leaves share one key: making a
    key per host would cost more and protect nothing, since whoever has the process has the CA.

    private_dir: a directory of mode 0700 for the one case in which the platform has no memory files.
    contexts: how many server contexts are kept, least recently used out first; about 25 KiB each.
    """

    def __init__(
        self,
        private_dir: Path | None = None,
        *,
        contexts: int = 512,
        clock: Callable[[], float] = time.time,
        exported: bytes | None = None,
    ) -> None:
        """exported: what another process of the same run got from ``export``. Raises ValueError when it is not that."""
        self._private_dir = private_dir
        self._capacity = contexts
        self._clock = clock
        self._minted: OrderedDict[str, _Minted] = OrderedDict()
        self._lock = threading.Lock()
        self._protocols = [ALPN]
        if exported is not None:
            self._key, self._leaf_key, self._certificate = _imported(exported)
            self._name = self._certificate.subject
            return
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._leaf_key = ec.generate_private_key(ec.SECP256R1())
        # The name differs from run to run, so that a client that still trusts an old CA does not take it for this one.
        label = f"Creto run CA {secrets.token_hex(6)}"
        self._name = x509.Name(
            [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Creto"), x509.NameAttribute(NameOID.COMMON_NAME, label)]
        )
        self._certificate = self._self_signed()

    def __repr__(self) -> str:
        return f"CertificateAuthority({self._name.rfc4514_string()!r})"

    @property
    def pem(self) -> bytes:
        """The CA certificate, PEM. Public."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def offer_http2(self) -> None:
        """Contexts made from now on offer HTTP/2 before HTTP/1.1."""
        self._protocols = [ALPN_HTTP2, ALPN]

    def export(self) -> bytes:
        """Certificate and keys, for another process of the same run: whoever has this is the CA."""
        form = serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        certificate = self._certificate.public_bytes(serialization.Encoding.DER)
        return b"".join(
            len(part).to_bytes(4, "big") + part
            for part in (self._key.private_bytes(*form), self._leaf_key.private_bytes(*form), certificate)
        )

    def write(self, directory: Path) -> Path:
        """Writes the certificate (not the key) as ``ca.pem`` into ``directory``; its path."""
        path = directory / "ca.pem"
        path.write_bytes(self.pem)
        path.chmod(0o644)
        return path

    def context(self, name: str) -> ssl.SSLContext:
        """The context that answers as ``name``, a lower-case host name or an address literal.

        Offers HTTP/1.1, HTTP/2 when asked to, and TLS 1.2 or newer. Made on first use (about a millisecond), then kept
        until it gets old. May be called from any thread. Raises ValueError when no certificate can be made out for
        ``name``.
        """
        now = self._clock()
        with self._lock:
            minted = self._minted.get(name)
            if minted is not None and now < minted.renew_at:
                self._minted.move_to_end(name)
                return minted.context
        made = self._new_context(self.leaf(name))
        with self._lock:
            self._minted[name] = _Minted(made, now + _LEAF_LIFETIME.total_seconds() / 2)
            self._minted.move_to_end(name)
            while len(self._minted) > self._capacity:
                self._minted.popitem(last=False)
        return made

    def leaf(self, name: str) -> x509.Certificate:
        """A certificate for exactly ``name``, valid a week. Raises ValueError for what is neither name nor address."""
        now = self._now()
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self._name)
            .public_key(self._leaf_key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _CLOCK_SKEW)
            .not_valid_after(min(now + _LEAF_LIFETIME, self._certificate.not_valid_after_utc))
            # Critical, because the subject is empty (RFC 5280 section 4.2.1.6).
            .add_extension(x509.SubjectAlternativeName([_general_name(name)]), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._leaf_key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def _self_signed(self) -> x509.Certificate:
        now = self._now()
        public = self._key.public_key()
        return (
            x509.CertificateBuilder()
            .subject_name(self._name)
            .issuer_name(self._name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _CLOCK_SKEW)
            .not_valid_after(now + _CA_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def _now(self) -> dt.datetime:
        return dt.datetime.fromtimestamp(int(self._clock()), dt.UTC)

    def _new_context(self, leaf: x509.Certificate) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(self._protocols)
        with self._loadable(leaf) as (path, password):
            context.load_cert_chain(path, password=password)
        return context

    @contextmanager
    def _loadable(self, leaf: x509.Certificate) -> Iterator[tuple[str, str | None]]:
        """A path from which the ``ssl`` module, which loads from files only, can read leaf and key; and the password.

        On Linux the file is anonymous memory. Elsewhere it is a short-lived file of mode 0600 in which the key is
        encrypted under a password that was never written down.
        """
        certificate = leaf.public_bytes(serialization.Encoding.PEM)
        if hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):
            descriptor = os.memfd_create("leaf", os.MFD_CLOEXEC)
            try:
                os.write(descriptor, certificate + self._leaf_key_pem(serialization.NoEncryption()))
                yield f"/proc/self/fd/{descriptor}", None
            finally:
                os.close(descriptor)
            return
        password = secrets.token_hex(32)
        sealed = self._leaf_key_pem(serialization.BestAvailableEncryption(password.encode()))
        with tempfile.NamedTemporaryFile(dir=self._private_dir, prefix="leaf-", suffix=".pem") as file:
            file.write(certificate + sealed)
            file.flush()
            yield file.name, password

    def _leaf_key_pem(self, encryption: serialization.KeySerializationEncryption) -> bytes:
        return self._leaf_key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def _imported(
    exported: bytes,
) -> tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePrivateKey, x509.Certificate]:
    """The inverse of ``CertificateAuthority.export``."""
    parts: list[bytes] = []
    at = 0
    for _ in range(3):
        end = at + 4 + int.from_bytes(exported[at : at + 4], "big")
        parts.append(exported[at + 4 : end])
        at = end
    keys = [serialization.load_der_private_key(part, password=None) for part in parts[:2]]
    if not isinstance(keys[0], ec.EllipticCurvePrivateKey) or not isinstance(keys[1], ec.EllipticCurvePrivateKey):
        raise ValueError("not the keys of a run's CA")
    return keys[0], keys[1], x509.load_der_x509_certificate(parts[2])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    if not _is_host_name(name):
        raise ValueError(f"no certificate can be made out for {name!r}")
    return x509.DNSName(name)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def upstream_context(extra_ca: Path | None = None, *, http2: bool = False) -> ssl.SSLContext:
    """The context for connections to upstreams: certificate and name verified, TLS 1.2 or newer, HTTP/1.1 unless http2
    is to be offered before it.

    Trusts the system's roots and, if given, those in the PEM file ``extra_ca``. Raises ConfigError when that file
    cannot be used.
    """
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols([ALPN_HTTP2, ALPN] if http2 else [ALPN])
    roots = system_bundle()
    # Interpreters that bring their own OpenSSL may look for roots where this system has none.
    if roots is not None and not context.cert_store_stats()["x509_ca"]:
        context.load_verify_locations(cafile=roots)
    if extra_ca is not None:
        try:
            context.load_verify_locations(cafile=extra_ca)
        except ssl.SSLError:
            raise ConfigError([f"{extra_ca}: holds no usable CA certificate in PEM form"]) from None
        except OSError as error:
            raise ConfigError([f"{extra_ca}: cannot be read: {error.strerror}"]) from None
    return context
