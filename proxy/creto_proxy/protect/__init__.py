"""What keeps one agent, one upstream or one burst from taking everything else with it.

``health``   which upstream addresses are in trouble: circuit breaker per permit key, ejection among the addresses of a
             name (breaker.py). ``retries``: how much of the traffic may be repetition (retries.py).
``load``     how late the event loop is, and which part of new requests is turned away for it (load.py).
``agents``   requests and connections of each agent (agents.py). ``arrivals``: new connections per link (agents.py).
``memory``   bodies that are held whole, all together (memory.py).
``pace``     bodies that come too slowly to be honest, in either direction (pace.py).

What is not configured is ``None`` or says "closed", "not late", "not full", decided once at start. Whoever takes
requests past the Python stages must honour exactly this:

1. Before anything else, unless the host is ``creto.internal``: while ``load.shedding`` (float) is not 0.0, ask
   ``load.shed()``, which raises for the part that is turned away. Only the timer of ``load`` ever writes it.
2. When the connection's ``InFlight`` is not None: ``enter()`` before the request is judged (False: refuse with
   ``too_many_requests``), ``leave()`` once at its end. In C that is ``count`` against ``limit``, both plain ints.
3. Before a body is collected: ``memory.take(n)`` (raises when full), and ``memory.give(n)`` once at the end.
4. Before an upstream connection is used, pooled ones too: ``health.bad`` (a dict) is empty, or
   ``health.allows(permit.key)``. Empty, which it is while nothing fails, there is nothing to ask.
5. At the end of a request that was sent: ``health.answered(key)`` when it was answered and ``health.bad`` is not empty,
   ``health.failed(key, why)`` when the answer was 502, 503 or 504, timed out, or broke off. A success while ``bad`` is
   empty need not be reported.
6. While it is under way the request is ``downstream.exchange`` of a connection in ``Gateway.open()``, so that ``pace``
   sees it; what no handler knows (``exchange.lane``) is ended by ``exchange.abort()``.
7. ``retries.requests += 1`` for each request sent, at once or in bulk: it only widens the budget for repeating.

Everything here belongs to one event loop and is touched on its thread alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from creto_proxy.protect.agents import Agents, Arrivals, InFlight, Seat
from creto_proxy.protect.load import Load
from creto_proxy.protect.memory import Memory
from creto_proxy.protect.pace import Pace
from creto_proxy.settings import Limits, Protect

__all__ = ["Agents", "Arrivals", "InFlight", "Load", "Memory", "Pace", "Protection", "Seat"]


@dataclass(frozen=True, slots=True)
class Protection:
    """What guards the agents' side; without arguments nothing is limited. ``upstream.Upstreams`` has the other side."""

    load: Load = field(default_factory=Load)
    memory: Memory = field(default_factory=Memory)
    agents: Agents | None = None
    arrivals: Arrivals | None = None
    pace: Pace | None = None

    @classmethod
    def configured(cls, limits: Limits, protect: Protect) -> Protection:
        """As the configuration has it; what is set to 0 there is off."""
        agents = Agents(limits.requests_per_agent, limits.connections_per_agent)
        pace = Pace(
            body_rate=limits.body_min_rate, grace_s=limits.body_timeout_s, silence_s=limits.stream_idle_timeout_s
        )
        return cls(
            load=Load(protect.shed_lag_ms / 1000),
            memory=Memory(limits.held_total_bytes),
            agents=agents if agents.limited else None,
            arrivals=Arrivals(limits.connections_per_second) if limits.connections_per_second else None,
            pace=pace,
        )

    def admit(self, share: InFlight | None) -> None:
        """Lets one request of the agent with that share in, or raises Transient; ``share.leave()`` at its end."""
        if self.load.shedding:
            self.load.shed()
        if share is not None:
            share.require()

    def enter(self, agent_id: str) -> InFlight | None:
        """As ``admit``, for a tunnel of the agent with that id; its share, if there is one."""
        share = self.agents.of(agent_id) if self.agents is not None else None
        self.admit(share)
        return share
