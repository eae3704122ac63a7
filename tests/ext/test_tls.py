"""TLS on a connection, over real sockets on uvloop: the layer on one side, the ssl module or ``openssl`` on the other.

All of it is tried in three ways: the twin, the compiled form through Python's ssl, and the one that calls libssl.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import select
import shutil
import socket
import ssl
import struct
import subprocess
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from creto_proxy.tls import CertificateAuthority

from .conftest import FORMS, Form
from .ear import Ear
from .test_relay import KEY, World, ask, get

NAME = "up.test"
VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
# More than the kernel buffers of a loopback connection take.
MUCH = 12 << 20
GARBAGE = bytes(range(256)) * 4


class Contexts:
    """Both sides' contexts, made by one authority."""

    def __init__(self) -> None:
        self.authority = CertificateAuthority()

    def server(self, version: str | None = None) -> ssl.SSLContext:
        context = self.authority._new_context(self.authority.leaf(NAME))
        return _only(context, version)

    def client(self, version: str | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=self.authority.pem.decode())
        context.options |= ssl.OP_NO_RENEGOTIATION
        return _only(context, version)


def _only(context: ssl.SSLContext, version: str | None) -> ssl.SSLContext:
    if version is not None:
        context.minimum_version = context.maximum_version = VERSIONS[version]
    return context


@pytest.fixture(scope="module")
def contexts() -> Contexts:
    return Contexts()


WAYS = [(form, way) for form in FORMS for way in (("ssl", "openssl") if form.compiled else ("ssl",))]


@pytest.fixture(params=WAYS, ids=lambda way: f"{'compiled' if way[0].compiled else 'twin'}, {way[1]}")
def form(request: pytest.FixtureRequest) -> Iterator[Form]:
    """Each form, with connections going each way that it has."""
    chosen: Form
    chosen, way = request.param
    openssl = chosen("openssl")
    if openssl.choose(way) != way:
        pytest.skip("Python's ssl calls a libssl that cannot be called beside it")
    yield chosen
    openssl.choose("openssl")


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Peer:
    """The other side, by hand: an ``SSLObject`` whose records are carried by the test, so that it can cut them."""

    def __init__(self, context: ssl.SSLContext, sock: socket.socket, server: bool = False) -> None:
        self.sock = sock
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.session = context.wrap_bio(
            self.incoming, self.outgoing, server_side=server, server_hostname=None if server else NAME
        )
        self.loop = asyncio.get_running_loop()

    async def call(self, what: Callable[[], Any]) -> Any:
        """What that call gives once the other side has said enough."""
        while True:
            try:
                return what()
            except ssl.SSLWantReadError:
                await self.flush()
                received = await self.loop.sock_recv(self.sock, 65536)
                if not received:
                    raise ConnectionError("closed") from None
                self.incoming.write(received)

    async def handshake(self) -> None:
        await self.call(self.session.do_handshake)
        await self.flush()

    async def flush(self) -> None:
        if data := self.outgoing.read():
            await self.loop.sock_sendall(self.sock, data)

    def records(self, *pieces: bytes) -> bytes:
        """Each piece as a record of its own."""
        for piece in pieces:
            assert self.session.write(piece) == len(piece)
        return self.outgoing.read()

    async def send(self, wire: bytes, cut: int = 0) -> None:
        """Those bytes; in pieces of ``cut``, each read by the other side before the next is sent."""
        for at in range(0, len(wire), cut or len(wire)):
            await self.loop.sock_sendall(self.sock, wire[at : at + (cut or len(wire))])
            if cut:
                await asyncio.sleep(0)

    async def read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            got = await self.call(partial(self.session.read, size - len(data)))
            if not got:
                break
            data += got
        return bytes(data)


class Stage:
    """One connection with the layer on it, either side, and a peer."""

    def __init__(self, tls: ModuleType, contexts: Contexts) -> None:
        self.tls = tls
        self.contexts = contexts
        self.loop = asyncio.get_running_loop()
        self.errors: list[str] = []
        self.loop.set_exception_handler(lambda _, context: self.errors.append(str(context)))
        self.sockets: list[socket.socket] = []

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """A connected pair of TCP sockets."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = socket.create_connection(listener.getsockname())
            theirs = listener.accept()[0]
        for sock in (ours, theirs):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sockets += [ours, theirs]
        return ours, theirs

    async def begin(
        self, ear: Ear, version: str | None = None, *, server: bool = True, timeout_s: float | None = None
    ) -> tuple[Any, Peer]:
        """The layer, not yet through its handshake, and its peer. server: which side the layer is."""
        ours, theirs = self.pair()
        if server:
            secured = self.tls.Secured(ear, self.contexts.server(version), timeout_s=timeout_s)
            await self.loop.connect_accepted_socket(lambda: secured, ours)
        else:
            secured = self.tls.Secured(ear, self.contexts.client(version), server_hostname=NAME, timeout_s=timeout_s)
            await self.loop.create_connection(lambda: secured, sock=ours)
        other = self.contexts.client(version) if server else self.contexts.server(version)
        return secured, Peer(other, theirs, server=not server)

    async def connect(self, ear: Ear, version: str | None = None, *, server: bool = True) -> tuple[Any, Peer]:
        """Both, through the handshake."""
        secured, peer = await self.begin(ear, version, server=server)
        done = secured.secured()
        await peer.handshake()
        await done
        return secured, peer

    def stop(self) -> None:
        for sock in self.sockets:
            sock.close()


Play = Callable[[Callable[[Stage], Coroutine[Any, Any, None]]], None]


@pytest.fixture
def play(form: Form, contexts: Contexts) -> Play:
    """Runs a scene on a fresh uvloop; nothing may have been reported to the loop."""

    def run(scene: Callable[[Stage], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            stage = Stage(form("tls"), contexts)
            try:
                async with asyncio.timeout(20):
                    await scene(stage)
                await asyncio.sleep(0)
            finally:
                stage.stop()
            assert stage.errors == []

        uvloop.run(main())

    return run


# -- the headers of records


@given(
    lengths=st.lists(st.integers(0, 700), max_size=8),
    cuts=st.lists(st.integers(1, 900), min_size=1, max_size=12),
    form=st.sampled_from(FORMS),
)
def test_records_end_where_they_end_however_they_come(lengths: list[int], cuts: list[int], form: Form) -> None:
    wire = b"".join(struct.pack("!BHH", 23, 0x0303, length) + bytes(length) for length in lengths)
    records = form("tls").Records()
    seen: list[int] = []
    at = turn = 0
    while at < len(wire):
        piece = wire[at : at + cuts[turn % len(cuts)]]
        turn += 1
        start = 0
        while start < len(piece):
            end = records.follow(piece, start)
            assert start < end <= len(piece) and not records.broken
            if records.whole:
                seen.append(records.length)
            else:
                assert end == len(piece)
            start = end
        at += len(piece)
    assert seen == lengths


@given(data=st.binary(max_size=80), cut=st.integers(1, 80))
def test_both_forms_follow_any_bytes_alike_and_whole_or_in_pieces(data: bytes, cut: int) -> None:
    def followed(form: Form, size: int) -> tuple[list[tuple[int, int]], bool]:
        records = form("tls").Records()
        ends: list[tuple[int, int]] = []
        for at in range(0, len(data), size):
            piece, start = data[at : at + size], 0
            while start < len(piece):
                start = records.follow(piece, start)
                if records.broken:
                    return ends, True
                if records.whole:
                    ends.append((at + start, records.length))
        return ends, False

    answers = [followed(form, size) for form in FORMS for size in (len(data) or 1, cut)]
    assert answers.count(answers[0]) == len(answers)


@pytest.mark.parametrize(
    "header",
    [b"HTTP/", b"\x00\x03\x03\x00\x01", b"\x17\x02\x03\x00\x01", b"\x17\x03\x03\x48\x01", b"\x80\x2e\x01\x03\x01"],
)
def test_what_is_no_record_is_said_to_be_none(form: Form, header: bytes) -> None:
    records = form("tls").Records()
    assert records.follow(header + bytes(20), 0) == 25 and records.broken and not records.whole


# -- carrying


@pytest.mark.parametrize("server", [True, False], ids=["accepting", "dialling"])
@pytest.mark.parametrize("cut", [0, 1, 7])
def test_bytes_arrive_however_the_records_are_cut(play: Play, version: str, server: bool, cut: int) -> None:
    pieces = [b"a", b"bc" * 40, b"d" * 3000, b"e"]

    async def scene(stage: Stage) -> None:
        ear = Ear(answer=True)
        _, peer = await stage.connect(ear, version, server=server)
        sent = b"".join(pieces)
        await peer.send(peer.records(*pieces), cut)
        assert await peer.read(len(sent)) == sent
        assert ear.received == sent and ear.told[0] == "made"

    play(scene)


def test_a_handshake_may_come_byte_by_byte_and_data_with_its_end(play: Play, version: str) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        secured, peer = await stage.begin(ear, version)
        done = secured.secured()
        with contextlib.suppress(ssl.SSLWantReadError):
            peer.session.do_handshake()
        hello = peer.outgoing.read()
        await peer.send(hello, 1)
        await peer.call(peer.session.do_handshake)
        # The client's last flight and its first words in one segment.
        await peer.send(peer.outgoing.read() + peer.records(b"early"))
        await done
        await ear.until(lambda: ear.received == b"early")
        assert ear.told == ["made", "data"]

    # In TLS 1.2 the client waits for the server's Finished before it may speak.
    if version == "1.3":
        play(scene)


def test_what_came_with_the_handshake_waits_for_a_protocol_that_does_not_read_yet(play: Play) -> None:
    class Shy(Ear):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.pause_reading()

    async def scene(stage: Stage) -> None:
        ear = Shy()
        secured, peer = await stage.begin(ear, "1.3")
        done = secured.secured()
        await peer.call(peer.session.do_handshake)
        await peer.send(peer.outgoing.read() + peer.records(b"one", b"two"))
        await done
        await peer.send(peer.records(b"three"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert ear.received == b"" and not secured.is_reading()
        later = Ear()
        secured.set_protocol(later)
        assert secured.get_protocol() is later
        secured.resume_reading()
        assert not later.received, "never from within the call"
        await later.until(lambda: later.received == b"onetwothree")

    play(scene)


@pytest.mark.parametrize("server", [True, False], ids=["accepting", "dialling"])
def test_a_reader_that_is_slow_stops_the_writer(play: Play, version: str, server: bool) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        secured, peer = await stage.connect(ear, version, server=server)
        blob = bytes(range(256)) * 4096
        sent = 0
        while "pause" not in ear.told:
            secured.write(blob)
            sent += len(blob)
            assert sent < MUCH, "never told to pause"
        low, high = secured.get_write_buffer_limits()
        assert secured.get_write_buffer_size() > high > low
        assert await peer.read(sent) == blob * (sent // len(blob))
        await ear.until(lambda: ear.told[-1] == "resume")
        assert secured.get_write_buffer_size() <= low

    play(scene)


def test_a_protocol_that_does_not_read_stops_its_peer(play: Play, version: str) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        secured, peer = await stage.connect(ear, version)
        secured.pause_reading()
        assert not secured.is_reading()
        wire = peer.records(*[bytes(16384)] * (MUCH // 16384))
        sending = stage.loop.create_task(peer.send(wire))
        done, _ = await asyncio.wait([sending], timeout=0.3)
        assert not done and not ear.received
        secured.resume_reading()
        await sending
        await ear.until(lambda: len(ear.received) == MUCH)

    play(scene)


def test_pieces_leave_in_order_and_short_ones_too(play: Play, version: str) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        secured, peer = await stage.connect(ear, version)
        long = bytes(range(251)) * 400
        secured.write(b"")
        secured.writelines((b"head", memoryview(long)[5:], b"", bytearray(b"tail")))
        for number in range(500):
            secured.write(b"%d," % number)
        expected = b"head" + long[5:] + b"tail" + b"".join(b"%d," % number for number in range(500))
        assert await peer.read(len(expected)) == expected
        with pytest.raises(TypeError):
            secured.write("text")

    play(scene)


def test_what_a_transport_tells(play: Play, version: str, contexts: Contexts) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        secured, peer = await stage.connect(ear, version, server=False)
        assert secured.get_extra_info("peername") == peer.sock.getsockname()
        assert secured.get_extra_info("socket").fileno() > 0
        assert secured.get_extra_info("ssl_object").version() == f"TLSv{version}"
        assert secured.get_extra_info("ssl_object").server_hostname == NAME
        assert isinstance(secured.get_extra_info("sslcontext"), ssl.SSLContext)
        assert secured.get_extra_info("peercert")["subjectAltName"] == (("DNS", NAME),)
        assert secured.get_extra_info("cipher") == peer.session.cipher()
        assert secured.get_extra_info("nothing", 7) == 7
        assert not secured.can_write_eof()
        with pytest.raises(NotImplementedError):
            secured.write_eof()
        secured.set_write_buffer_limits(high=1000, low=10)
        assert secured.get_write_buffer_limits() == (10, 1000)
        secured.abort()
        await ear.until(ear.is_lost)
        assert secured.get_write_buffer_size() == 0 and secured.get_extra_info("peername", "gone") == "gone"

    play(scene)


def test_alpn_is_known_when_the_protocol_is_connected(play: Play, contexts: Contexts) -> None:
    chosen: list[str | None] = []

    class Asking(Ear):
        def connection_made(self, transport: Any) -> None:
            chosen.append(transport.get_extra_info("ssl_object").selected_alpn_protocol())
            super().connection_made(transport)

    async def scene(stage: Stage) -> None:
        server, client = contexts.server(), contexts.client()
        server.set_alpn_protocols(["h2", "http/1.1"])
        client.set_alpn_protocols(["http/1.1", "h2"])
        ours, theirs = stage.pair()
        secured = stage.tls.Secured(Asking(), server)
        await stage.loop.connect_accepted_socket(lambda: secured, ours)
        await Peer(client, theirs).handshake()
        await secured.secured()

    play(scene)
    assert chosen == ["h2"]


# -- what is said beside the data


@pytest.mark.parametrize("answered", [True, False], ids=["answered", "unasked"])
def test_new_keys_in_the_middle(play: Play, contexts: Contexts, tmp_path: Path, answered: bool) -> None:
    """RFC 8446 section 4.6.3; the ssl module cannot ask for it, ``openssl s_client`` can."""

    async def scene(stage: Stage) -> None:
        ear = Ear(answer=True)
        server = await stage.loop.create_server(lambda: stage.tls.Secured(ear, contexts.server("1.3")), "127.0.0.1", 0)
        async with s_client(server.sockets[0].getsockname()[1], contexts, tmp_path) as talk:
            for round_ in range(3):
                await talk.say(b"before%d\n" % round_)
                await talk.hear(b"before%d" % round_)
                await talk.say(b"K\n" if answered else b"k\n")
                await talk.hear(b"KEYUPDATE")
            await talk.say(b"after\n")
            await talk.hear(b"after")
        await ear.until(ear.is_lost)
        server.close()
        assert b"K" not in ear.received and "after" in ear.received.decode()

    play(scene)


def test_renegotiation_is_refused(play: Play, contexts: Contexts, tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear(answer=True)
        server = await stage.loop.create_server(lambda: stage.tls.Secured(ear, contexts.server("1.2")), "127.0.0.1", 0)
        async with s_client(server.sockets[0].getsockname()[1], contexts, tmp_path) as talk:
            await talk.say(b"before\n")
            await talk.hear(b"before")
            await talk.say(b"R\n")
            await talk.hear(b"no renegotiation")
        await ear.until(ear.is_lost)
        server.close()

    play(scene)


class Talk:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.heard = b""

    async def say(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line)
        await self.process.stdin.drain()

    async def hear(self, what: bytes) -> None:
        assert self.process.stdout is not None
        while what not in self.heard:
            more = await self.process.stdout.read(4096)
            assert more, self.heard
            self.heard += more
        self.heard = self.heard.partition(what)[2]


@contextlib.asynccontextmanager
async def s_client(port: int, contexts: Contexts, folder: Path) -> AsyncIterator[Talk]:
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command is not installed")
    authority = folder / "ca.pem"
    authority.write_bytes(contexts.authority.pem)
    process = await asyncio.create_subprocess_exec(
        "openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-servername", NAME, "-CAfile", str(authority),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    talk = Talk(process)
    try:
        await talk.hear(b"Verify return code: 0 (ok)")
        yield talk
        # Of a process that has ended uvloop says the latter.
        with contextlib.suppress(ConnectionError, RuntimeError):
            await talk.say(b"Q\n")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def test_tickets_are_taken_and_nobody_is_told(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        secured, peer = await stage.connect(ear, "1.3", server=False)
        await peer.send(peer.records(b"data"))
        await ear.until(lambda: ear.received == b"data")
        assert ear.told == ["made", "data"]
        assert secured.get_extra_info("ssl_object").session.has_ticket

    play(scene)


def test_a_peer_that_only_sends_empty_records_is_cut_off(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        _, peer = await stage.connect(ear, "1.2")
        with contextlib.suppress(OSError):
            for _ in range(400):
                await peer.send(b"\x16\x03\x03\x00\x00")
        await ear.until(ear.is_lost)
        assert isinstance(ear.lost, OSError)

    play(scene)


def test_a_peer_that_does_nothing_but_change_its_keys_is_cut_off(
    play: Play, contexts: Contexts, tmp_path: Path
) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear(answer=True)
        server = await stage.loop.create_server(lambda: stage.tls.Secured(ear, contexts.server("1.3")), "127.0.0.1", 0)
        async with s_client(server.sockets[0].getsockname()[1], contexts, tmp_path) as talk:
            for _ in range(64):
                await talk.say(b"K\n")
                await talk.hear(b"KEYUPDATE")
            await talk.say(b"alive\n")
            await talk.hear(b"alive")
            assert "lost" not in ear.told
            for _ in range(65):
                await talk.say(b"K\n")
                await talk.hear(b"KEYUPDATE")
            await ear.until(ear.is_lost)
        server.close()
        assert isinstance(ear.lost, ConnectionAbortedError)

    play(scene)


# -- the end


def test_a_close_notify_is_the_end_and_is_answered(play: Play, version: str) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        secured, peer = await stage.connect(ear, version)
        wire = peer.records(b"last words")
        with contextlib.suppress(ssl.SSLWantReadError):
            peer.session.unwrap()
        await peer.send(wire + peer.outgoing.read())
        await ear.until(ear.is_lost)
        assert ear.told == ["made", "data", "eof", "lost"] and ear.received == b"last words" and ear.lost is None
        await peer.call(peer.session.unwrap)
        assert await stage.loop.sock_recv(peer.sock, 1) == b""
        assert secured.is_closing()

    play(scene)


@pytest.mark.parametrize("cut", ["between records", "within a record"])
def test_an_end_without_close_notify_is_a_loss_and_no_end(play: Play, version: str, cut: str) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        _, peer = await stage.connect(ear, version)
        wire = peer.records(b"some", b"more")
        await peer.send(wire if cut == "between records" else wire[:-3])
        peer.sock.shutdown(socket.SHUT_WR)
        await ear.until(ear.is_lost)
        assert ear.told == ["made", "data", "lost"]
        assert bytes(ear.received) == (b"somemore" if cut == "between records" else b"some")

    play(scene)


@pytest.mark.parametrize("goodbye", [True, False], ids=["close_notify", "cut off"])
def test_a_body_that_ends_with_its_connection_is_complete_only_after_a_close_notify(
    play: Play, form: Form, version: str, goodbye: bool
) -> None:
    async def origin(stage: Stage, listener: socket.socket) -> None:
        sock, _ = await stage.loop.sock_accept(listener)
        peer = Peer(stage.contexts.server(version), sock, server=True)
        await peer.handshake()
        await peer.call(partial(peer.session.read, 65536))
        wire = peer.records(b"HTTP/1.1 200 OK\r\n\r\nhello")
        if goodbye:
            with contextlib.suppress(ssl.SSLWantReadError):
                peer.session.unwrap()
        await peer.send(wire + peer.outgoing.read())
        sock.close()

    async def scene(stage: Stage) -> None:
        world = World(form("relay"))
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)
        stage.sockets.append(listener)
        serving = stage.loop.create_task(origin(stage, listener))

        async def dial() -> Any:
            upstream = world.relay.Upstream(world.pool, KEY)
            secured = stage.tls.Secured(upstream, stage.contexts.client(version), server_hostname=NAME)
            await stage.loop.create_connection(lambda: secured, *listener.getsockname())
            await secured.secured()
            return upstream

        world.dial = dial  # type: ignore[method-assign]
        try:
            await world.start(lambda reader, writer: asyncio.sleep(0))
            reader, _ = await ask(world, get())
            await world.until(lambda: bool(world.ended))
            assert world.ended[0].completed is goodbye
            assert world.ended[0].error == ("" if goodbye else "upstream_closed")
            if goodbye:
                assert (await reader.readuntil(b"0\r\n\r\n")).endswith(b"\r\nhello\r\n0\r\n\r\n")
        finally:
            await serving
            await world.stop()

    play(scene)


def test_close_sends_all_that_was_written_and_then_says_goodbye(play: Play, version: str) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        secured, peer = await stage.connect(ear, version)
        blob = bytes(MUCH)
        secured.write(blob)
        secured.close()
        secured.close()
        secured.write(b"too late")
        secured.writelines([b"too late"])
        assert secured.is_closing() and secured.get_write_buffer_size() > 0
        # It still talks while it is being told: that must not reset what it has not read.
        await peer.send(peer.records(b"never mind"))
        assert await peer.read(MUCH + 1) == blob
        peer.session.unwrap()
        assert await stage.loop.sock_recv(peer.sock, 1) == b"", "the end of the connection follows that of TLS"
        assert "lost" not in ear.told
        peer.sock.close()
        await ear.until(ear.is_lost)
        assert ear.lost is None and not ear.received

    play(scene)


def test_a_peer_that_goes_on_and_on_after_the_goodbye_is_cut_off(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        secured, peer = await stage.connect(ear)
        secured.close()
        with pytest.raises(ConnectionError):
            await peer.send(peer.records(*[bytes(16384)] * 1000))
        await ear.until(ear.is_lost)

    play(scene)


def test_a_peer_that_never_ends_its_side_is_cut_off_in_time(
    play: Play, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form.compiled:
        pytest.skip("the time is a constant of the compiled form")
    monkeypatch.setattr(form("tls"), "_LINGER_S", 0.05)

    async def scene(stage: Stage) -> None:
        for unread in (0, MUCH):
            ear = Ear()
            secured, _ = await stage.connect(ear)
            secured.write(bytes(unread))
            secured.close()
            await ear.until(ear.is_lost)

    play(scene)


def test_abort_says_nothing_more(play: Play, version: str) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        secured, peer = await stage.connect(ear, version)
        secured.abort()
        secured.abort()
        secured.close()
        secured.write(b"x")
        secured.pause_reading()
        secured.resume_reading()
        assert secured.is_closing()
        await ear.until(lambda: ear.told == ["made", "lost"])
        with pytest.raises(ConnectionError):
            await peer.read(1)

    play(scene)


def test_records_that_were_tampered_with_end_it_with_an_alert(play: Play, version: str) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        _, peer = await stage.connect(ear, version)
        good, bad = peer.records(b"good"), bytearray(peer.records(b"evil"))
        bad[-1] ^= 1
        await peer.send(good + bad + peer.records(b"more"))
        await ear.until(ear.is_lost)
        assert ear.received == b"good" and "eof" not in ear.told
        assert isinstance(ear.lost, ssl.SSLError) and "BAD_RECORD_MAC" in str(ear.lost).upper().replace(" ", "_")
        with pytest.raises(ssl.SSLError, match="(?i)bad.record.mac"):
            await peer.read(1)

    play(scene)


def test_bytes_that_are_no_tls_end_it(play: Play, version: str) -> None:
    async def scene(stage: Stage) -> None:
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", GARBAGE, b"\x17\x03\x03\xff\xff", b"\x17\x03\x03\x00\x00"):
            ear = Ear()
            _, peer = await stage.connect(ear, version)
            await peer.send(peer.records(b"fine") + garbage)
            peer.sock.shutdown(socket.SHUT_WR)
            await ear.until(ear.is_lost)
            assert ear.received == b"fine" and "eof" not in ear.told

    play(scene)


def test_a_connection_leaves_nothing_behind(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        secured, peer = await stage.connect(ear)
        gone = weakref.ref(secured)
        peer.sock.close()
        await ear.until(ear.is_lost)
        ear.transport = None
        del secured
        await asyncio.sleep(0)
        gc.collect()
        assert gone() is None

    play(scene)


# -- handshakes that fail


Fails = Callable[[Stage, Peer], Awaitable[None]]


async def _leave(stage: Stage, peer: Peer) -> None:
    peer.sock.shutdown(socket.SHUT_WR)


async def _talk_http(stage: Stage, peer: Peer) -> None:
    await peer.send(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


async def _break_off(stage: Stage, peer: Peer) -> None:
    await peer.send(b"\x15\x03\x03\x00\x02\x02\x28")


@pytest.mark.parametrize(
    ("what", "error", "text"),
    [
        (_leave, ConnectionResetError, "closed during the TLS handshake"),
        (_talk_http, ssl.SSLError, "WRONG_VERSION_NUMBER"),
        (_break_off, ssl.SSLError, "HANDSHAKE_FAILURE"),
    ],
    ids=["leaves", "speaks HTTP", "alert"],
)
def test_who_waits_for_the_handshake_hears_why_it_failed(
    play: Play, what: Fails, error: type[OSError], text: str
) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        secured, peer = await stage.begin(ear, server=False)
        done = secured.secured()
        await what(stage, peer)
        with pytest.raises(error, match=text):
            await done
        with pytest.raises(error, match=text):
            await secured.secured()
        assert ear.told == [] and secured.is_closing()

    play(scene)


def test_a_certificate_that_does_not_verify(play: Play, version: str) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        ours, theirs = stage.pair()
        secured = stage.tls.Secured(ear, Contexts().client(version), server_hostname=NAME)
        await stage.loop.create_connection(lambda: secured, sock=ours)
        done = secured.secured()
        peer = Peer(stage.contexts.server(version), theirs, server=True)
        with pytest.raises(ssl.SSLError, match="UNKNOWN_CA"):  # it is told
            await peer.handshake()
            await peer.read(1)
        with pytest.raises(ssl.SSLCertVerificationError) as caught:
            await done
        assert caught.value.verify_message == "unable to get local issuer certificate"
        assert ear.told == []

    play(scene)


def test_a_name_that_the_certificate_does_not_have(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        ours, theirs = stage.pair()
        secured = stage.tls.Secured(Ear(), stage.contexts.client(), server_hostname="other.test")
        await stage.loop.create_connection(lambda: secured, sock=ours)
        done = secured.secured()
        peer = Peer(stage.contexts.server(), theirs, server=True)
        with contextlib.suppress(OSError):
            await peer.handshake()
        with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch.*'other.test'"):
            await done

    play(scene)


def test_a_handshake_that_takes_too_long(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        secured, peer = await stage.begin(ear, timeout_s=0.05)
        await peer.send(b"\x16\x03\x01")
        with pytest.raises(ConnectionAbortedError, match=r"SSL handshake is taking longer than 0\.05 seconds"):
            await secured.secured()
        assert ear.told == []

    play(scene)


def test_a_handshake_in_time_stops_its_clock(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear(answer=True)
        secured, peer = await stage.begin(ear, timeout_s=0.3)
        done = secured.secured()
        await peer.handshake()
        await done
        await asyncio.sleep(0.4)
        await peer.send(peer.records(b"still here"))
        assert await peer.read(10) == b"still here"

    play(scene)


def test_nobody_waits_any_more(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        secured, peer = await stage.begin(Ear())
        waiting = secured.secured()
        waiting.cancel()
        secured.close()
        with pytest.raises(ConnectionError):
            await peer.handshake()

    play(scene)


# -- with the standard library's own sockets


def _exchange(sock: ssl.SSLSocket, blob: bytes) -> bytes:
    """Writes ``blob`` and reads as much, whichever is possible: one thread, for OpenSSL's connections are for one."""
    sock.setblocking(False)
    unsent = memoryview(blob)
    got = bytearray()
    while len(got) < len(blob):
        moved = False
        with contextlib.suppress(ssl.SSLWantWriteError, ssl.SSLWantReadError):
            if unsent:
                unsent = unsent[sock.send(unsent[:65536]) :]
                moved = True
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
            piece = sock.recv(65536)
            assert piece, "ended early"
            got += piece
            moved = True
        if not moved:
            select.select([sock], [sock] if unsent else [], [], 10)
    return bytes(got)


@pytest.mark.parametrize("kibibytes", [1, 64, 3000])
def test_an_echo_to_blocking_clients(play: Play, contexts: Contexts, version: str, kibibytes: int) -> None:
    blob = bytes(range(256)) * 4 * kibibytes

    def client(port: int, found: list[bytes]) -> None:
        with (
            socket.create_connection(("127.0.0.1", port)) as plain,
            contexts.client(version).wrap_socket(plain, server_hostname=NAME) as sock,
        ):
            found.append(_exchange(sock, blob))

    async def scene(stage: Stage) -> None:
        class Echo(Ear):
            """Reads no more than it can write."""

            def pause_writing(self) -> None:
                self.transport.pause_reading()

            def resume_writing(self) -> None:
                self.transport.resume_reading()

        context = contexts.server(version)
        server = await stage.loop.create_server(lambda: stage.tls.Secured(Echo(answer=True), context), "127.0.0.1", 0)
        found: list[bytes] = []
        port = server.sockets[0].getsockname()[1]
        await asyncio.gather(*[asyncio.to_thread(client, port, found) for _ in range(3)])
        server.close()
        assert found == [blob] * 3

    play(scene)
