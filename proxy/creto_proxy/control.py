"""``http://creto.internal``: what an agent may ask creto itself, under the same identity as its traffic."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from urllib.parse import parse_qsl

import msgspec

from creto_proxy.deadline import Guard
from creto_proxy.errors import StageFailed
from creto_proxy.hookspecs import ControlRequest, ControlResponse, Routes
from creto_proxy.model import Request

HOST = "creto.internal"
# Long polls (waiting for an approval) end by themselves well before this.
CEILING_S = 120.0


class WhoAmI:
    """``GET /v1/whoami``: the agent's own identity and delegation chain."""

    prefix = "/v1/whoami"

    async def handle(self, request: ControlRequest) -> ControlResponse:
        agent = request.agent
        return ControlResponse(
            200,
            {
                "id": agent.id,
                "name": agent.name,
                "chain": list(agent.chain),
                "chain_digest": agent.chain_digest.hex(),
                "org": agent.org,
                "path": list(agent.path),
                "expires_at": agent.expires_at,
            },
        )


class Control:
    """Finds the plugin that answers a path and renders its document as JSON."""

    def __init__(self, routes: Sequence[tuple[str, Routes]], guard: Guard) -> None:
        self._routes: tuple[tuple[str, Routes], ...] = (("core", WhoAmI()), *routes)
        self._guard = guard

    async def answer(self, request: Request) -> tuple[int, list[tuple[str, str]], bytes]:
        """(status, header fields, body). A route that raises or hangs affects that call only."""
        response = await self._respond(request)
        headers = [("Content-Type", "application/json"), ("Cache-Control", "no-store")]
        headers += list((response.headers or {}).items())
        return response.status, headers, msgspec.json.encode(response.document)

    async def _respond(self, request: Request) -> ControlResponse:
        found = next(((p, r) for p, r in self._routes if _under(request.path, r.prefix)), None)
        if found is None:
            known = ", ".join(sorted(r.prefix for _, r in self._routes))
            return _problem(404, "not_found", f"creto.internal has no {request.path}; it has {known}.")
        plugin, route = found
        call = ControlRequest(
            agent=request.agent,
            method=request.method,
            path=request.path,
            query=_query(request.query),
            body=request.body or b"",
        )
        try:
            async with asyncio.timeout(CEILING_S):
                return await self._guard.wait(plugin, "routes", _handle(route, call))
        except TimeoutError:
            return _problem(504, "timeout", "The answer took too long; ask again.")
        except StageFailed as error:
            return _problem(error.status, error.reason, error.detail)


def _under(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix.rstrip("/") + "/")


def _query(query: str) -> Mapping[str, str]:
    return dict(parse_qsl(query, keep_blank_values=True, max_num_fields=32))


def _problem(status: int, reason: str, detail: str) -> ControlResponse:
    kind = f"urn:creto:problem:{reason.replace('_', '-')}"
    return ControlResponse(status, {"type": kind, "status": status, "reason": reason, "detail": detail})


async def _handle(route: Routes, call: ControlRequest) -> ControlResponse:
    """A coroutine whatever the plugin made of its method, so that it is guarded from its first line."""
    return await route.handle(call)
