"""Plain connections: what asyncio promises of a transport, by the compiled ones and by the event loop's own."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from .conftest import FORMS, Form
from .ear import Ear

# More than the kernel takes for a loopback connection that nobody reads.
MUCH = bytes(range(256)) * 65536

Scene = Callable[["Stage"], Awaitable[None]]


class Stage:
    """A running loop, the module under test and whatever was opened."""

    def __init__(self, wire: ModuleType) -> None:
        self.wire = wire
        self.loop = asyncio.get_running_loop()
        self.errors: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.errors.append(context))
        self._open: list[socket.socket] = []

    async def pair(self, ear: asyncio.Protocol, *, small: bool = False) -> socket.socket:
        """The other end of a TCP connection that ``ear`` is attached to. small: with little room in the kernel."""
        near, far = _connected(small)
        self._open.append(far)
        await self.wire.attach(ear, near)
        return far

    async def read(self, sock: socket.socket, size: int) -> bytes:
        """Exactly ``size`` bytes, or fewer at the end."""
        got = bytearray()
        while len(got) < size:
            piece = await self.loop.sock_recv(sock, min(size - len(got), 1 << 18))
            if not piece:
                break
            got += piece
        return bytes(got)

    async def send(self, sock: socket.socket, data: bytes) -> None:
        await self.loop.sock_sendall(sock, data)

    def close(self) -> None:
        for sock in self._open:
            sock.close()


def _connected(small: bool = False) -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        far = socket.socket()
        if small:
            far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        far.connect(server.getsockname())
        near, _ = server.accept()
    if small:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    far.setblocking(False)
    return near, far


def _reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


Play = Callable[[Scene], None]


@pytest.fixture(params=[uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])
def play(form: Form, request: pytest.FixtureRequest) -> Play:
    """Runs a scene, and sees that nothing it did not expect went wrong."""

    def run(scene: Scene, *, errors: int = 0) -> None:
        async def whole() -> None:
            stage = Stage(form("wire"))
            try:
                await asyncio.wait_for(scene(stage), 30)
                assert len(stage.errors) == errors, stage.errors
            finally:
                stage.close()

        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(whole())

    return run


def test_what_is_said_arrives(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear(answer=True)
        far = await stage.pair(ear)
        for data in (b"a", b"bc" * 500, b"d" * 70000):
            await stage.send(far, data)
            assert await stage.read(far, len(data)) == data
        far.shutdown(socket.SHUT_WR)
        assert await stage.read(far, 1) == b""
        await ear.heard("lost")
        assert ear.told == ["made", "data", "eof", "lost"] and ear.lost is None

    play(scene)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@settings(max_examples=30, deadline=None)
@given(pieces=st.lists(st.binary(max_size=100_000), max_size=70), together=st.booleans(), kind=st.integers(0, 2))
def test_pieces_of_any_size_keep_their_order(form: Form, pieces: list[bytes], together: bool, kind: int) -> None:
    async def scene() -> None:
        stage = Stage(form("wire"))
        ear = Ear()
        far = await stage.pair(ear, small=True)
        shaped: list[Any] = [(bytes, bytearray, memoryview)[kind](piece) for piece in pieces]
        whole = b"".join(pieces)
        if together:
            ear.transport.writelines(shaped)
        else:
            for piece in shaped:
                ear.transport.write(piece)
        for piece in shaped:
            if isinstance(piece, bytearray) and form.compiled:  # uvloop's own transports would send what it is then
                piece[:] = b"x" * len(piece)  # its owner may use it for something else
        ear.transport.close()
        assert await stage.read(far, len(whole) + 1) == whole
        await ear.heard("lost")
        assert not stage.errors
        stage.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scene())


def test_a_writer_is_told_when_to_wait_and_when_to_go_on(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        far = await stage.pair(ear)
        ear.transport.set_write_buffer_limits(high=50_000, low=10_000)
        assert tuple(ear.transport.get_write_buffer_limits()) == (10_000, 50_000)
        ear.transport.write(MUCH)
        await ear.heard("pause")
        assert ear.transport.get_write_buffer_size() > 50_000
        assert await stage.read(far, len(MUCH)) == MUCH
        await ear.heard("resume")
        assert ear.told == ["made", "pause", "resume"]
        await ear.until(lambda: ear.transport.get_write_buffer_size() == 0)

    play(scene)


def test_nonsensical_limits(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        await stage.pair(ear)
        with pytest.raises(ValueError, match="must be >= low"):
            ear.transport.set_write_buffer_limits(high=1, low=2)

    play(scene)


def test_who_pauses_receives_nothing(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        far = await stage.pair(ear)
        ear.transport.pause_reading()
        assert not ear.transport.is_reading()
        await stage.send(far, b"early")
        far.shutdown(socket.SHUT_WR)
        other = Ear(answer=True)
        probe = await stage.pair(other)
        await stage.send(probe, b"x")  # a round trip later, nothing has come
        assert await stage.read(probe, 1) == b"x" and ear.told == ["made"]
        ear.transport.resume_reading()
        await ear.heard("lost")
        assert ear.received == b"early" and ear.told == ["made", "data", "eof", "lost"]

    play(scene)


def test_a_protocol_that_pauses_at_once_is_given_nothing(form: Form) -> None:
    """The loop's own transports may give one piece; what is promised holds for the compiled ones."""
    if not form.compiled:
        pytest.skip("event loops may start to read only after connection_made")

    class Shy(Ear):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.transport.pause_reading()

    async def scene() -> None:
        stage = Stage(form("wire"))
        near, far = _connected()
        far.sendall(b"hello")
        shy = Shy()
        await stage.wire.attach(shy, near)
        for _ in range(5):
            await asyncio.sleep(0)
        assert shy.told == ["made"]
        shy.transport.resume_reading()
        await shy.got(b"hello")
        shy.transport.close()
        await shy.heard("lost")
        far.close()

    asyncio.run(scene())


def test_half_closed_by_the_peer(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear(keep=True)
        far = await stage.pair(ear)
        await stage.send(far, b"question")
        far.shutdown(socket.SHUT_WR)
        await ear.heard("eof")
        ear.transport.resume_reading()  # changes nothing
        ear.transport.write(b"answer")
        assert await stage.read(far, 6) == b"answer"
        ear.transport.write_eof()
        assert await stage.read(far, 1) == b""
        await asyncio.sleep(0.02)  # both directions have ended, and only close() ends the connection
        assert ear.told == ["made", "data", "eof"]
        ear.transport.close()
        await ear.heard("lost")

    play(scene)


def test_half_closed_by_us_after_what_was_written(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        far = await stage.pair(ear)
        assert ear.transport.can_write_eof()
        ear.transport.write(MUCH)
        ear.transport.write_eof()
        assert await stage.read(far, len(MUCH) + 1) == MUCH
        await stage.send(far, b"still heard")
        await ear.got(b"still heard")
        with pytest.raises(RuntimeError, match="after write_eof"):
            ear.transport.write(b"more")
        far.close()
        await ear.heard("lost")

    play(scene)


def test_close_sends_what_was_written(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        far = await stage.pair(ear)
        ear.transport.write(MUCH)
        ear.transport.close()
        assert ear.transport.is_closing()
        assert await stage.read(far, len(MUCH) + 1) == MUCH
        await ear.heard("lost")
        assert ear.lost is None

    play(scene)


def test_abort_sends_nothing_more(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        far = await stage.pair(ear)
        ear.transport.write(MUCH)
        ear.transport.abort()
        ear.transport.abort()
        assert "lost" not in ear.told  # never from inside the call
        await ear.heard("lost")
        with contextlib.suppress(ConnectionResetError):
            assert len(await stage.read(far, len(MUCH))) < len(MUCH)

    play(scene)


def test_a_reset_is_told_as_one(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        _reset(await stage.pair(ear))
        await ear.heard("lost")
        assert isinstance(ear.lost, ConnectionResetError) and "eof" not in ear.told

    play(scene)


def test_writing_to_who_is_gone(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear(keep=True)
        far = await stage.pair(ear)
        far.close()
        await ear.heard("eof")
        while "lost" not in ear.told:
            if not ear.transport.is_closing():
                ear.transport.write(b"x" * 1000)
            await asyncio.sleep(0)
        assert isinstance(ear.lost, ConnectionError)

    play(scene)


def test_what_was_said_before_a_reset_is_heard(form: Form) -> None:
    """An upstream that refuses a body early: writing fails before its answer was read."""
    if not form.compiled:
        pytest.skip("event loops give up a connection when writing to it fails")

    async def scene() -> None:
        stage = Stage(form("wire"))
        ear = Ear()
        far = await stage.pair(ear)
        ear.transport.write(b"a request that is never read")
        far.setblocking(True)
        far.sendall(b"413 no")
        far.close()  # with something unread: a reset follows what was sent
        # Nothing was received yet, because the loop had no turn.
        for _ in range(3):
            ear.transport.write(b"x" * 1000)
        assert ear.received == b""
        await ear.heard("lost")
        assert ear.received == b"413 no" and isinstance(ear.lost, ConnectionError)
        assert not stage.errors

    asyncio.run(scene())


def test_paused_and_unwritable_ends(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        far = await stage.pair(ear)
        ear.transport.pause_reading()
        _reset(far)
        while "lost" not in ear.told:
            ear.transport.write(b"x")
            await asyncio.sleep(0.001)
        assert isinstance(ear.lost, ConnectionError)

    play(scene)


def test_another_protocol_takes_over(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        first, second = Ear(), Ear(answer=True)
        far = await stage.pair(first)
        second.transport = first.transport
        first.transport.set_protocol(second)
        assert first.transport.get_protocol() is second
        await stage.send(far, b"for the second")
        assert await stage.read(far, 14) == b"for the second"
        second.transport.close()
        await second.heard("lost")
        assert first.told == ["made"]

    play(scene)


def test_facts(form: Form, play: Play) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        far = await stage.pair(ear)
        transport = ear.transport
        assert transport.get_extra_info("peername") == far.getsockname()
        assert transport.get_extra_info("sockname") == far.getpeername()
        sock = transport.get_extra_info("socket")
        assert sock.getpeername() == far.getsockname()
        assert not form.compiled or sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        assert transport.get_extra_info("ssl_object") is None
        assert transport.get_extra_info("nothing", "default") == "default"

    play(scene)


def test_a_duplicate_of_the_socket_outlives_the_transport(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        ear = Ear()
        far = await stage.pair(ear)
        copy = socket.socket(fileno=os.dup(ear.transport.get_extra_info("socket").fileno()))
        ear.transport.close()
        await ear.heard("lost")
        await stage.send(far, b"to the copy")
        assert await stage.read(copy, 11) == b"to the copy"
        assert ear.received == b""
        copy.close()

    play(scene)


class Bad(Ear):
    def data_received(self, data: bytes) -> None:
        raise ZeroDivisionError("a defect")


def test_a_protocol_that_fails_loses_its_connection_only(play: Any) -> None:
    async def scene(stage: Stage) -> None:
        good, bad = Ear(answer=True), Bad()
        well, ill = await stage.pair(good), await stage.pair(bad)
        await stage.send(ill, b"x")
        await stage.send(well, b"y")
        await bad.heard("lost")
        assert isinstance(bad.lost, ZeroDivisionError)
        assert await stage.read(well, 1) == b"y"
        assert await stage.read(ill, 1) == b""
        assert isinstance(stage.errors[0]["exception"], ZeroDivisionError)

    play(scene, errors=1)


# -- listening and dialling


async def _listening(stage: Stage, factory: Callable[[], asyncio.Protocol]) -> tuple[Any, tuple[str, int]]:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return await stage.wire.listen(factory, sock, 128), sock.getsockname()


def test_many_connections_at_once(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        ears: list[Ear] = []

        def factory() -> Ear:
            ears.append(Ear(answer=True))
            return ears[-1]

        listener, (host, port) = await _listening(stage, factory)
        dialled = await asyncio.gather(*[stage.wire.dial(Ear, host, port) for _ in range(300)])
        for at, (transport, _) in enumerate(dialled):
            transport.write(b"%d" % at)
        for at, (_, ear) in enumerate(dialled):
            await ear.got(b"%d" % at)
        for transport, _ in dialled:
            transport.close()
        await asyncio.gather(*[ear.heard("lost") for ear in ears])
        await asyncio.gather(*[ear.heard("lost") for _, ear in dialled])
        listener.close()
        assert len(ears) == 300

    play(scene)


def test_a_closed_listener_accepts_no_more_and_keeps_what_it_has(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        listener, (host, port) = await _listening(stage, lambda: Ear(answer=True))
        transport, ear = await stage.wire.dial(Ear, host, port)
        transport.write(b"a")
        await ear.got(b"a")
        listener.close()
        listener.close()
        await asyncio.sleep(0)
        with pytest.raises(ConnectionRefusedError):
            await stage.wire.dial(Ear, host, port)
        transport.write(b"b")
        await ear.got(b"ab")
        transport.abort()
        await ear.heard("lost")

    play(scene)


def test_nobody_there(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            with pytest.raises(ConnectionRefusedError):
                await stage.wire.dial(Ear, *sock.getsockname())

    play(scene)


def test_dialling_is_given_up(form: Form, play: Play) -> None:
    async def scene(stage: Stage) -> None:
        with socket.socket() as deaf, contextlib.ExitStack() as waiting:
            deaf.bind(("127.0.0.1", 0))
            deaf.listen(0)
            for _ in range(4):  # as many as the backlog takes, and more: the next one is not answered
                sock = waiting.enter_context(socket.socket())
                sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    sock.connect(deaf.getsockname())
            before = set(os.listdir("/proc/self/fd"))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await stage.wire.dial(Ear, *deaf.getsockname())
            await asyncio.sleep(0)
            # uvloop leaves the descriptor to the garbage collector.
            assert not form.compiled or set(os.listdir("/proc/self/fd")) <= before

    play(scene)


def test_internet_protocol_6(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        sock = socket.socket(socket.AF_INET6)
        try:
            sock.bind(("::1", 0))
        except OSError as error:
            sock.close()
            pytest.skip(f"no IPv6 here: {error}")
        listener = await stage.wire.listen(lambda: Ear(answer=True), sock, 8)
        transport, ear = await stage.wire.dial(Ear, "::1", sock.getsockname()[1])
        transport.write(b"six")
        await ear.got(b"six")
        transport.close()
        await ear.heard("lost")
        listener.close()

    play(scene)


def test_a_factory_that_fails_is_reported(form: Form) -> None:
    if not form.compiled:
        pytest.skip("event loops differ in what they do then")

    async def scene() -> None:
        stage = Stage(form("wire"))
        good = Ear(answer=True)
        failing = [True]

        def factory() -> Ear:
            if failing.pop():
                raise ZeroDivisionError
            return good

        failing.insert(0, False)
        listener, (host, port) = await _listening(stage, factory)
        refused, first = await stage.wire.dial(Ear, host, port)
        await first.heard("lost")
        transport, ear = await stage.wire.dial(Ear, host, port)
        transport.write(b"x")
        await ear.got(b"x")
        assert len(stage.errors) == 1
        listener.close()
        transport.close()
        await ear.heard("lost")
        await good.heard("lost")
        assert refused.is_closing()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scene())


@contextlib.contextmanager
def _without_descriptors() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    # A new one has the lowest number that is free.
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_without_descriptors_the_others_wait(form: Form) -> None:
    if not form.compiled:
        pytest.skip("uvloop's own way is to drop the connection")

    async def scene() -> None:
        stage = Stage(form("wire"))
        listener, address = await _listening(stage, lambda: Ear(answer=True))
        with socket.socket() as far:
            far.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                far.connect(address)
            with _without_descriptors():
                async with asyncio.timeout(30):
                    while not stage.errors:
                        await asyncio.sleep(0.001)
            await stage.send(far, b"patience")
            assert await stage.read(far, 8) == b"patience"
        assert "out of system resource" in stage.errors[0]["message"]
        listener.close()
        await asyncio.sleep(0.01)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scene())


def test_descriptors_do_not_outlive_the_loop(form: Form) -> None:
    if not form.compiled:
        pytest.skip("event loops warn of it and leave it to the garbage collector")
    before = set(os.listdir("/proc/self/fd"))

    async def scene() -> None:
        stage = Stage(form("wire"))
        listener, (host, port) = await _listening(stage, lambda: Ear(answer=True))
        transport, ear = await stage.wire.dial(Ear, host, port)
        transport.write(b"x")
        await ear.got(b"x")
        listener.close()
        # What is open stays open: the loop ends first.

    for factory in (uvloop.new_event_loop, asyncio.new_event_loop):
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(scene())
        del runner
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) <= before
