"""What OpenSSL is asked to do for a connection: asked itself, or through Python's ssl, it answers alike."""

from __future__ import annotations

import ctypes
import itertools
import os
import resource
import ssl
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from creto_hotpath._select import extensions_wanted
from creto_proxy.tls import CertificateAuthority

from .conftest import FORMS, Form

try:
    import _ssl
except ImportError:  # pragma: no cover
    pytest.skip("there is no _ssl to look into", allow_module_level=True)

NAME = "up.test"
LONGEST = 16384 + 256
VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
WAYS = [(form, way) for form in FORMS for way in (("ssl", "openssl") if form.compiled else ("ssl",))]


def _symbols() -> Any:
    """The library that Python's ssl calls, or None if it keeps its names to itself."""
    try:
        library = ctypes.CDLL(getattr(_ssl, "__file__", None))
        library.SSL_read  # noqa: B018
    except (AttributeError, OSError):
        return None
    return library


SYMBOLS = _symbols()
CAN = extensions_wanted() and SYMBOLS is not None and ssl.OPENSSL_VERSION.startswith("OpenSSL 3.")
needs_libssl = pytest.mark.skipif(not CAN, reason="Python's ssl calls a libssl that cannot be called beside it")


class Pair:
    """Two engines that are through their handshake."""

    def __init__(self, form: Form, way: str, contexts: Contexts, version: str = "1.3") -> None:
        openssl = form("openssl")
        assert openssl.choose(way) == way
        try:
            self.server = openssl.Engine(contexts.server(version), None)
            self.client = openssl.Engine(contexts.client(version), NAME)
        finally:
            openssl.choose("openssl")
        assert self.server.way == self.client.way == way
        for side, other in itertools.islice(
            itertools.cycle([(self.client, self.server), (self.server, self.client)]), 4
        ):
            try:
                side.session.do_handshake()
            except ssl.SSLWantReadError:
                pass
            hand(side.out(), other)
        assert self.client.content(LONGEST) is None  # the tickets


class Contexts:
    def __init__(self) -> None:
        self.authority = CertificateAuthority()

    def server(self, version: str) -> ssl.SSLContext:
        context = self.authority._new_context(self.authority.leaf(NAME))
        context.minimum_version = context.maximum_version = VERSIONS[version]
        return context

    def client(self, version: str) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=self.authority.pem.decode())
        context.minimum_version = context.maximum_version = VERSIONS[version]
        return context


CONTEXTS = Contexts()


def hand(wire: bytes, engine: Any) -> None:
    engine.put(wire, 0, len(wire))


def content(engine: Any) -> bytes:
    """All that it has."""
    found = b""
    while piece := engine.content(LONGEST):
        found += piece
    return found


@pytest.fixture(params=WAYS, ids=lambda way: f"{'compiled' if way[0].compiled else 'twin'}, {way[1]}")
def way(request: pytest.FixtureRequest) -> tuple[Form, str]:
    chosen: tuple[Form, str] = request.param
    if chosen[1] == "openssl" and not CAN:
        pytest.skip("Python's ssl calls a libssl that cannot be called beside it")
    return chosen


@pytest.fixture(params=VERSIONS)
def pair(request: pytest.FixtureRequest, way: tuple[Form, str]) -> Pair:
    return Pair(*way, CONTEXTS, request.param)


# -- carrying


@given(
    pieces=st.lists(st.binary(min_size=1, max_size=40_000), min_size=1, max_size=4),
    cuts=st.lists(st.integers(1, 20_000), min_size=1, max_size=8),
    version=st.sampled_from(list(VERSIONS)),
)
@settings(max_examples=60, deadline=None)
def test_records_cut_anywhere_have_the_same_content_each_way(
    pieces: list[bytes], cuts: list[int], version: str
) -> None:
    for form, way in WAYS:
        if way == "openssl" and not CAN:
            continue
        pair = Pair(form, way, CONTEXTS, version)
        for sender, receiver in ((pair.client, pair.server), (pair.server, pair.client)):
            wire = b""
            for piece in pieces:
                sealed = 0
                while sealed < len(piece):
                    sealed += sender.seal(memoryview(piece) if len(piece) % 2 else piece, sealed)
                wire += sender.out()
            found, at = b"", 0
            for size in itertools.cycle(cuts):
                receiver.put(wire, at, min(at + size, len(wire)))
                found += content(receiver)
                at += size
                if at >= len(wire):
                    break
            assert found == b"".join(pieces)


def test_a_record_takes_as_much_as_a_record_may_hold(pair: Pair, way: tuple[Form, str]) -> None:
    fragment = way[0]("openssl").FRAGMENT
    blob = bytes(range(256)) * 256
    for piece in (blob, memoryview(blob), memoryview(bytearray(blob))):
        assert pair.client.seal(piece, 0) == fragment == 16384
        assert pair.client.seal(piece, len(blob) - 3) == 3
        hand(pair.client.out(), pair.server)
        assert content(pair.server) == blob[:fragment] + blob[-3:]
    assert pair.client.out() == b""


def test_content_never_takes_more_than_is_asked_for_and_no_byte_that_was_not_sent(pair: Pair) -> None:
    pair.client.seal(b"abcdef", 0)
    hand(pair.client.out(), pair.server)
    assert [pair.server.content(length) for length in (-5, 0, 1, 2, 1 << 40, 1)] == [
        b"a",
        b"b",
        b"c",
        b"de",
        b"f",
        None,
    ]


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (2, 1), (0, 4), (4, 4), (-(1 << 62), 1 << 62)])
def test_only_bytes_that_are_there_are_taken(pair: Pair, start: int, end: int) -> None:
    with pytest.raises(ValueError, match="no such bytes"):
        pair.server.put(b"abc", start, end)
    assert pair.server.content(1) is None


@pytest.mark.parametrize(("piece", "start"), [(b"", 0), (b"abc", 3), (b"abc", -1), (b"abc", 1 << 62)])
def test_only_what_is_there_is_sealed(pair: Pair, piece: bytes, start: int) -> None:
    for octets in (piece, memoryview(piece)):
        with pytest.raises(ValueError, match="nothing to seal"):
            pair.client.seal(octets, start)
    assert pair.client.out() == b""


def test_only_bytes_are_sealed(pair: Pair) -> None:
    for wrong in ("text", 7, None, [1]):
        with pytest.raises(TypeError):
            pair.client.seal(wrong, 0)
    with pytest.raises(BufferError):
        pair.client.seal(memoryview(b"abcdef")[::2], 0)
    assert pair.client.out() == b""


def test_a_goodbye_is_the_end_and_no_goodbye_is_none(pair: Pair) -> None:
    pair.client.seal(b"last", 0)
    with pytest.raises(ssl.SSLWantReadError):
        pair.client.session.unwrap()
    hand(pair.client.out(), pair.server)
    assert [pair.server.content(100) for _ in range(3)] == [b"last", b"", b""]
    pair.server.session.unwrap()
    hand(pair.server.out(), pair.client)
    pair.client.session.unwrap()
    with pytest.raises(ssl.SSLError):
        pair.client.seal(b"too late", 0)


# -- what goes wrong


def broken(pair: Pair, wire: bytes) -> ssl.SSLError:
    hand(wire, pair.server)
    with pytest.raises(ssl.SSLError) as caught:
        pair.server.content(LONGEST)
    return caught.value


def tampered(pair: Pair) -> bytes:
    pair.client.seal(b"evil", 0)
    wire = bytearray(pair.client.out())
    wire[-1] ^= 1
    return bytes(wire)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("what", ["tampered", "no TLS", "too long", "unencrypted"])
@needs_libssl
def test_both_ways_say_alike_what_is_wrong(version: str, what: str) -> None:
    wires = {
        "no TLS": b"HTTP/1.1 200 OK\r\n\r\n",
        "too long": b"\x17\x03\x03\x48\x00" + bytes(0x4800),
        "unencrypted": b"\x16\x03\x03\x00\x04\x00\x00\x00\x00",
    }
    said = []
    for form, way in WAYS:
        pair = Pair(form, way, CONTEXTS, version)
        error = broken(pair, wires.get(what) or tampered(pair))
        assert type(error) is ssl.SSLError and error.errno == ssl.SSL_ERROR_SSL
        alert = pair.server.out()
        hand(alert, pair.client)
        with pytest.raises(ssl.SSLError) as caught:
            pair.client.content(LONGEST)
        # A second question is no way round the first answer.
        with pytest.raises(ssl.SSLError):
            pair.server.content(LONGEST)
        with pytest.raises(ssl.SSLError):
            pair.server.seal(b"more", 0)
        said.append(
            [(told.library, str(told).partition("] ")[2].partition(" (_ssl.c")[0]) for told in (error, caught.value)]
        )
        for told in (error, caught.value):
            # Python has no name for reasons that are not TLS's own.
            assert told.reason is None or f"[{told.library}: {told.reason}]" in str(told)
    assert said[0][0][0] == "SSL" and said[0][0][1] and all(each == said[0] for each in said), said


@needs_libssl
def test_what_failed_here_is_not_heard_elsewhere(pair: Pair) -> None:
    """OpenSSL's queue of errors is one for all connections of a thread."""
    other = Pair(FORMS[-1], "ssl", CONTEXTS)
    broken(pair, tampered(pair))
    assert SYMBOLS.ERR_peek_error() == 0
    assert other.server.content(1) is None
    # And what others left in it is not taken for a failure of one's own.
    again = Pair(FORMS[0], "openssl", CONTEXTS)
    again.server.seal(b"fine", 0)
    hand(again.server.out(), again.client)
    for act in (
        partial(again.client.seal, b"fine", 0),
        partial(again.client.content, 9),
        partial(again.client.content, 9),
    ):
        SYMBOLS.BIO_new_file(b"/nowhere/at/all", b"r")
        assert SYMBOLS.ERR_peek_error() != 0
        assert act() in (4, b"fine", None)
        assert SYMBOLS.ERR_peek_error() == 0


def test_nothing_grows(pair: Pair) -> None:
    said = bytes(5000)

    def turn() -> None:
        for sender, receiver in ((pair.client, pair.server), (pair.server, pair.client)):
            sender.seal(said, 0)
            hand(sender.out(), receiver)
            assert receiver.content(LONGEST) == said and receiver.content(1) is None
            with pytest.raises(ValueError, match="nothing"):
                sender.seal(said, 5000)

    turn()
    tracemalloc.start()
    try:
        turn()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(50):
            turn()
        assert tracemalloc.get_traced_memory()[0] - before < 4 * len(said)
    finally:
        tracemalloc.stop()


@needs_libssl
@pytest.mark.skipif("CRETO_SANITIZED" in os.environ, reason="the sanitizer keeps what is freed")
def test_a_connection_at_rest_keeps_no_room_for_long_records() -> None:
    pairs = [Pair(FORMS[0], "openssl", CONTEXTS) for _ in range(150)]
    said = bytes(16384)

    def turn() -> None:
        for pair in pairs:
            for sender, receiver in ((pair.client, pair.server), (pair.server, pair.client)):
                sender.seal(said, 0)
                sender.rest()  # not while something is to be sent
                hand(sender.out(), receiver)
                assert receiver.content(LONGEST) == said
                sender.rest()
                receiver.rest()

    before = resident()
    turn()
    # Without rest() two buffers of 22 KiB on each side.
    assert resident() - before < len(pairs) * 16384
    turn()


def resident() -> int:
    """Bytes of memory that this process takes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# -- whether it may be


@needs_libssl
def test_a_session_is_known_by_its_context() -> None:
    openssl = FORMS[0]("openssl")
    assert openssl.choose("openssl") == "openssl"
    context, another = CONTEXTS.client("1.3"), CONTEXTS.client("1.3")
    inner = context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname=NAME)._sslobj  # type: ignore[attr-defined]
    assert openssl.finds(inner, context)

    class Lookalike:
        context = CONTEXTS.client("1.3")

    for wrong in (None, object(), 7, b"x" * 200, context, ssl.MemoryBIO(), Lookalike(), type(inner)):
        assert not openssl.finds(wrong, context)
        assert not openssl.finds(inner, wrong if wrong is not context else another)


@needs_libssl
def test_a_session_that_looks_different_goes_through_ssl() -> None:
    class Watched(ssl.SSLObject):
        """What a test or a library may put in between."""

        @classmethod
        def _create(cls, *arguments: Any, **named: Any) -> Any:
            made: Any = super()._create(*arguments, **named)  # type: ignore[misc]
            made._sslobj = Between(made._sslobj)
            return made

    class Between:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    openssl = FORMS[0]("openssl")
    assert openssl.choose("openssl") == "openssl"
    context = CONTEXTS.client("1.3")
    context.sslobject_class = Watched
    client = openssl.Engine(context, NAME)
    server = openssl.Engine(CONTEXTS.server("1.3"), None)
    assert (client.way, server.way) == ("ssl", "openssl")
    for side, other in ((client, server), (server, client), (client, server)):
        try:
            side.session.do_handshake()
        except ssl.SSLWantReadError:
            pass
        hand(side.out(), other)
    with pytest.raises(ssl.SSLWantReadError):
        server.session.read(1)
    client.seal(b"hello", 0)
    hand(client.out(), server)
    assert server.content(100) == b"hello"


ODD = {
    "another library": "ssl.OPENSSL_VERSION = 'LibreSSL 4.0.0'",
    "another version": "ssl.OPENSSL_VERSION = 'OpenSSL 3.99.0 1 Jan 2031'",
    "built in": "del _ssl.__file__",
    "without its names": "import _socket; _ssl.__file__ = _socket.__file__",
    "not where it says": "_ssl.__file__ = '/nowhere/_ssl.so'",
    "no anonymous ciphers": "ssl.SSLContext.set_ciphers = lambda self, names: super(ssl.SSLContext, self).set_ciphers('AES')",
    "other objects": "ssl.SSLContext.sslobject_class = type('Own', (ssl.SSLObject,), {'_sslobj': property("
    "lambda self: None, lambda self, value: None)})",
}


@needs_libssl
@pytest.mark.parametrize("odd", [None, *ODD])
def test_where_it_is_not_proved_all_goes_through_ssl(odd: str | None) -> None:
    code = f"import ssl, _ssl\n{ODD.get(odd or '', '')}\nfrom creto_hotpath import tls; print(tls.ENGINE)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == ("openssl" if odd is None else "ssl"), done.stderr


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    if CAN:
        FORMS[0]("openssl").choose("openssl")
