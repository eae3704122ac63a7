"""Frames to messages and back, without I/O: what one side sends becomes what the other side gets.

Each direction is read as the endpoint it is addressed to would read it (masking, reserved bits, opcodes, fragments,
UTF-8 as it arrives, close codes: RFC 6455 sections 5 to 8) and written anew, so nothing that is not a message gets
through. Control frames go on at once, also between the fragments of a message; a message goes on when it is complete.
"""

from __future__ import annotations

from itertools import islice

from wsproto.frame_protocol import CloseReason, Frame, FrameProtocol, Opcode, ParseFailed

from creto_proxy.errors import Refused, StageFailed
from creto_proxy.hookspecs import Direction, MessageKind
from creto_proxy.websocket.watch import Watch

_KINDS: dict[Opcode, MessageKind] = {Opcode.TEXT: "text", Opcode.BINARY: "binary"}


class Broken(Exception):
    """The connection has to end. code: of the Close frames (RFC 6455 section 7.4.1). reason: snake_case, for programs
    and for the upstream. detail: one sentence for the agent, "" when there is nothing to add."""

    def __init__(self, code: int, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.detail = detail


class _OneWay:
    """One direction. Memory: one message of at most ``watch.max_message_bytes``, and one chunk of received bytes."""

    def __init__(self, direction: Direction, source: FrameProtocol, sink: FrameProtocol, watch: Watch) -> None:
        self._direction: Direction = direction
        self._source = source
        self._sink = sink
        self._watch = watch
        self._message = bytearray()
        self.closed = False

    def feed(self, data: bytes, out: list[bytes | bytearray], most: int | None) -> bool:
        """As ``Conversation.up``."""
        if self.closed:
            return False  # nothing counts after a Close (RFC 6455 section 1.4)
        self._source.receive_bytes(data)
        count = 0
        try:
            for frame in islice(self._source.received_frames(), most):
                self._frame(frame, out)
                count += 1
            return count == most and not self.closed
        except ParseFailed as error:
            text = error.code == CloseReason.INVALID_FRAME_PAYLOAD_DATA
            raise Broken(error.code, "websocket_text" if text else "websocket_protocol", str(error)) from None

    def _frame(self, frame: Frame, out: list[bytes | bytearray]) -> None:
        payload = frame.payload
        if frame.opcode is Opcode.CLOSE:
            assert isinstance(payload, tuple)
            self.closed = True
            out.append(self.close(*payload))
        elif frame.opcode is Opcode.PING:
            assert isinstance(payload, bytes)
            out.append(self._sink.ping(payload))
        elif frame.opcode is Opcode.PONG:
            assert isinstance(payload, bytes)
            out.append(self._sink.pong(payload))
        else:
            assert not isinstance(payload, tuple)
            piece = payload.encode() if isinstance(payload, str) else payload
            if len(self._message) + len(piece) > self._watch.max_message_bytes:
                most = self._watch.max_message_bytes
                raise Broken(CloseReason.MESSAGE_TOO_BIG, "message_too_large", f"A message may have {most} bytes.")
            self._message += piece
            if frame.message_finished:
                out.append(self._judged(_KINDS[frame.opcode]))

    def _judged(self, kind: MessageKind) -> bytearray:
        data = bytes(self._message)
        self._message = bytearray()
        try:
            data = self._watch.judge(self._direction, kind, data)
        except Refused as error:
            detail = error.decision.detail
            raise Broken(CloseReason.POLICY_VIOLATION, error.decision.reason, detail) from None
        except StageFailed as error:
            raise Broken(CloseReason.INTERNAL_ERROR, error.reason, error.detail) from None
        return self._sink.send_data(data.decode() if kind == "text" else data)

    def close(self, code: int, reason: str) -> bytearray:
        """The Close frame for the receiving side; code 1005 makes one without a code."""
        return self._sink.close(code, reason or None)


class Conversation:
    """Both directions of one watched connection."""

    def __init__(self, watch: Watch) -> None:
        agent, upstream = FrameProtocol(client=False, extensions=[]), FrameProtocol(client=True, extensions=[])
        self._up = _OneWay("up", agent, upstream, watch)
        self._down = _OneWay("down", upstream, agent, watch)

    def up(self, data: bytes, out: list[bytes | bytearray], most: int | None = None) -> bool:
        """Appends to ``out`` what the upstream is to receive for ``data`` from the agent.

        most: frames to look at now; True then says that there may be more, which the next call gets to, with b"" if
        need be. Raises Broken; ``out`` holds what came before the break.
        """
        return self._up.feed(data, out, most)

    def down(self, data: bytes, out: list[bytes | bytearray], most: int | None = None) -> bool:
        """The same for the agent and ``data`` from the upstream."""
        return self._down.feed(data, out, most)

    def end(self, broken: Broken) -> tuple[bytes, bytes]:
        """(last bytes for the upstream, last bytes for the agent): a Close frame for whoever has not got one yet.

        The upstream gets the code and the reason alone: what a plugin has to say is for the agent.
        """
        told = f"{broken.reason}: {broken.detail}" if broken.detail else broken.reason
        up = b"" if self._up.closed else bytes(self._up.close(broken.code, broken.reason))
        down = b"" if self._down.closed else bytes(self._down.close(broken.code, told))
        self._up.closed = self._down.closed = True
        return up, down
