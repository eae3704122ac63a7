"""An append-only log of records that survives a killed process. Plain-Python form."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal

import msgpack

from creto_hotpath import _journal_file as files


def _crc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC_TABLE: Final = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of ``data``. Source: RFC 3720 appendix B.4; reflected polynomial 0x82F63B78."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def read_frames(path: str | os.PathLike[str], offset: int = 0) -> Iterator[tuple[bytes, int]]:
    """``(payload, next offset)`` of every whole frame from ``offset`` on.

    Stops in front of a torn tail, so it may follow a segment that is still being written: call it again with the last
    offset. Raises JournalCorrupt when a frame was damaged that others were written after, or ``offset`` lies behind
    the end or a frame abbreviates what is not there; OSError when the file cannot be read.
    """
    return files.read_frames(path, offset, crc32c, files.expand)


def payload_at(fd: int, offset: int) -> bytes | None:
    """The payload of the frame at ``offset`` of an open segment; None when none is there that is whole and not
    abbreviated itself."""
    return files.payload_at(fd, offset, crc32c)


def recover(path: str | os.PathLike[str]) -> int:
    """Cuts a torn tail off a segment and syncs it; the number of bytes cut off, 0 when it was whole.

    Raises JournalBusy while a living process writes it, JournalCorrupt (and changes nothing) when it is damaged.
    """
    return files.recover(path, crc32c)


class Journal:
    """Appends records to segments ``<worker>-<n>.jnl`` in ``directory``; every Journal begins a new segment.

    ``append`` puts a frame into a buffer, ``flush`` hands the buffer to the kernel with write(2), from where it
    survives the death of the process, ``sync`` to the disk, from where it survives that of the machine. With
    ``flush="record"`` every append flushes. A segment that has reached ``segment_bytes`` is synced and followed by the
    next one; a frame never spans two.

    When a write fails (a full disk), OSError comes out of the call that wrote, ``healthy`` is False and the bytes stay
    in the buffer, in order, for the next flush. With ``max_pending`` bytes waiting, ``append`` raises JournalFull.

    opener: ``opener(path, flags) -> fd`` instead of open(2) with mode 0600. ``dirtied``, when it is set, is called at
    the first write after a sync.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        worker: str,
        segment_bytes: int = files.SEGMENT_BYTES,
        flush: Literal["turn", "record"] = "turn",
        opener: files.Opener | None = None,
        max_pending: int = files.MAX_PENDING,
    ) -> None:
        if flush not in ("turn", "record"):
            raise ValueError(f"flush must be 'turn' or 'record', got {flush!r}")
        if segment_bytes < 1 or max_pending < 1:
            raise ValueError("segment_bytes and max_pending must be positive")
        self._directory = os.fspath(directory)
        self._worker = files.checked_worker(worker)
        self._segment_bytes = segment_bytes
        self._each = flush == "record"
        self._opener = opener
        self._max_pending = max_pending
        self._lock = threading.RLock()
        self._buffer = bytearray()
        self._packer = msgpack.Packer(use_bin_type=True)
        self._written = 0
        self._healthy = True
        self._unsynced = False
        self.dirtied: Callable[[], object] | None = None
        self._records = 0
        self._retired: list[int] = []  # full segments that no sync has seen
        self._spare: tuple[int, str] | None = None
        self._fd, self._path = files.begin_segment(self._directory, self._worker, opener)

    @property
    def path(self) -> str:
        """The segment that is being written."""
        return self._path

    @property
    def segment(self) -> str:
        """Its file name."""
        return os.path.basename(self._path)

    @property
    def healthy(self) -> bool:
        """False from a failed write until one succeeds."""
        return self._healthy

    @property
    def records(self) -> int:
        """How many records were appended since it was opened."""
        return self._records

    @property
    def unsynced(self) -> bool:
        """Whether the kernel has bytes that no ``sync`` has seen."""
        return self._unsynced

    @property
    def pending(self) -> int:
        """Bytes appended and not yet written."""
        return len(self._buffer)

    @property
    def offset(self) -> int:
        """Where the next frame of this segment will begin."""
        return self._written + len(self._buffer)

    def _open(self) -> int:
        if self._fd < 0:
            raise ValueError("the journal is closed")
        return self._fd

    def append(self, record: bytes | Sequence[Any]) -> int:
        """Adds one record; the offset at which its frame begins in ``segment``.

        record: a tuple or list of None, bool, int, float, str, bytes, and tuples, lists and dicts of these, which is
        encoded as msgpack; or bytes that are msgpack already. Raises TypeError, ValueError or OverflowError for what
        cannot be encoded or is longer than 16 MiB, and then nothing was added; JournalFull; OSError from the write.
        """
        with self._lock:
            self._open()
            if isinstance(record, bytes):
                payload = record
            elif isinstance(record, (tuple, list)):
                payload = self._packer.pack(record)
            else:
                raise TypeError(f"a record is bytes, a tuple or a list, not {type(record).__name__}")
            if not 1 <= len(payload) <= files.MAX_PAYLOAD:
                raise files.frame_error(len(payload))
            if payload[0] == files.ABBREVIATED:
                raise files.not_msgpack()
            if len(self._buffer) + len(payload) + files.HEADER_BYTES > self._max_pending:
                raise files.full_error(self._path, len(self._buffer))
            offset = self.offset
            length = len(payload).to_bytes(4, "little")
            self._buffer += length + crc32c(length + payload).to_bytes(4, "little") + payload
            self._records += 1
            if self._each:
                self.flush()
            return offset

    def flush(self) -> None:
        """Hands everything appended to the kernel. Raises OSError; what was not taken stays for the next time."""
        with self._lock:
            fd = self._open()
            wrote = False
            while self._buffer:
                try:
                    n = os.write(fd, self._buffer)
                except OSError as error:
                    self._healthy = False
                    raise OSError(error.errno, error.strerror, self._path) from error
                del self._buffer[:n]
                self._written += n
                wrote = True
            self._healthy = self._healthy or wrote
            if wrote and not self._unsynced:
                self._unsynced = True
                if self.dirtied is not None:
                    self.dirtied()
            if self._written >= self._segment_bytes:
                self._rotate()

    def _rotate(self) -> None:
        """Begins the next segment without waiting for a disk, if ``sync`` has made one ready."""
        old = self._fd
        try:
            self._next_segment()
        except OSError:
            self._healthy = False
            raise
        self._retired.append(old)

    def _next_segment(self) -> None:
        fd, path = self._spare or files.begin_segment(self._directory, self._worker, self._opener)
        self._spare = None
        self._fd, self._path, self._written = fd, path, 0

    def sync(self) -> None:
        """Flushes, then waits until the disk has it. May be called from a thread of its own. Raises OSError.

        After a failed sync the kernel may call the same pages clean, so what follows goes to a new segment.
        """
        with self._lock:
            self.flush()
            self._unsynced = False
            path = self._path
            fds = [*self._retired, os.dup(self._open())]
            self._retired.clear()
        try:
            for fd in fds:
                os.fdatasync(fd)
        except OSError as error:
            with self._lock:
                self._abandon()
            raise OSError(error.errno, error.strerror, path) from error
        finally:
            for fd in fds:
                os.close(fd)
        self._prepare()

    def _prepare(self) -> None:
        """Makes the next segment while nobody waits for it."""
        if self._spare is not None or 2 * self._written < self._segment_bytes:
            return
        made: tuple[int, str] | None
        try:
            made = files.begin_segment(self._directory, self._worker, self._opener)
        except OSError:
            return  # said when it is needed
        with self._lock:
            # Segments are read in the order of their names: one that others have overtaken is of no use.
            if self._fd >= 0 and self._spare is None and made[1] > self._path:
                self._spare, made = made, None
        if made is not None:
            files.drop_segment(*made)

    def _abandon(self) -> None:
        self._healthy = False
        if self._fd < 0 or self._buffer:
            return
        old = self._fd
        try:
            self._next_segment()
        except OSError:
            return  # still unhealthy; the failed sync is what the caller hears of
        os.close(old)

    def close(self) -> None:
        """Flushes and closes. Raises OSError when the flush failed; the journal is closed all the same."""
        with self._lock:
            if self._fd < 0:
                return
            try:
                self.flush()
            finally:
                for fd in (*self._retired, self._fd):
                    os.close(fd)
                self._retired.clear()
                self._fd = -1
                if self._spare is not None:
                    files.drop_segment(*self._spare)
                    self._spare = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        fd = getattr(self, "_fd", -1)
        if fd >= 0:
            os.close(fd)
