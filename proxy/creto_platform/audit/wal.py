"""The write-ahead log: what was acknowledged before it is in tiles.

Files ``<n>.wal`` of frames: u32 length, u32 CRC-32 of the payload, payload = msgpack ``[first, source, upto,
[entry...]]``: entries that get the indices from ``first`` on, and how far ``source`` was applied with them ("" for
none). A frame counts as a whole or not at all, which is what makes entries and position one step.

Only the holder of the log's lock writes, so a torn frame at the end belongs to a process that died and is cut.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import msgpack

from creto_hotpath.leaves import bins
from creto_platform.audit.disk import Disk
from creto_platform.audit.port import LogTampered

_packer = msgpack.Packer(use_bin_type=True, autoreset=True)
_pack, _pack_array_header = _packer.pack, _packer.pack_array_header
_HEADER = struct.Struct("<II")
FRAME_LIMIT = 1 << 30


@dataclass(frozen=True, slots=True)
class Frame:
    """See the module. ids: of the entries, for whoever knows them; they are in the entries, too."""

    first: int
    source: str
    upto: int
    entries: list[bytes]
    ids: tuple[bytes, ...] = field(default=(), compare=False)

    def encode(self) -> bytes:
        place: bytes = _pack([self.first, self.source, self.upto, None])
        entries: bytes = _pack_array_header(len(self.entries))
        payload = place[:-1] + entries + bins(self.entries)
        return _HEADER.pack(len(payload), zlib.crc32(payload)) + payload


class Wal:
    """Files are numbered upwards; frames go to the last one. Used under the log's lock only."""

    def __init__(self, directory: Path, disk: Disk) -> None:
        self._directory = directory
        self._disk = disk
        self._fd = -1
        self._number = 0
        self._end = 0

    @property
    def size_bytes(self) -> int:
        """Length of the current file, as far as it was read or written here."""
        return self._end

    def open(self) -> list[Frame]:
        """Opens the last file (the first one is made) and returns every frame of every file, oldest first.

        A torn tail of the last file is cut. Raises LogTampered("corrupt") when a frame elsewhere is damaged.
        """
        self.close()
        numbers = self._numbers()
        frames: list[Frame] = []
        for number in numbers[:-1]:
            data = self._path(number).read_bytes()
            read, end = _frames(data, self._path(number))
            if end != len(data):
                raise LogTampered("corrupt", f"{self._path(number)} ends within a frame")
            frames += read
        self._open_file(numbers[-1] if numbers else 1, create=not numbers)
        return frames + self.poll()

    def poll(self) -> list[Frame]:
        """Frames that other processes added since the last look; cuts a torn tail."""
        size = os.fstat(self._fd).st_size
        if size == self._end:
            return []
        if size < self._end:
            raise LogTampered("rollback", f"{self._path(self._number)} became shorter")
        data = os.pread(self._fd, size - self._end, self._end)
        frames, end = _frames(data, self._path(self._number))
        if end != len(data):
            self._disk.truncate(self._fd, self._end + end)
            self._disk.sync_data(self._fd)
        self._end += end
        return frames

    def append(self, frames: Iterable[Frame]) -> None:
        """Appends and syncs. Raises OSError; then nothing of it is kept."""
        data = b"".join(frame.encode() for frame in frames)
        try:
            self._disk.append(self._fd, data)
            self._disk.sync_data(self._fd)
        except OSError:
            # After a failed fsync the kernel may have dropped the pages: the frames must not be found later.
            self._disk.truncate(self._fd, self._end)
            raise
        self._end += len(data)

    def rotate(self) -> None:
        """Starts the next file and removes all older ones; every frame in them must be published and indexed."""
        old = self._numbers()
        self._open_file(self._number + 1, create=True)
        for number in old:
            self._disk.remove(self._path(number))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open_file(self, number: int, *, create: bool) -> None:
        self.close()
        path = self._path(number)
        if create:
            self._disk.write(path, b"")
            self._disk.sync([path, self._directory])
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        self._number, self._end = number, 0

    def _numbers(self) -> list[int]:
        return sorted(int(path.stem) for path in self._directory.glob("*.wal") if path.stem.isdigit())

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:08d}.wal"


def _frames(data: bytes, path: Path) -> tuple[list[Frame], int]:
    """The whole frames at the start of ``data`` and where they end."""
    frames: list[Frame] = []
    at = 0
    while len(data) - at >= _HEADER.size:
        size, crc = _HEADER.unpack_from(data, at)
        end = at + _HEADER.size + size
        if size > FRAME_LIMIT or end > len(data) or zlib.crc32(data[at + _HEADER.size : end]) != crc:
            break
        frames.append(_decode(data[at + _HEADER.size : end], path, at))
        at = end
    return frames, at


def _decode(payload: bytes, path: Path, at: int) -> Frame:
    try:
        first, source, upto, entries = msgpack.unpackb(payload, raw=False)
    except (ValueError, TypeError) as error:
        raise LogTampered("corrupt", f"{path} at {at}: {error}") from None
    plain = type(first) is int and isinstance(source, str) and type(upto) is int
    if not plain or not isinstance(entries, list) or not all(isinstance(entry, bytes) for entry in entries):
        raise LogTampered("corrupt", f"{path} at {at}: not a frame of this log")
    return Frame(first, source, upto, entries)
