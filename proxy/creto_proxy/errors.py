"""Every way to fail, the status an agent sees for it, and whether trying again can help.

Four families, after the seeds' ``ErrorKind``: ``Transient`` (try again later), ``Permanent`` (it will not get
better), ``Refused`` (a decision, with its reason) and ``Held`` (a person has not answered yet). Status codes live
here and in ``Decision.status`` only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from creto_proxy.model import Decision


class CretoError(Exception):
    """Base of all failures of the request path. ``status`` is what the agent sees, ``reason`` is stable."""

    status = 500
    reason = "internal_error"

    def __init__(self, detail: str, *, reason: str | None = None, status: int | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        if reason is not None:
            self.reason = reason
        if status is not None:
            self.status = status


class Transient(CretoError):
    """May succeed when repeated after ``retry_after_s`` seconds."""

    status = 503
    reason = "unavailable"

    def __init__(
        self, detail: str, *, retry_after_s: float = 1.0, reason: str | None = None, status: int | None = None
    ) -> None:
        super().__init__(detail, reason=reason, status=status)
        self.retry_after_s = retry_after_s


class Permanent(CretoError):
    """Will fail again unless something is changed."""

    status = 502
    reason = "bad_gateway"


class Refused(CretoError):
    """A stage said no."""

    status = 403
    reason = "refused"

    def __init__(self, decision: Decision) -> None:
        super().__init__(decision.detail or decision.reason, reason=decision.reason, status=decision.status)
        self.decision = decision


class Held(CretoError):
    """A person has been asked and has not answered while the agent's call could be held open."""

    status = 428
    reason = "approval_pending"

    def __init__(self, detail: str, *, approval_id: str, facts: Mapping[str, Any] | None = None) -> None:
        super().__init__(detail)
        self.approval_id = approval_id
        self.facts: Mapping[str, Any] = facts or {}


class UpstreamUnreachable(Permanent):
    """The permitted address did not accept the connection or its certificate did not verify."""

    status = 502
    reason = "upstream_unreachable"


class UpstreamTimeout(Transient):
    """The upstream took longer than its deadline."""

    status = 504
    reason = "upstream_timeout"


class StageFailed(CretoError):
    """A plugin raised or overran its deadline in a stage; the request is refused and the rest go on."""

    status = 503
    reason = "stage_failed"


class ConfigError(Exception):
    """The configuration cannot be used. ``problems`` holds one line per mistake: file, key, reason."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Unsupported(Exception):
    """This machine cannot do what was asked (no user namespaces, say). The text says why and what to do."""
