"""How long a call can be kept open, and what keeps its client from giving up meanwhile.

Interim responses (RFC 9110 section 15.2) reset the read timeouts of most clients without committing a status, but not
the same one for all of them: repeated 102 ends python-requests and urllib (they return it as the answer), repeated
100 ends node's fetch. A client that is not known gets none, and a hold short enough for anybody.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from creto_proxy.model import Headers

CONTINUE, PROCESSING = 100, 102
# Upper bounds by client; the gate lowers them to its own ``hold_max_s``.
UNBOUNDED_S = math.inf
# aiohttp gives up 300 s after the start and undici after 300 s without a final head, whatever comes in between.
WALL_CLOCK_S = 240.0
# Below the 60 s that MCP clients allow a whole request.
MCP_S = 50.0
UNKNOWN_S = 4.0
# Nothing sensible has a shorter timeout than half a second; below it the heartbeat would be the load.
FASTEST_S = 0.25


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Send interim ``status`` (0: none) every ``every_s`` seconds, for ``limit_s`` seconds at most."""

    status: int
    every_s: float
    limit_s: float


NONE = Heartbeat(0, UNKNOWN_S, UNKNOWN_S)


def heartbeat(headers: Headers) -> Heartbeat:
    """How to hold the call of the client that sent ``headers``. ``Prefer: wait=N`` or ``respond-async`` (RFC 7240)
    shortens the hold, never lengthens it."""
    beat = _of_client(headers)
    wait_s = _preferred_wait_s(headers)
    return beat if wait_s is None else Heartbeat(beat.status, beat.every_s, min(beat.limit_s, wait_s))


def _of_client(headers: Headers) -> Heartbeat:
    agent = (headers.get("user-agent") or "").lower()
    if _speaks_mcp(headers):
        return Heartbeat(PROCESSING, 2.0, MCP_S)
    if headers.get("x-stainless-lang") is not None or agent.startswith(_LLM_SDKS):
        return _llm_sdk(headers)
    return next((beat for known, beat in _CLIENTS if known(agent)), NONE)


def _llm_sdk(headers: Headers) -> Heartbeat:
    """The openai and anthropic SDKs say how long they wait for a byte; half of that is soon enough."""
    javascript = (headers.get("x-stainless-lang") or "python").lower() == "js"
    timeouts = (_seconds(headers.get(name)) for name in ("x-stainless-read-timeout", "x-stainless-timeout"))
    shortest = min((timeout for timeout in timeouts if timeout), default=600.0)
    every_s = max(FASTEST_S, min(5.0, shortest / 2))
    return Heartbeat(PROCESSING, every_s, WALL_CLOCK_S if javascript else UNBOUNDED_S)


def _speaks_mcp(headers: Headers) -> bool:
    if any(headers.get(name) is not None for name in ("mcp-protocol-version", "mcp-session-id", "mcp-method")):
        return True
    accept = headers.get("accept") or ""
    return "application/json" in accept and "text/event-stream" in accept


def _preferred_wait_s(headers: Headers) -> float | None:
    wishes = [wish.strip().lower() for field in headers.getall("prefer") for wish in field.replace(";", ",").split(",")]
    if "respond-async" in wishes:
        return 0.0
    for wish in wishes:
        name, _, value = wish.partition("=")
        if name.strip() == "wait":
            return _seconds(value.strip().strip('"'))
    return None


def _seconds(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


_LLM_SDKS = ("openai/", "asyncopenai/", "anthropic/", "asyncanthropic/")
_BY_100 = Heartbeat(CONTINUE, 1.0, UNBOUNDED_S)
_BY_102 = Heartbeat(PROCESSING, 15.0, UNBOUNDED_S)
_BY_102_BOUNDED = Heartbeat(PROCESSING, 15.0, WALL_CLOCK_S)

# In order; the first that knows the user agent (in lower case) answers.
_CLIENTS: tuple[tuple[Callable[[str], bool], Heartbeat], ...] = (
    # 5 s of read timeout unless told otherwise.
    (lambda agent: agent.startswith("python-httpx"), Heartbeat(PROCESSING, 2.0, UNBOUNDED_S)),
    # They rarely have a timeout and never say so when they do, hence the short interval.
    (lambda agent: agent.startswith(("python-requests/", "python-urllib/", "python-urllib3/")), _BY_100),
    (lambda agent: " aiohttp/" in f" {agent}", _BY_102_BOUNDED),
    (lambda agent: agent.startswith(("curl/", "libcurl/", "git/")), _BY_102),
    (lambda agent: agent.startswith(("node", "undici")), _BY_102_BOUNDED),
)
