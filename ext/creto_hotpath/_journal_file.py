"""The files of a journal: their names, how one is begun, read back and repaired. Shared by both forms.

A segment ``<worker>-<n>.jnl`` is frames and nothing else:

    u32 length of the payload, at least 1      little-endian
    u32 CRC-32C over those four bytes and the payload
    payload, msgpack; or, where it begins with 0xC1, which no msgpack does, abbreviated:

        0xC1, u32 offset in this segment of an earlier frame, itself not abbreviated
        then, to the end: u8 keep, u8 drop, u8 add, and so many bytes: keep that many of the earlier payload,
        leave out that many, put these in their place. What follows the last of them there is left out.

A process that dies leaves at most a torn last frame. Whether a bad frame is that, or damage to what was once whole,
is told by what follows it: nothing whole can follow a torn tail.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeAlias

HEADER: Final = struct.Struct("<II")
HEADER_BYTES: Final = HEADER.size
MAX_PAYLOAD: Final = 16 << 20
MAX_PENDING: Final = 16 << 20
SEGMENT_BYTES: Final = 64 << 20
ABBREVIATED: Final = 0xC1
# An abbreviated frame is at most this far behind the one it refers to: so much is lost with that one, and no more.
REACH: Final = 1 << 18

_WINDOW: Final = 1 << 20
_WORKER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_SEGMENT: Final = re.compile(r"(?P<worker>[A-Za-z0-9][A-Za-z0-9_.-]{0,127})-(?P<number>[0-9]{8,12})\.jnl")

Opener: TypeAlias = Callable[[str, int], int]
Crc: TypeAlias = Callable[[bytes], int]
Expand: TypeAlias = Callable[[bytes, bytes], bytes | None]


class JournalCorrupt(ValueError):
    """A frame was damaged after it had been written whole. ``path`` and ``offset`` say which; nothing was changed."""

    def __init__(self, path: str, offset: int, why: str) -> None:
        super().__init__(f"{path}: corrupt frame at byte {offset}: {why}")
        self.path = path
        self.offset = offset


class JournalBusy(OSError):
    """The segment is still being written by a living process, so its end is not torn but unfinished."""


class JournalFull(OSError):
    """So much is waiting to be written that no further record is taken. ``errno`` is ENOBUFS."""


def checked_worker(worker: str) -> str:
    """``worker`` if it can be part of a file name. Raises ValueError."""
    if not _WORKER.fullmatch(worker):
        raise ValueError(
            f"worker must be 1 to 128 letters, digits, '_', '.', '-', the first a letter or digit: {worker!r}"
        )
    return worker


def segment_name(worker: str, number: int) -> str:
    return f"{worker}-{number:08d}.jnl"


def segments(directory: str | os.PathLike[str], worker: str | None = None) -> list[Path]:
    """The segment files in ``directory``, of one worker or of all, each worker's in the order they were written."""
    found: list[tuple[str, int, Path]] = []
    for entry in Path(directory).iterdir():
        match = _SEGMENT.fullmatch(entry.name)
        if match and worker in (None, match["worker"]):
            found.append((match["worker"], int(match["number"]), entry))
    return [path for _, _, path in sorted(found)]


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def begin_segment(directory: str, worker: str, opener: Opener | None) -> tuple[int, str]:
    """``(fd, path)`` of a new segment, numbered after every one there is, locked against ``recover``.

    The directory entry is on disk when this returns. Raises OSError.
    """
    existing = segments(directory, worker)
    number = int(existing[-1].stem.rpartition("-")[2]) + 1 if existing else 1
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        path = os.path.join(directory, segment_name(worker, number))
        try:
            fd = (opener or _private)(path, flags)
            break
        except FileExistsError:
            number += 1
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
    except BaseException:
        os.close(fd)
        raise
    return fd, path


def drop_segment(fd: int, path: str) -> None:
    """Closes and removes a segment that nothing was written to."""
    os.close(fd)
    Path(path).unlink(missing_ok=True)


def frame_error(length: int) -> ValueError:
    return ValueError(f"a record must be 1 to {MAX_PAYLOAD} bytes, got {length}")


def not_msgpack() -> ValueError:
    return ValueError("a record that is bytes must be msgpack, which never begins with 0xC1")


def full_error(path: str, pending: int) -> JournalFull:
    return JournalFull(errno.ENOBUFS, f"{pending} bytes wait to be written", path)


class _References:
    """Payloads of one segment that abbreviated ones refer to."""

    def __init__(self, name: str, fd: int, crc32c: Crc, expand: Expand) -> None:
        self._name = name
        self._fd = fd
        self._crc32c = crc32c
        self._expand = expand
        self._known: dict[int, bytes] = {}

    def full(self, payload: bytes, offset: int) -> bytes:
        """The whole of an abbreviated payload, whose frame is at ``offset``. Raises JournalCorrupt."""
        at = int.from_bytes(payload[1:5], "little")
        base = self._known.get(at)
        if base is None:
            base = self._known[at] = self._read(at, offset)
        whole = self._expand(base, payload)
        if whole is None:
            raise JournalCorrupt(self._name, offset, f"it does not fit the frame at byte {at}")
        return whole

    def _read(self, at: int, offset: int) -> bytes:
        payload = payload_at(self._fd, at, self._crc32c) if refers(at, offset) else None
        if payload is None:
            raise JournalCorrupt(self._name, offset, f"it refers to byte {at}, where there is no whole frame")
        return payload


def refers(at: int, offset: int) -> bool:
    """Whether the frame at ``offset`` may refer to one at ``at``."""
    return at < offset <= at + REACH + MAX_PENDING


def payload_at(fd: int, at: int, crc32c: Crc) -> bytes | None:
    """The payload of the frame at ``at``; None when none is there that is whole and not abbreviated itself."""
    head = os.pread(fd, HEADER_BYTES, at)
    length = HEADER.unpack(head)[0] if len(head) == HEADER_BYTES else 0
    frame = head + os.pread(fd, length, at + HEADER_BYTES) if 1 <= length <= MAX_PAYLOAD else b""
    payload = whole_frame(frame, 0, crc32c)
    return None if payload is None or payload[0] == ABBREVIATED else payload


def expand(base: bytes, payload: bytes) -> bytes | None:
    """What ``payload`` abbreviates, ``base`` being the payload it refers to; None when it does not fit."""
    pieces: list[bytes] = []
    at, i = 0, 5
    while i + 3 <= len(payload):
        keep, drop, add = payload[i : i + 3]
        if at + keep + drop > len(base) or i + 3 + add > len(payload):
            return None
        pieces += (base[at : at + keep], payload[i + 3 : i + 3 + add])
        at += keep + drop
        i += 3 + add
    return b"".join(pieces) if i == len(payload) and any(pieces) else None


def read_frames(
    path: str | os.PathLike[str], offset: int, crc32c: Crc, expand: Expand
) -> Iterator[tuple[bytes, int]]:
    """Payloads of the whole frames from ``offset`` on, each with the offset behind it. See ``journal.read_frames``."""
    name = os.fspath(path)
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        if not 0 <= offset <= size:
            raise JournalCorrupt(name, offset, f"the file has only {size} bytes")
        base, at, data = offset, 0, b""
        references = _References(name, fd, crc32c, expand)
        while True:
            payload = whole_frame(data, at, crc32c)
            if payload is None and (chunk := os.pread(fd, _WINDOW, base + len(data))):
                if _hopeless(data, at):
                    break
                data, base, at = data[at:] + chunk, base + at, 0
                continue
            if payload is None:
                break
            begins, at = base + at, at + HEADER_BYTES + len(payload)
            yield (payload if payload[0] != ABBREVIATED else references.full(payload, begins)), base + at
        _judge(name, fd, base + at, crc32c)
    finally:
        os.close(fd)


def _hopeless(data: bytes, at: int) -> bool:
    """Whether more bytes cannot make a whole frame of what is at ``at``."""
    if len(data) - at < HEADER_BYTES:
        return False
    length, _ = HEADER.unpack_from(data, at)
    return not 1 <= length <= MAX_PAYLOAD or len(data) - at >= HEADER_BYTES + length


def whole_frame(data: bytes, at: int, crc32c: Crc) -> bytes | None:
    """The payload of a whole and sound frame at ``at``, else None."""
    if len(data) - at < HEADER_BYTES:
        return None
    length, crc = HEADER.unpack_from(data, at)
    end = at + HEADER_BYTES + length
    if not 1 <= length <= MAX_PAYLOAD or end > len(data):
        return None
    payload = data[at + HEADER_BYTES : end]
    return payload if crc32c(data[at : at + 4] + payload) == crc else None


def _judge(name: str, fd: int, offset: int, crc32c: Crc) -> None:
    """Returns when the bytes from ``offset`` on are a torn tail; raises JournalCorrupt when something whole follows.

    A filesystem may also leave zeros where the tail was to be. Bytes that only look like a head are many in a long
    tail, so those whose frame would end where another could begin are summed first; they are rare by chance. Content
    made to look like frames everywhere must not stop a start for hours: past a multiple of what there is to sum the
    segment counts as damaged, which changes nothing in it.
    """
    data = b""
    while chunk := os.pread(fd, _WINDOW, offset + len(data)):
        data += chunk
    if not data.strip(b"\0"):
        return
    if whole_frame(data, 0, crc32c) is not None:
        return  # it was still being written a moment ago
    budget = 8 * len(data) + _WINDOW
    others = []
    for at in range(1, len(data) - HEADER_BYTES):
        end = _plausible_end(data, at)
        if not end:
            continue
        if len(data) - end >= HEADER_BYTES and not _plausible_length(data, end):
            others.append(at)
            continue
        budget -= end - at
        if budget < 0:
            raise JournalCorrupt(name, offset, "cannot be told from a torn tail")
        _refuse_whole(name, data, offset, at, crc32c)
    for at in others:
        budget -= _plausible_end(data, at) - at
        if budget < 0:
            return
        _refuse_whole(name, data, offset, at, crc32c)


def _plausible_length(data: bytes, at: int) -> bool:
    return 1 <= int.from_bytes(data[at : at + 4], "little") <= MAX_PAYLOAD


def _plausible_end(data: bytes, at: int) -> int:
    """Where a frame that began at ``at`` would end; 0 when it would not end in ``data``."""
    if not _plausible_length(data, at):
        return 0
    end = at + HEADER_BYTES + int.from_bytes(data[at : at + 4], "little")
    return end if end <= len(data) else 0


def _refuse_whole(name: str, data: bytes, offset: int, at: int, crc32c: Crc) -> None:
    if whole_frame(data, at, crc32c) is not None:
        raise JournalCorrupt(name, offset, f"the frame at byte {offset + at} is whole")


def recover(path: str | os.PathLike[str], crc32c: Crc) -> int:
    """Cuts a torn tail off; see ``journal.recover``."""
    name = os.fspath(path)
    fd = os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JournalBusy(error.errno, "the segment is still being written", name) from error
        end = max((behind for _, behind in read_frames(name, 0, crc32c, expand)), default=0)
        size = os.fstat(fd).st_size
        if end < size:
            os.ftruncate(fd, end)
            os.fsync(fd)
        return size - end
    finally:
        os.close(fd)
