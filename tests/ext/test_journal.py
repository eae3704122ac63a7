"""The journal: whole records or none, whatever is cut, flipped, full or killed."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from creto_hotpath._journal_file import JournalBusy, JournalCorrupt, JournalFull, segments

from .conftest import Form, outcome

RECORD = (b"\x01\x02", 1_800_000_000_000_000_000, "spiffe://local/agent/a", ("a", "b"), {"input": 12}, -5, None, True)


def payloads(form: Form, path: Any, offset: int = 0) -> list[bytes]:
    return [payload for payload, _ in form("journal").read_frames(path, offset)]


def written(form: Form, directory: Path, records: list[Any]) -> Path:
    with form("journal").Journal(directory, "w") as journal:
        for record in records:
            journal.append(record)
    return Path(journal.path)


# what is written


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
    ],
)
def test_crc32c_gives_the_values_of_rfc_3720(form: Form, data: bytes, crc: int) -> None:
    assert form("journal").crc32c(data) == crc


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.binary(max_size=100))
def test_crc32c_is_the_same_by_instruction_by_table_and_by_byte(both: tuple[Form, Form], data: bytes) -> None:
    compiled, twin = (form("journal") for form in both)
    assert compiled.crc32c(data) == compiled.crc32c_table(data) == twin.crc32c(data)


def test_a_frame_is_length_sum_and_payload(form: Form, tmp_path: Path) -> None:
    module = form("journal")
    path = written(form, tmp_path, [b"payload"])
    length = (7).to_bytes(4, "little")
    assert path.read_bytes() == length + module.crc32c(length + b"payload").to_bytes(4, "little") + b"payload"
    assert path.name == "w-00000001.jnl"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_records_come_back_with_their_offsets(form: Form, tmp_path: Path) -> None:
    module = form("journal")
    with module.Journal(tmp_path, "w") as journal:
        offsets = [journal.append((n, "x" * n)) for n in range(20)]
        end = journal.offset
    read = list(module.read_frames(journal.path))
    assert [msgpack.unpackb(payload) for payload, _ in read] == [[n, "x" * n] for n in range(20)]
    assert offsets == [0, *(behind for _, behind in read[:-1])]
    assert read[-1][1] == end == os.path.getsize(journal.path)
    assert payloads(form, journal.path, offsets[7]) == [payload for payload, _ in read[7:]]


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 63), (1 << 64) - 1), st.floats(), st.text(), st.binary(max_size=300)
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=20),
        st.lists(inner, max_size=20).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=40), st.integers()), inner, max_size=20),
    ),
    max_leaves=30,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(values, max_size=20).map(tuple))
def test_both_forms_write_what_msgpack_writes(both: tuple[Form, Form], record: tuple[Any, ...]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        answers = []
        for form in both:
            with form("journal").Journal(directory, form.name) as journal:
                answers.append(outcome(journal.append, record))
            answers.append(payloads(form, journal.path))
        assert answers[:2] == answers[2:]
        expected = outcome(msgpack.packb, record)
        assert answers[1] == ([expected] if isinstance(expected, bytes) else [])


EDGES = [0, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.mark.parametrize("value", [*EDGES, -1, -32, -33, -128, -129, -32768, -32769, -(2**31), -(2**31) - 1, -(2**63)])
def test_every_width_of_integer_is_written_as_msgpack_does(form: Form, tmp_path: Path, value: int) -> None:
    assert payloads(form, written(form, tmp_path, [(value,)])) == [msgpack.packb((value,))]


@pytest.mark.parametrize("size", [0, 1, 15, 16, 31, 32, 255, 256, 65535, 65536])
def test_every_width_of_length_is_written_as_msgpack_does(form: Form, tmp_path: Path, size: int) -> None:
    record = ("x" * size, b"x" * size, bytearray(size), [None] * size, (None,) * size, dict.fromkeys(range(size)))
    assert payloads(form, written(form, tmp_path, [record])) == [msgpack.packb(record)]


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ("text", TypeError),
        (None, TypeError),
        ({"a": 1}, TypeError),
        ((object(),), TypeError),
        (("a", {"b": {1, 2}}), TypeError),
        ((2**64,), OverflowError),
        ((-(2**63) - 1,), OverflowError),
        (("\ud800",), UnicodeEncodeError),
        (b"", ValueError),
        (b"x" * (16 << 20) + b"y", ValueError),
        (("x" * (16 << 20),), ValueError),
    ],
    ids=range(11),
)
def test_what_cannot_be_a_record_is_refused_and_leaves_no_trace(
    form: Form, tmp_path: Path, record: Any, error: type[Exception]
) -> None:
    with form("journal").Journal(tmp_path, "w", max_pending=64 << 20) as journal:
        journal.append(("before",))
        before = journal.offset
        with pytest.raises(error):
            journal.append(record)
        assert journal.offset == before
        journal.append(("after",))
    assert payloads(form, journal.path) == [msgpack.packb(("before",)), msgpack.packb(("after",))]


def test_endless_nesting_is_refused(form: Form, tmp_path: Path) -> None:
    record: list[Any] = []
    record.append(record)
    with form("journal").Journal(tmp_path, "w") as journal, pytest.raises(ValueError, match="recursion limit"):
        journal.append(record)


# flush, sync, segments


def test_nothing_is_written_before_the_flush_of_a_turn(form: Form, tmp_path: Path) -> None:
    with form("journal").Journal(tmp_path, "w") as journal:
        journal.append(RECORD)
        assert payloads(form, journal.path) == []
        assert journal.pending == journal.offset > 0
        journal.flush()
        assert payloads(form, journal.path) == [msgpack.packb(RECORD)]
        assert journal.pending == 0
    assert os.path.getsize(journal.path) == journal.offset, "what was allocated ahead is given back"


def test_each_record_is_written_at_once_when_asked(form: Form, tmp_path: Path) -> None:
    with form("journal").Journal(tmp_path, "w", flush="record") as journal:
        journal.append(RECORD)
        assert payloads(form, journal.path) == [msgpack.packb(RECORD)]


def test_a_full_segment_is_followed_by_the_next(form: Form, tmp_path: Path) -> None:
    with form("journal").Journal(tmp_path, "w", segment_bytes=100) as journal:
        names = []
        for n in range(6):
            offset = journal.append(b"%02d" % n + b"x" * 48)
            names.append((journal.segment, offset))
            journal.flush()
    assert names == [(f"w-0000000{1 + n // 2}.jnl", n % 2 * 58) for n in range(6)]
    assert [path.name for path in segments(tmp_path)] == [f"w-0000000{n}.jnl" for n in (1, 2, 3, 4)]
    assert [payload[:2] for path in segments(tmp_path) for payload in payloads(form, path)] == [
        b"%02d" % n for n in range(6)
    ]


def test_a_journal_begins_behind_every_segment_there_is(form: Form, tmp_path: Path) -> None:
    module = form("journal")
    (tmp_path / "w-00000041.jnl").touch()
    (tmp_path / "w-00000099.jnl.bak").touch()
    (tmp_path / "other-00000100.jnl").touch()
    with module.Journal(tmp_path, "w") as first, module.Journal(tmp_path, "w") as second:
        assert (first.segment, second.segment) == ("w-00000042.jnl", "w-00000043.jnl")


def test_segments_are_listed_in_the_order_they_were_written(tmp_path: Path) -> None:
    for name in ("b-00000001.jnl", "a-00000010.jnl", "a-00000009.jnl", "a-b-00000001.jnl", "a-1.jnl", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in segments(tmp_path)] == [
        "a-00000009.jnl",
        "a-00000010.jnl",
        "a-b-00000001.jnl",
        "b-00000001.jnl",
    ]
    assert [path.name for path in segments(tmp_path, "a")] == ["a-00000009.jnl", "a-00000010.jnl"]


@pytest.mark.parametrize("worker", ["", "../w", "a/b", ".hidden", "-w", "w\n", "x" * 129])
def test_a_worker_that_is_no_file_name_is_refused(form: Form, tmp_path: Path, worker: str) -> None:
    with pytest.raises(ValueError, match="worker"):
        form("journal").Journal(tmp_path, worker)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("more", [{"flush": "never"}, {"segment_bytes": 0}, {"max_pending": 0}])
def test_settings_that_cannot_be_are_refused(form: Form, tmp_path: Path, more: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        form("journal").Journal(tmp_path, "w", **more)
    assert list(tmp_path.iterdir()) == []


def test_sync_writes_what_was_appended(form: Form, tmp_path: Path) -> None:
    with form("journal").Journal(tmp_path, "w") as journal:
        journal.append(RECORD)
        journal.sync()
        assert payloads(form, journal.path) == [msgpack.packb(RECORD)]


def test_a_closed_journal_says_so(form: Form, tmp_path: Path) -> None:
    journal = form("journal").Journal(tmp_path, "w")
    journal.append(RECORD)
    journal.close()
    journal.close()
    assert payloads(form, journal.path) == [msgpack.packb(RECORD)]
    for use in (lambda: journal.append(RECORD), journal.flush, journal.sync):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_a_dropped_journal_gives_its_descriptor_back(form: Form, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        form("journal").Journal(tmp_path, "w")
    assert len(os.listdir("/proc/self/fd")) == before


# when the disk is full


def test_a_full_disk_is_an_error_and_unhealthy(form: Form, tmp_path: Path) -> None:
    journal = form("journal").Journal(tmp_path, "w", opener=lambda path, flags: os.open("/dev/full", os.O_WRONLY))
    assert journal.healthy
    offset = journal.append(RECORD)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left") as caught:
            journal.flush()
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == journal.path
        assert not journal.healthy
    assert journal.append(RECORD) > offset  # it still takes records, in order, as long as there is room
    with pytest.raises(OSError, match="No space left"):
        journal.close()
    with pytest.raises(ValueError, match="closed"):
        journal.flush()


def test_nothing_is_lost_when_the_disk_has_room_again(form: Form, tmp_path: Path) -> None:
    """A pipe that takes a little, then nothing, then everything: short writes and failures in the middle of frames."""
    reading, writing = os.pipe2(os.O_NONBLOCK)
    journal = form("journal").Journal(tmp_path, "w", opener=lambda path, flags: writing)
    records = [b"%04d" % n + b"x" * 1000 for n in range(300)]
    for record in records:
        journal.append(record)
    got = b""
    failures = 0
    while journal.pending:
        try:
            journal.flush()
        except BlockingIOError:
            failures += 1
            assert not journal.healthy
            got += os.read(reading, 5000)
    assert failures > 2
    assert journal.healthy
    while chunk := _read(reading):
        got += chunk
    journal.close()
    os.close(reading)
    copy = tmp_path / "copy"
    copy.write_bytes(got)
    assert payloads(form, copy) == records


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 20)
    except BlockingIOError:
        return b""


def test_a_journal_that_cannot_write_takes_only_so_much(form: Form, tmp_path: Path) -> None:
    opener = lambda path, flags: os.open("/dev/full", os.O_WRONLY)  # noqa: E731
    journal = form("journal").Journal(tmp_path, "w", opener=opener, max_pending=100)
    journal.append(b"x" * 40)
    journal.append(b"x" * 40)
    with pytest.raises(JournalFull, match="96 bytes wait") as caught:
        journal.append(b"x")
    assert caught.value.errno == errno.ENOBUFS
    assert journal.pending == 96


def test_a_record_whose_write_failed_is_still_there(form: Form, tmp_path: Path) -> None:
    opener = lambda path, flags: os.open("/dev/full", os.O_WRONLY)  # noqa: E731
    journal = form("journal").Journal(tmp_path, "w", flush="record", opener=opener)
    with pytest.raises(OSError, match="No space left"):
        journal.append(RECORD)
    assert journal.pending == len(msgpack.packb(RECORD)) + 8


def test_after_a_failed_sync_the_journal_goes_on_in_a_new_segment(form: Form, tmp_path: Path) -> None:
    fds = [os.open("/dev/null", os.O_WRONLY)]  # fdatasync(2) on it is EINVAL

    def opener(path: str, flags: int) -> int:
        fd = os.open(path, flags, 0o600)
        if fds:
            os.dup2(fds[0], fd)
            os.close(fds.pop())
        return fd

    with form("journal").Journal(tmp_path, "w", opener=opener) as journal:
        first = journal.path
        journal.append(RECORD)
        with pytest.raises(OSError) as caught:
            journal.sync()
        assert caught.value.filename == first
        assert not journal.healthy
        assert journal.path != first
        assert journal.append(RECORD) == 0
        journal.sync()
        assert journal.healthy
    assert payloads(form, journal.path) == [msgpack.packb(RECORD)]


def test_the_next_segment_is_ready_before_it_is_needed(form: Form, tmp_path: Path) -> None:
    """So that whoever appends never waits for the disk; what was not needed is not left behind."""
    began: list[str] = []

    def opener(path: str, flags: int) -> int:
        began.append(path)
        return os.open(path, flags, 0o600)

    with form("journal").Journal(tmp_path, "w", flush="record", opener=opener, segment_bytes=1000) as journal:
        for n in range(100):
            journal.append([n, "x" * 100])
            journal.sync()
            if n == 0:
                assert len(began) == 1
            if n == 4:
                assert len(began) == 2 and journal.path == began[0], "made ready half way"
            if n == 8:
                assert len(began) == 2 and journal.path == began[1], "begun without opening anything"
    left = segments(tmp_path, "w")
    assert [str(path) for path in left] == began[: len(left)] and all(path.stat().st_size for path in left)
    records = [msgpack.unpackb(payload) for path in left for payload in payloads(form, path)]
    assert [record[0] for record in records] == list(range(100))


def test_no_segment_is_begun_where_none_can_be(form: Form, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        form("journal").Journal(tmp_path / "absent", "w")


# when a process or a machine dies


def test_truncation_anywhere_leaves_a_clean_prefix(form: Form, tmp_path: Path) -> None:
    module = form("journal")
    path = written(form, tmp_path, [(n, "payload", RECORD) for n in range(4)])
    data = path.read_bytes()
    ends = [0, *(behind for _, behind in module.read_frames(path))]
    whole = payloads(form, path)
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        kept = sum(end <= length for end in ends) - 1
        assert payloads(form, path) == whole[:kept]
        assert module.recover(path) == length - ends[kept]
        assert path.read_bytes() == data[: ends[kept]]


@pytest.mark.parametrize("zeros", [1, 7, 8, 9, 5000])
def test_zeros_at_the_end_are_a_torn_tail(form: Form, tmp_path: Path, zeros: int) -> None:
    path = written(form, tmp_path, [RECORD, RECORD])
    data = path.read_bytes()
    path.write_bytes(data + bytes(zeros))
    assert len(payloads(form, path)) == 2
    assert form("journal").recover(path) == zeros
    assert path.read_bytes() == data


def test_every_flipped_bit_is_found(form: Form, tmp_path: Path) -> None:
    module = form("journal")
    path = written(form, tmp_path, [b"first", b"second", b"third"])
    data = path.read_bytes()
    starts = [0, 13, 27]
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        damaged = max(start for start in starts if start <= bit // 8)
        whole = [b"first", b"second", b"third"][: starts.index(damaged)]
        if damaged == starts[-1]:  # nothing follows: it cannot be told from a torn tail, and is not given out
            assert payloads(form, path) == whole
            continue
        read = []
        with pytest.raises(JournalCorrupt, match=f"corrupt frame at byte {damaged}") as caught:
            for payload, _ in module.read_frames(path):
                read.append(payload)
        assert read == whole
        assert (caught.value.path, caught.value.offset) == (str(path), damaged)
        with pytest.raises(JournalCorrupt):
            module.recover(path)
        assert path.read_bytes() == flipped


def test_frames_larger_than_a_read_come_back_whole(form: Form, tmp_path: Path) -> None:
    large = os.urandom(1000) * (2600 if form.compiled else 1100)  # more than a window of 1 MiB
    path = written(form, tmp_path, [b"small", large, b"small"])
    assert payloads(form, path) == [b"small", large, b"small"]
    data = path.read_bytes()
    path.write_bytes(data[: len(large)])
    assert payloads(form, path) == [b"small"]


def test_content_that_looks_like_frames_everywhere_is_refused_in_bounded_time(form: Form, tmp_path: Path) -> None:
    path = tmp_path / "w-00000001.jnl"
    path.write_bytes(b"\xff" * 8 + (1).to_bytes(4, "little") * 2000)  # every word a length, and no sum right
    assert payloads(form, path) == []
    path.write_bytes(b"\xff" * 8 + (20_000).to_bytes(4, "little") * 10_000)
    with pytest.raises(JournalCorrupt, match="cannot be told"):
        payloads(form, path)


def test_an_offset_behind_the_end_is_an_error(form: Form, tmp_path: Path) -> None:
    path = written(form, tmp_path, [RECORD])
    size = path.stat().st_size
    assert payloads(form, path, size) == []
    for offset in (size + 1, -1):
        with pytest.raises(JournalCorrupt, match=f"only {size} bytes"):
            payloads(form, path, offset)


def test_a_segment_can_be_followed_while_it_is_written(form: Form, tmp_path: Path) -> None:
    module = form("journal")
    with module.Journal(tmp_path, "w") as journal:
        offset = 0
        for n in range(5):
            journal.append((n,))
            journal.append((n, n))
            journal.flush()
            read = list(module.read_frames(journal.path, offset))
            assert [payload for payload, _ in read] == [msgpack.packb((n,)), msgpack.packb((n, n))]
            offset = read[-1][1]


def test_a_segment_that_is_being_written_is_not_recovered(form: Form, tmp_path: Path) -> None:
    module = form("journal")
    journal = module.Journal(tmp_path, "w")
    journal.append(RECORD)
    journal.flush()
    with pytest.raises(JournalBusy, match="still being written"):
        module.recover(journal.path)
    journal.close()
    assert module.recover(journal.path) == 0


WRITER = """
import sys
from importlib import import_module
journal = import_module(sys.argv[1]).Journal(sys.argv[2], "w", segment_bytes=20_000)
for n in range(1 << 40):
    journal.append((n, "x" * (n % 200)))
    if n % 7 == 0:
        journal.flush()
        print(n, flush=True)
"""


def test_a_killed_writer_loses_nothing_it_flushed(form: Form, tmp_path: Path) -> None:
    module = form("journal")
    command = [sys.executable, "-c", WRITER, form.module("journal"), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            if int(line) > 1000:
                break
        writer.send_signal(signal.SIGKILL)
        said = [int(line), *map(int, writer.stdout.read().split("\n")[:-1])]
    for path in segments(tmp_path):
        module.recover(path)
    read = [msgpack.unpackb(payload) for path in segments(tmp_path) for payload in payloads(form, path)]
    assert read == [[n, "x" * (n % 200)] for n in range(len(read))]
    assert len(read) > said[-1]
    assert len(segments(tmp_path)) > 2


def test_threads_that_append_and_sync_while_segments_turn_lose_nothing(form: Form, tmp_path: Path) -> None:
    with form("journal").Journal(tmp_path, "w", flush="record", segment_bytes=2000) as journal:
        done = threading.Event()
        failures: list[BaseException] = []

        def keep_syncing() -> None:
            while not done.is_set():
                try:
                    journal.sync()
                except OSError as error:
                    failures.append(error)

        threads = [threading.Thread(target=keep_syncing) for _ in range(2)]
        for thread in threads:
            thread.start()
        for n in range(1500):
            journal.append([n, "x" * 40])
        done.set()
        for thread in threads:
            thread.join()
    assert failures == []
    records = [msgpack.unpackb(payload) for path in segments(tmp_path, "w") for payload in payloads(form, path)]
    assert [record[0] for record in records] == list(range(1500))


def test_a_reader_follows_a_journal_that_is_being_written(form: Form, tmp_path: Path) -> None:
    """What was half written when it was looked at first is not damage when it is whole at the second look."""
    with form("journal").Journal(tmp_path, "w", flush="record") as journal:
        wrote = threading.Event()

        def write() -> None:
            for n in range(3000):
                journal.append([n, "x" * 300])
            wrote.set()

        writer = threading.Thread(target=write)
        writer.start()
        found, at = 0, 0
        while not wrote.is_set() or at < journal.offset:
            frames = list(form("journal").read_frames(journal.path, at))
            found += len(frames)
            at = frames[-1][1] if frames else at
        writer.join()
        assert found == 3000


# what is written short


def framed(form: Form, *payloads: bytes) -> bytes:
    frames = []
    for payload in payloads:
        length = len(payload).to_bytes(4, "little")
        frames.append(length + form("journal").crc32c(length + payload).to_bytes(4, "little") + payload)
    return b"".join(frames)


def short(at: int, *pieces: tuple[int, int, bytes]) -> bytes:
    """A payload that says how it differs from that of the frame at ``at``: (keep, drop, put in)."""
    return b"\xc1" + at.to_bytes(4, "little") + b"".join(bytes([k, d, len(add)]) + add for k, d, add in pieces)


def test_an_abbreviated_record_is_read_as_it_was(form: Form, tmp_path: Path) -> None:
    path = tmp_path / "w-00000001.jnl"
    head = framed(form, b"first")
    at = len(head)
    path.write_bytes(head + framed(form, b"0123456789", short(at, (2, 3, b"abc"), (4, 0, b"")), short(0, (1, 4, b"or"))))
    assert payloads(form, path) == [b"first", b"0123456789", b"01abc5678", b"for"]
    ends = [end for _, end in form("journal").read_frames(path)]
    assert payloads(form, path, ends[1]) == [b"01abc5678", b"for"], "also by whoever begins behind what it refers to"
    assert form("journal").recover(path) == 0


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (short(0, (6, 0, b"")), "does not fit"),
        (short(0, (3, 3, b"")), "does not fit"),
        (short(0, (0, 0, b"")), "does not fit"),
        (short(0), "does not fit"),
        (short(0, (1, 0, b"ab"))[:-1], "does not fit"),
        (short(0, (1, 0, b"")) + b"x", "does not fit"),
        (b"\xc1", "no whole frame"),
        (short(1, (1, 0, b"")), "no whole frame"),
        (short(13, (1, 0, b"")), "no whole frame"),  # itself
        (short(500, (1, 0, b"")), "no whole frame"),
        (short(2**32 - 1, (1, 0, b"")), "no whole frame"),
    ],
)
def test_an_abbreviation_of_what_is_not_there_is_damage(
    form: Form, tmp_path: Path, payload: bytes, why: str
) -> None:
    path = tmp_path / "w-00000001.jnl"
    data = framed(form, b"first", payload, b"last")
    path.write_bytes(data)
    if payload == b"\xc1":
        why = "does not fit"  # byte 0, where there is one
    read = form("journal").read_frames(path)
    assert next(read)[0] == b"first"
    with pytest.raises(JournalCorrupt, match=why):
        next(read)
    with pytest.raises(JournalCorrupt):
        form("journal").recover(path)
    assert path.read_bytes() == data


def test_an_abbreviation_of_an_abbreviation_is_damage(form: Form, tmp_path: Path) -> None:
    path = tmp_path / "w-00000001.jnl"
    path.write_bytes(framed(form, b"first", short(0, (1, 0, b"")), short(13, (1, 0, b""))))
    with pytest.raises(JournalCorrupt, match="refers to byte 13"):
        payloads(form, path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=60),
    st.lists(st.tuples(st.integers(0, 70), st.integers(0, 9), st.binary(max_size=9)), max_size=4),
    st.binary(max_size=2),
)
def test_both_forms_expand_alike(
    both: tuple[Form, Form], base: bytes, pieces: list[tuple[int, int, bytes]], rest: bytes
) -> None:
    compiled, twin = (form("journal") for form in both)
    payload = short(0, *pieces) + rest
    assert compiled.expand(base, payload) == twin.files.expand(base, payload)


def test_bytes_that_would_be_taken_for_an_abbreviation_are_refused(form: Form, tmp_path: Path) -> None:
    with form("journal").Journal(tmp_path, "w") as journal:
        with pytest.raises(ValueError, match="never begins with 0xC1"):
            journal.append(b"\xc1whatever")
        journal.append(b"\x01")
    assert payloads(form, journal.path) == [b"\x01"]


def test_the_first_write_after_a_sync_is_told(form: Form, tmp_path: Path) -> None:
    with form("journal").Journal(tmp_path, "w") as journal:
        told: list[bool] = []
        journal.dirtied = lambda: told.append(journal.unsynced)
        journal.append((1,))
        assert told == [], "nothing was written yet"
        for _ in range(3):
            journal.append((2,))
            journal.flush()
        assert told == [True]
        journal.sync()
        journal.flush()
        assert told == [True]
        journal.append((3,))
        journal.flush()
        assert told == [True, True]
