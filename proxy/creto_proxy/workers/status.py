"""What a node knows about itself: the facts behind readiness, ``/metrics`` and ``creto top``.

``Controller.status()`` gives a ``NodeStatus``; over the control socket it is its ``document()``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

# starting: not serving yet. ready: accepts. draining: serves what it has and ends. dead: waits to be started again.
State = Literal["starting", "ready", "draining", "dead"]


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker process as the controller last heard of it, at most about a second ago.

    slot: its place, 0 to N-1; serial: unique among all workers of this run. generation: of configuration and code;
    those of older ones are draining. started_at: unix seconds. connections: of agents, open now. requests: outcomes
    recorded since it was started. journal_healthy: False while it cannot record, and so refuses. heard_s: seconds
    since it last said anything. facts: further numbers that its stages offer, by name (``Service.facts``).
    """

    slot: int
    serial: int
    pid: int
    generation: int
    state: State
    started_at: float
    connections: int = 0
    requests: int = 0
    journal_healthy: bool = True
    heard_s: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def dead(cls, slot: int, generation: int) -> WorkerStatus:
        """Of a slot whose worker ended and has not been started again yet: there is no process."""
        return cls(slot=slot, serial=0, pid=0, generation=generation, state="dead", started_at=0.0)


@dataclass(frozen=True, slots=True)
class ReloadStatus:
    """How the last reload ended. failed: 0, or the number of problems that kept everything as it was."""

    count: int = 0
    failed: int = 0
    problems: tuple[str, ...] = ()
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """The controller and its workers. started_at: of the controller, unix seconds; survives a hot restart.

    ready: every slot has a worker that accepts, the journals can be written, and nobody has told creto to stop.
    waiting: why not, for people. consumers_healthy: False while ledger or audit log are behind and being retried.
    restarts: workers that ended without being told to. policy: digest of the policies in force.
    """

    run: str
    pid: int
    version: str
    started_at: float
    generation: int
    slots: int
    workers: tuple[WorkerStatus, ...]
    ready: bool
    waiting: tuple[str, ...]
    stopping: bool
    consumers_healthy: bool
    restarts: int
    policy: str
    reload: ReloadStatus

    def document(self) -> dict[str, Any]:
        """As JSON and msgpack can hold it."""
        return asdict(self)
