"""Stands between the relay and the connection to an upstream, and lets through only whole messages that were judged.

To the event loop it is the protocol of that connection, to the relay it is the transport. Until the answer to the
upgrade is known it passes bytes on as they are; after a 101 the relay's tunnel becomes its protocol (``set_protocol``)
and every byte goes through the ``Conversation``; after any other answer it steps aside.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, Protocol, cast

from creto_hotpath.relay import Upstream
from creto_proxy.websocket.messages import Broken, Conversation
from creto_proxy.websocket.watch import Watch

# How long both sides get to read the last Close frame and hang up.
LINGER_S = 1.0
# A segment can hold tens of thousands of tiny frames; other connections get their turn in between.
FRAMES_AT_ONCE = 64
_HEAD_END = b"\r\n\r\n"


class Side(Protocol):
    """The relay's protocol for its end of the tunnel."""

    def data_received(self, data: bytes) -> None: ...
    def eof_received(self) -> bool | None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...
    def connection_lost(self, exc: BaseException | None) -> None: ...


class _Way:
    """One direction, some frames per turn of the loop. ``busy`` while received bytes wait for their turn.

    judge: the direction of the conversation. send: takes what goes on. paced: told whenever ``busy`` may have changed.
    """

    def __init__(
        self,
        judge: Callable[[bytes, list[bytes | bytearray], int | None], bool],
        send: Callable[[bytes], None],
        paced: Callable[[], None],
        broken: Callable[[Broken], None],
    ) -> None:
        self._judge = judge
        self._send = send
        self._paced = paced
        self._on_broken = broken
        self._loop = asyncio.get_running_loop()
        self._then: Callable[[], None] | None = None
        self._ended = False
        self.busy = False

    def take(self, data: bytes) -> None:
        """Sends on what the conversation makes of ``data``; what came before a break is sent, too, so that nobody can
        tell how the bytes were cut into segments."""
        if self._ended:
            return
        out: list[bytes | bytearray] = []
        waiting = self.busy
        try:
            self.busy = self._judge(data, out, FRAMES_AT_ONCE)
        except Broken as error:
            if out:
                self._send(b"".join(out))
            self._on_broken(error)
            return
        if out:
            self._send(bytes(out[0]) if len(out) == 1 else b"".join(out))
        if self.busy and not waiting:
            self._loop.call_soon(self._continue)
        if self.busy or waiting:
            self._paced()

    def _continue(self) -> None:
        self.busy = False
        self.take(b"")
        if not self.busy and not self._ended:
            self._paced()
            self.after(None)

    def after(self, then: Callable[[], None] | None) -> None:
        """Calls ``then``, or what was put off before, once nothing waits any more; at once when nothing does."""
        self._then = then or self._then
        if not self.busy and self._then is not None:
            then, self._then = self._then, None
            then()

    def end(self) -> None:
        """Nothing is taken any more, and nothing that was put off happens."""
        self._ended = True
        self.busy = False
        self._then = None


class WatchedTransport(asyncio.Protocol):
    """One watched connection.

    agent: transport of the agent's side, aborted when the end is not reached in time. on_broken(reason) is told once,
    when the connection ends for a cause of ours; the outcome then says why.
    """

    def __init__(
        self, upstream: Upstream, agent: asyncio.Transport, watch: Watch, on_broken: Callable[[str], None]
    ) -> None:
        self._upstream = upstream
        self._real: asyncio.Transport = upstream.transport
        self._agent = agent
        self._on_broken = on_broken
        self._conversation = Conversation(watch)
        self._up = _Way(self._conversation.up, self._send_up, self._pace_agent, self._end)
        self._down = _Way(self._conversation.down, self._send_down, self._pace_upstream, self._end)
        self._loop = asyncio.get_running_loop()
        self._relay: Side = upstream
        self._switched = False
        self._aside = False
        self._tail = b""
        self._early = b""
        self._full = False  # the upstream takes no more
        self._stopped = False  # the agent takes no more
        self._up_ended = False
        self._down_ended = False
        self._broken = False
        self._lost = False
        self._told = False
        self._real.set_protocol(self)
        upstream.connection_made(cast(asyncio.Transport, self))

    def stand_down(self) -> None:
        """The upgrade was not granted: the relay and the connection have nothing between them any more."""
        self._aside = True
        self._real.set_protocol(self._upstream)
        self._upstream.connection_made(self._real)

    def refuse(self, code: int, reason: str) -> None:
        """Ends the connection with a Close frame to both sides, whatever they are doing."""
        self._end(Broken(code, reason))

    # -- the protocol of the connection to the upstream

    def data_received(self, data: bytes) -> None:
        while data and not self._switched:
            data = self._head(data)
        if data and self._early:
            self._early += data
        elif data:
            self._down.take(data)

    def _head(self, data: bytes) -> bytes:
        """Passes bytes on, up to the end of a head; gives back the rest. What follows the head of a 101 in the same
        segment would otherwise reach the agent unseen."""
        if self._aside:
            self._upstream.data_received(data)
            return b""
        seen = self._tail + data
        end = seen.find(_HEAD_END)
        if end < 0:
            self._tail = seen[-3:]
            self._upstream.data_received(data)
            return b""
        cut = end + len(_HEAD_END) - len(self._tail)
        self._tail = b""
        self._upstream.data_received(data[:cut])
        if self._switched:
            # The tunnel is being built: its other side is not attached before this call has returned.
            self._early = data[cut:]
            if self._early:
                self._loop.call_soon(self._catch_up)
            return b""
        return data[cut:]

    def _catch_up(self) -> None:
        data, self._early = self._early, b""
        if data:
            self._down.take(data)

    def eof_received(self) -> bool | None:
        if not self._switched:
            return self._relay.eof_received()
        self._catch_up()
        if not self._broken:
            self._down.after(self._half_close)
        return self._real.can_write_eof()  # TLS has no half-close, whatever is said here

    def _half_close(self) -> None:
        """Tells the agent that nothing more will come."""
        if not self._down_ended:
            self._down_ended = True
            if not self._relay.eof_received():
                self.close()

    def pause_writing(self) -> None:
        self._full = True
        self._pace_agent()

    def resume_writing(self) -> None:
        self._full = False
        self._pace_agent()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        if not self._switched:
            self._relay.connection_lost(exc)
        elif not self._broken:
            self._catch_up()
            self._down.after(lambda: self._tell(exc))
        # Broken: the agent still has until the end of the linger time to read why.

    # -- the transport of the relay

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._relay = cast(Side, protocol)
        self._switched = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._switched:
            self._up.take(bytes(data))
        else:
            self._real.write(data)

    def writelines(self, parts: Iterable[bytes | bytearray | memoryview]) -> None:
        for part in parts:
            self.write(part)

    def write_eof(self) -> None:
        if not self._broken:
            self._up.after(self._finish_writing)

    def can_write_eof(self) -> bool:
        return self._real.can_write_eof()

    def pause_reading(self) -> None:
        self._stopped = True
        self._pace_upstream()

    def resume_reading(self) -> None:
        self._stopped = False
        self._pace_upstream()

    def is_closing(self) -> bool:
        return self._lost or self._real.is_closing()

    def close(self) -> None:
        self._up.after(lambda: self._hang_up(self._real.close))

    def abort(self) -> None:
        self._hang_up(self._real.abort)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._real.get_extra_info(name, default)

    def get_write_buffer_size(self) -> int:
        return 0 if self._lost else self._real.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._real.get_write_buffer_limits()

    # -- pace: who sends is not read while what was sent waits for a turn, or for the other side

    def _pace_agent(self) -> None:
        if self._full or self._up.busy:
            self._relay.pause_writing()
        else:
            self._relay.resume_writing()

    def _pace_upstream(self) -> None:
        if self.is_closing():
            return
        if self._stopped or self._down.busy:
            self._real.pause_reading()
        else:
            self._real.resume_reading()

    def _send_up(self, data: bytes) -> None:
        if not self._lost and not self._up_ended:
            self._real.write(data)

    def _send_down(self, data: bytes) -> None:
        if not self._down_ended:
            self._relay.data_received(data)

    def _finish_writing(self) -> None:
        if not self._up_ended and not self.is_closing():
            self._up_ended = True
            self._real.write_eof()

    # -- the end

    def _end(self, broken: Broken) -> None:
        if self._broken or not self._switched:
            return
        self._broken = True
        self._early = b""
        self._up.end()
        self._down.end()
        self._on_broken(broken.reason)
        up, down = self._conversation.end(broken)
        if up:
            self._send_up(up)
        if down:
            self._send_down(down)
        self._loop.call_later(LINGER_S, self._cut_off)
        # Both are read on, and unheard: a side that is paused would never be seen to hang up.
        self._full = self._stopped = False
        self._pace_agent()
        self._pace_upstream()
        if self._real.can_write_eof():
            self._finish_writing()
        self._half_close()

    def _cut_off(self) -> None:
        """The linger time is over; closing twice does nothing."""
        self._agent.abort()
        if not self._lost:
            self._real.abort()
        self._tell(None)

    def _hang_up(self, how: Callable[[], None]) -> None:
        """Lets go of the connection; a broken or lost one has no more to tell the tunnel."""
        if not self._lost:
            how()
        if self._broken or self._lost:
            self._tell(None)

    def _tell(self, exc: Exception | None) -> None:
        """Tells the relay, once, that the connection is gone; never from inside a call of its own."""
        if self._told:
            return
        self._told = True
        self._loop.call_soon(self._relay.connection_lost, exc)
