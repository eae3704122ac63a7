"""What a peer may do with frames before anything decodes them: the bounds behind one GOAWAY (ENHANCE_YOUR_CALM).

Follows frame headers only, so it costs the same for both framings and sees what they hide: how many frames a header
block is cut into (CVE-2024-27316), how fast streams are reset (CVE-2023-44487), and frames that cost their sender
nothing: SETTINGS, PING, PRIORITY, empty DATA (CVE-2019-9512, -9515, -9518).
"""

from __future__ import annotations

from collections.abc import Callable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
PROTOCOL_ERROR, FRAME_SIZE_ERROR, ENHANCE_YOUR_CALM = 1, 6, 11

# What we let a peer send in one frame: the initial SETTINGS_MAX_FRAME_SIZE.
FRAME_BYTES = 16384

# Bytes of one header block as sent; decoded, the limits of HTTP/1.1 heads apply.
BLOCK_BYTES = 65536
BLOCK_FRAMES = 16
# Frames that make work for us and none for the peer: this many at once, then this many a second (nghttp2's numbers).
BURST = 1000
PER_S = 33.0
# Stream numbers that were passed over and are remembered, about.
_PASSED = 256

_DATA, _HEADERS, _PRIORITY, _RST_STREAM, _SETTINGS, _PUSH, _PING, _GOAWAY, _WINDOW, _CONTINUATION = range(10)
_END_STREAM, _END_HEADERS = 0x1, 0x4
_IDLE_WORK = frozenset({_PRIORITY, _RST_STREAM, _SETTINGS, _PING, _GOAWAY})
_NAMES = {
    _DATA: "empty_data",
    _PRIORITY: "priority",
    _RST_STREAM: "reset",
    _SETTINGS: "settings",
    _PING: "ping",
    _GOAWAY: "goaway",
}


class Flood(Exception):
    """A bound was passed, or an order of frames that nobody sends by mistake. ``reason`` is snake_case."""

    def __init__(self, reason: str, code: int = ENHANCE_YOUR_CALM) -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code


class Guard:
    """Follows the frames of one direction of one connection, wherever the network cut them. preface: bytes before the
    first frame, when it comes from a client. clock: seconds, monotonic. O(frames) time, constant memory."""

    __slots__ = (
        "_at", "_block_bytes", "_block_frames", "_client", "_clock", "_head", "_highest", "_in_block", "_passed",
        "_skip", "_tokens",
    )  # fmt: skip

    def __init__(self, clock: Callable[[], float], *, preface: int = 0) -> None:
        self._client = preface > 0
        self._highest = 1
        self._passed: set[int] = set()
        self._clock = clock
        self._head = b""
        self._skip = preface
        self._in_block = False
        self._block_bytes = 0
        self._block_frames = 0
        self._tokens = float(BURST)
        self._at = clock()

    @property
    def in_block(self) -> bool:
        """Whether a header block has begun and not ended."""
        return self._in_block

    def feed(self, data: bytes) -> None:
        """Raises Flood."""
        at, size = 0, len(data)
        if self._head:
            missing = 9 - len(self._head)
            self._head += data[:missing]
            if len(self._head) < 9:
                return
            self._skip = self._frame(self._head, 0)
            self._head = b""
            at = missing
        while True:
            if self._skip >= size - at:
                self._skip -= size - at
                return
            at += self._skip
            self._skip = 0
            if size - at < 9:
                self._head = data[at:]
                return
            self._skip = self._frame(data, at)
            at += 9

    def charge(self, reason: str) -> None:
        """One piece of work that cost the peer nothing."""
        self._tokens -= 1.0
        if self._tokens < 0:
            now = self._clock()
            self._tokens = min(float(BURST), self._tokens + (now - self._at) * PER_S)
            self._at = now
            if self._tokens < 0:
                raise Flood(f"{reason}_flood")

    def _order(self, stream_id: int) -> None:
        """A stream that was passed over is closed and cannot be opened any more (RFC 9113 section 5.1.1)."""
        if stream_id > self._highest:
            if len(self._passed) < _PASSED:
                self._passed.update(range(self._highest + 2, min(stream_id, self._highest + _PASSED), 2))
            self._highest = stream_id | 1
        elif stream_id in self._passed:
            raise Flood("stream_order", PROTOCOL_ERROR)

    def _frame(self, data: bytes, at: int) -> int:
        """Judges the frame whose header is at ``at``; bytes of its payload."""
        length = data[at] << 16 | data[at + 1] << 8 | data[at + 2]
        kind, flags = data[at + 3], data[at + 4]
        if length > FRAME_BYTES:  # seen here, before anything waits for all of it
            raise Flood("frame_too_large", FRAME_SIZE_ERROR)
        if kind == _HEADERS or kind == _PUSH:
            if self._client:
                self._order(int.from_bytes(data[at + 5 : at + 9], "big") & 0x7FFFFFFF)
            self._in_block = not flags & _END_HEADERS
            self._block_bytes = length
            self._block_frames = 1
        elif kind == _CONTINUATION:
            self._block_bytes += length
            self._block_frames += 1
            if self._block_frames > BLOCK_FRAMES or self._block_bytes > BLOCK_BYTES:
                raise Flood("continuation_flood")
            if flags & _END_HEADERS:
                self._in_block = False
        elif kind in _IDLE_WORK or (kind == _DATA and length == 0 and not flags & _END_STREAM):
            self.charge(_NAMES[kind])
        return length
