"""The messages stage: the watches of all plugins on one connection, asked in order, within their deadline."""

from __future__ import annotations

from collections.abc import Sequence

from creto_proxy.deadline import Guard
from creto_proxy.errors import Refused, StageFailed
from creto_proxy.hookspecs import Direction, MessageKind, Messages, MessageWatch
from creto_proxy.model import Decision, Request, Verdict

_STAGE = "messages"


class Watch:
    """Every plugin that wants to see the messages of one connection."""

    __slots__ = ("_guard", "_watches", "max_message_bytes")

    def __init__(self, watches: Sequence[tuple[str, MessageWatch]], guard: Guard, max_message_bytes: int) -> None:
        self._watches = tuple(watches)
        self._guard = guard
        self.max_message_bytes = max_message_bytes

    def judge(self, direction: Direction, kind: MessageKind, data: bytes) -> bytes:
        """The payload that goes on: ``data`` as it came, or what the plugins made of it.

        Raises Refused when a plugin says no, StageFailed when one raises, overruns or answers nonsense.
        """
        for plugin, watch in self._watches:
            answer = self._guard.call(plugin, _STAGE, watch.message, direction, kind, data)
            if answer is data:
                continue
            if isinstance(answer, Decision):
                # Nobody can be asked about a message: its answer would come after the ones behind it.
                if answer.verdict is not Verdict.ALLOW:
                    raise Refused(answer)
            elif isinstance(answer, bytes) and (kind == "binary" or _is_text(answer)):
                data = answer
            else:
                raise StageFailed(f"plugin {plugin} gave neither a payload nor a decision in stage {_STAGE}")
        return data


class Watchers:
    """The messages stage of every plugin that has one."""

    def __init__(self, stages: Sequence[tuple[str, Messages]], guard: Guard, max_message_bytes: int = 1 << 20) -> None:
        self._stages = tuple(stages)
        self._guard = guard
        self._max_message_bytes = max_message_bytes

    def open(self, request: Request, upgrade: str) -> Watch | None:
        """Who watches the connection that ``request`` asks for by ``Upgrade: upgrade``; None when nobody does.

        Raises StageFailed when a plugin cannot say.
        """
        # "websocket/13" and the like: a server that takes it for a WebSocket must not be able to hide one.
        if not self._stages or "websocket" not in upgrade.lower():
            return None
        opened = [(plugin, self._guard.call(plugin, _STAGE, stage.open, request)) for plugin, stage in self._stages]
        watches = [(plugin, watch) for plugin, watch in opened if watch is not None]
        return Watch(watches, self._guard, self._max_message_bytes) if watches else None


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
