"""``GET http://creto.internal/v1/approvals/{id}``: how the agent's own request stands, with long poll."""

from __future__ import annotations

import math

from creto_oversight import answers
from creto_oversight.desk import Desk
from creto_oversight.engine import CommandRefused
from creto_oversight.requests import SECOND_NS, ApprovalRequest
from creto_oversight.states import State
from creto_oversight.store import StoreUnavailable
from creto_oversight.watch import Offload, Watching
from creto_proxy.hookspecs import Clock, ControlRequest, ControlResponse
from creto_proxy.model import Agent

# Ends well before common read timeouts of a minute.
WAIT_MAX_S = 50.0
_UNDECIDED = frozenset({State.PENDING, State.ESCALATED})


class ApprovalRoutes:
    """Answers agents about their own requests; those of others do not exist for them."""

    prefix = "/v1/approvals"

    def __init__(self, desk: Desk, watch: Watching, offload: Offload, clock: Clock) -> None:
        self._desk = desk
        self._watch = watch
        self._offload = offload
        self._clock = clock

    async def handle(self, request: ControlRequest) -> ControlResponse:
        """200 with the request's state; ``?wait=SECONDS`` (at most 50) answers as soon as it is decided. 404 for
        requests of other agents, 400 for a bad ``wait``, 405 for other methods."""
        request_id = request.path.removeprefix(self.prefix).strip("/")
        if request.method not in ("GET", "HEAD"):
            return _problem(405, "method_not_allowed", "Only GET is known here.", {"Allow": "GET, HEAD"})
        if not request_id or "/" in request_id:
            return _problem(404, "not_found", f"Ask for {self.prefix}/ID.")
        wait_s = _wait_s(request.query.get("wait", "0"))
        if wait_s is None:
            return _problem(400, "bad_wait", f"wait is a number of seconds from 0 to {WAIT_MAX_S:.0f}.")
        try:
            found = await self._own(request.agent, request_id)
            if found is not None and wait_s and found.state in _UNDECIDED:
                found = await self._wait(found, wait_s)
        except CommandRefused:
            found = None
        except StoreUnavailable:
            return _problem(503, "approval_unavailable", "Requests for approval cannot be read now.")
        if found is None:
            return _problem(404, "not_found", "There is no such request for approval of yours.")
        return ControlResponse(200, answers.document(found))

    async def _own(self, agent: Agent, request_id: str) -> ApprovalRequest | None:
        found = await self._look(request_id)
        return found if found.agent == agent.id else None

    async def _wait(self, found: ApprovalRequest, wait_s: float) -> ApprovalRequest:
        now = self._clock.now_ns()
        end = now + round(wait_s * SECOND_NS)
        request_id = found.id
        with self._watch.attached(request_id) as bell:
            found = await self._look(request_id)
            while found.state in _UNDECIDED and now < end:
                left_s = min(end - now, max(0, found.deadline_ns - self._desk.now_ns())) / SECOND_NS
                await bell.wait(left_s)
                now = self._clock.now_ns()
                found = await self._look(request_id)
        return found

    async def _look(self, request_id: str) -> ApprovalRequest:
        return await self._offload(lambda: self._desk.look(request_id))


def _wait_s(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return min(value, WAIT_MAX_S) if math.isfinite(value) and value >= 0 else None


def _problem(status: int, reason: str, detail: str, headers: dict[str, str] | None = None) -> ControlResponse:
    kind = f"urn:creto:problem:{reason.replace('_', '-')}"
    return ControlResponse(status, {"type": kind, "status": status, "reason": reason, "detail": detail}, headers)
