"""What controller and workers are made of: frames, sockets, orders, notifications, and what a reload compares."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from creto_hotpath.journal import Journal
from creto_proxy import tls
from creto_proxy.audit import encode
from creto_proxy.errors import ConfigError
from creto_proxy.model import Outcome
from creto_proxy.replay import Replay
from creto_proxy.testing import make_config, make_outcome, make_request
from creto_proxy.workers import channel, handover, listeners
from creto_proxy.workers.channel import BadFrame, Channel, frame, take
from creto_proxy.workers.handover import Handover, Inherited
from creto_proxy.workers.notify import notify
from creto_proxy.workers.order import HELD, taken, written
from creto_proxy.workers.process import Process, adopted
from creto_proxy.workers.reload import Footing
from creto_proxy.workers.rundir import RunDirectory, remove_leftovers

from .test_replay import Keeping

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


class TestFrames:
    @given(st.lists(st.dictionaries(st.text(), VALUES, max_size=4), max_size=4), st.data())
    def test_messages_come_out_as_they_went_in_however_they_are_cut(
        self, said: list[dict[str, object]], data: st.DataObject
    ) -> None:
        messages = [{**each, "say": "x"} for each in said]
        wire = b"".join(frame(message) for message in messages)
        cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=5)))
        received, heard = bytearray(), []
        for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
            received += wire[start:end]
            while (message := take(received)) is not None:
                heard.append(message)
        assert heard == messages and not received

    @given(st.binary(max_size=200))
    def test_garbage_is_a_message_or_refused_and_never_anything_else(self, wire: bytes) -> None:
        received = bytearray(wire)
        try:
            while (message := take(received)) is not None:
                assert isinstance(message["say"], str)
        except BadFrame:
            return
        assert len(received) < 4 or int.from_bytes(received[:4], "big") > len(received) - 4

    def test_a_length_beyond_any_message_is_refused_before_it_is_waited_for(self) -> None:
        with pytest.raises(BadFrame, match="bytes long"):
            take(bytearray((channel.MAX_FRAME + 1).to_bytes(4, "big")))


async def test_a_conversation_is_taken_up_in_the_middle_of_a_message() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    heard: list[str] = []
    lost: list[object] = []
    loop = asyncio.get_running_loop()
    first = Channel(lambda _, message: heard.append(message["say"]), lost.append)
    await loop.create_unix_connection(lambda: first, sock=ours)
    half = frame({"say": "two"})
    theirs.sendall(frame({"say": "one"}) + half[:5])
    while not heard:
        await asyncio.sleep(0.001)
    fd, received = first.detach()
    second = Channel(lambda _, message: heard.append(message["say"]), lost.append, received)
    await loop.create_unix_connection(lambda: second, sock=socket.socket(fileno=fd))
    theirs.sendall(half[5:])
    while len(heard) < 2:
        await asyncio.sleep(0.001)
    theirs.close()
    while not lost:
        await asyncio.sleep(0.001)
    assert heard == ["one", "two"] and lost == [second]


def test_the_control_socket_is_private_however_deep_it_lies(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 100) / ("e" * 100)
    directory.mkdir(parents=True)
    with channel.bind(directory / "control.sock") as sock:
        assert stat.S_IMODE((directory / "control.sock").stat().st_mode) == 0o600
        with pytest.raises(TimeoutError):  # it is connected to, and nobody answers yet
            channel.call(directory / "control.sock", "status", 0.05)
        sock.setblocking(True)
        peer, _ = sock.accept()
        with peer:
            assert channel.same_user(peer)


class TestListeners:
    @pytest.fixture
    def opened(self) -> Iterator[list[listeners.Listener]]:
        held: list[listeners.Listener] = []
        yield held
        listeners.close(held)

    def test_every_worker_has_a_socket_of_its_own_at_one_address(self, opened: list[listeners.Listener]) -> None:
        config = make_config({"listen": {"explicit": "127.0.0.1:0"}, "sidecar": {"workers": 3}})
        opened += listeners.open_listeners(config)
        (listener,) = opened
        assert len({sock.getsockname() for sock in listener.sockets}) == 1
        shares = [listener.of_slot(slot, 3) for slot in range(3)]
        assert [len(share) for share in shares] == [1, 1, 1]
        assert [len(listener.of_slot(slot, 2)) for slot in range(2)] == [2, 1], "with fewer workers none is left alone"

    def test_an_address_that_somebody_else_has_is_refused_even_by_reuseport(
        self, opened: list[listeners.Listener]
    ) -> None:
        opened += listeners.open_listeners(make_config({"listen": {"explicit": "127.0.0.1:0"}}))
        taken_ = opened[0].address
        with pytest.raises(ConfigError, match="address already in use"):
            listeners.open_listeners(make_config({"listen": {"explicit": taken_}}))

    def test_what_was_inherited_stays_at_its_address_and_grows(self, opened: list[listeners.Listener]) -> None:
        one = make_config({"listen": {"explicit": "127.0.0.1:0"}})
        opened += listeners.open_listeners(one)
        inherited = {opened[0].key: [sock.fileno() for sock in opened[0].sockets]}
        more = replace(one, sidecar=one.sidecar.model_copy(update={"workers": 3}))
        grown = listeners.open_listeners(more, inherited)
        opened += grown
        assert grown[0].address == opened[0].address and len(grown[0].sockets) == 3
        accepting = [sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for sock in grown[0].sockets]
        assert accepting == [1, 0, 0], "new ones take connections once there is a worker for them"


def test_a_ca_is_the_same_one_in_every_process_of_a_run() -> None:
    first = tls.CertificateAuthority()
    second = tls.CertificateAuthority(exported=first.export())
    assert second.pem == first.pem
    second.leaf("api.example.com").verify_directly_issued_by(first._certificate)
    assert second.context("api.example.com") is not None
    with pytest.raises(ValueError):
        tls.CertificateAuthority(exported=first.export()[:40])


def test_what_is_handed_over_comes_out_as_it_went_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = socket.socketpair()
    with left, right:
        fd = left.fileno()
        worker = Inherited(0, 3, 4711, 2, "ready", 1.5, "run.w3", fd, fd, b"half")
        given_ = Handover("reload", "run", 1.0, 2, 2, 3, 1, 4, fd, fd, fd, b"key", b"config", {"reverse x": [fd]}, [worker])
        executed: dict[str, str] = {}
        monkeypatch.setattr(os, "execve", lambda _, __, environ: executed.update(environ))
        handover.give(given_)
        assert os.get_inheritable(fd)
        assert handover.accept(executed) == given_
        assert handover.VARIABLE not in executed and not os.get_inheritable(fd)
        assert handover.accept(executed) is None

        def missing(*_: object) -> None:
            raise FileNotFoundError(2, "gone")

        monkeypatch.setattr(os, "execve", missing)
        with pytest.raises(OSError, match="gone"):
            handover.give(given_)
        assert not os.get_inheritable(fd), "no worker that is started now may get it"
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)


async def test_a_worker_that_has_closed_its_end_and_still_runs_is_handed_over_to_be_reaped() -> None:
    """It takes a moment from the one to the other, and the next image is its parent."""
    link, its_link = socket.socketpair()
    link.setblocking(False)
    reads, writes = os.pipe()
    child = os.posix_spawn("/bin/sh", ["sh", "-c", "read line"], {}, file_actions=[(os.POSIX_SPAWN_DUP2, reads, 0)])
    os.close(reads)
    worker = Process(0, 3, child, 2, "run.w3", -1, state="draining")
    await worker.connect(link, lambda *_: None)
    its_link.close()
    while worker.channel._transport is not None:
        await asyncio.sleep(0.001)
    given_ = worker.handed_over()
    assert (given_.pid, given_.serial, given_.state, given_.received) == (child, 3, "draining", b"")
    again = await adopted(given_, lambda *_: None)
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    again.watch(lambda _, status: ended.set_result(status))
    os.write(writes, b"now\n")
    os.close(writes)
    assert await ended == 0
    assert again.ended


def test_what_is_written_for_a_worker_is_read_once_and_is_in_no_directory() -> None:
    fd = written(b"secret" * 10_000, "test")
    assert taken(fd) == b"secret" * 10_000
    with pytest.raises(OSError):
        os.fstat(fd)


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = f"@creto-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0", 1))
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        notify("READY=1", "STATUS=serves")
        assert manager.recv(100) == b"READY=1\nSTATUS=serves"


def test_a_reload_sees_what_a_named_file_holds(tmp_path: Path) -> None:
    bundle = tmp_path / "ca.pem"
    bundle.write_text("one")
    config = make_config({"egress": {"upstream_ca": str(bundle)}})
    before = Footing.of(config, ())
    assert Footing.of(replace(config, sources={("x",): "elsewhere"}), ()) == before
    bundle.write_text("two")
    assert Footing.of(config, ()) != before


class TestRunDirectory:
    def test_policies_in_force_are_a_copy(self, tmp_path: Path) -> None:
        source = tmp_path / "policies"
        source.mkdir()
        (source / "a.cedar").write_text('@id("a") permit (principal, action, resource);')
        (source / "notes.txt").write_text("not a policy")
        config = make_config({"policy": {"dir": str(source)}})
        directory = RunDirectory(tmp_path / "state", "run")
        in_force = directory.keep_policies(config)
        (source / "a.cedar").write_text("permit (")
        with pytest.raises(ConfigError):
            directory.keep_policies(config)
        assert in_force.policy.dir is not None
        assert [path.name for path in in_force.policy.dir.iterdir()] == ["a.cedar"]
        assert (in_force.policy.dir / "a.cedar").read_text().startswith("@id")
        assert directory.keep_policies(in_force).policy == in_force.policy, "what is in force can be kept in force"
        (source / "a.cedar").write_text('@id("b") permit (principal, action, resource);')
        directory.keep_policies(config)
        assert '"b"' in (in_force.policy.dir / "a.cedar").read_text()
        directory.revert_policies()
        assert '"a"' in (in_force.policy.dir / "a.cedar").read_text()
        assert len(list(directory.path.glob("policies-*"))) == 2, "older ones are gone"
        directory.remove()

    def test_what_a_killed_controller_left_is_removed_and_a_living_ones_is_not(self, tmp_path: Path) -> None:
        living = RunDirectory(tmp_path, "living")
        dead = RunDirectory(tmp_path, "dead")
        os.close(dead.lock)
        for path in (living.path, dead.path):
            os.utime(path, (1, 1))
        remove_leftovers(tmp_path)
        assert [path.name for path in (tmp_path / "runs").iterdir()] == ["living"]
        living.remove()


class TestFollowing:
    """A controller applies journals that other processes write."""

    def outcomes(self, count: int) -> list[Outcome]:
        return [make_outcome(make_request()) for _ in range(count)]

    async def test_what_a_living_worker_writes_is_applied_while_it_writes(self, tmp_path: Path) -> None:
        consumer = Keeping()
        replay = Replay(tmp_path, "run", [consumer], follows=True)
        lock = replay.follow("run.w1")
        replay.start()
        outcomes = self.outcomes(50)
        with Journal(str(tmp_path), "run.w1", flush="record", segment_bytes=2000) as journal:
            for outcome in outcomes:
                journal.append(encode(outcome))
                if outcome is outcomes[20]:
                    await self.until(lambda: len(consumer.ids) == 21)
            assert len(list(tmp_path.glob("run.w1-*.jnl"))) > 2
            await self.until(lambda: len(consumer.ids) == 50)
            assert replay.healthy
        replay.ended("run.w1")
        await self.until(lambda: not self.held(lock))
        assert await asyncio.to_thread(replay.stop)
        assert consumer.ids == [outcome.id for outcome in outcomes]

    async def test_a_journal_whose_controller_died_is_adopted_once_its_worker_has_ended(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("creto_proxy.replay.ADOPT_EVERY_S", 0.1)
        first = Replay(tmp_path, "one", [Keeping()], follows=True)
        inherited = os.dup(first.follow("one.w1"))  # as the worker has it
        first.start()
        await asyncio.to_thread(first.stop)
        outcomes = self.outcomes(3)
        consumer = Keeping()
        second = Replay(tmp_path, "two", [consumer], follows=True)
        second.start()
        with Journal(str(tmp_path), "one.w1", flush="record") as journal:
            for outcome in outcomes:
                journal.append(encode(outcome))
        assert consumer.ids == []
        os.close(inherited)
        await self.until(lambda: len(consumer.ids) == 3)
        assert await asyncio.to_thread(second.stop)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not holds():
                await asyncio.sleep(0.01)

    def held(self, fd: int) -> bool:
        try:
            os.fstat(fd)
        except OSError:
            return False
        return True
