"""What code running under creto may ask about itself, over ``http://creto.internal``.

    import creto

    print(creto.whoami()["id"])
    print(creto.usage()["cost_nano_usd"])
    print(creto.approval("01J...")["state"])

Nothing needs to be configured: the address exists only inside an agent's network, and who asks is known from the
connection. Answers are the JSON documents as they come.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any, cast
from urllib.parse import quote

BASE_URL = "http://creto.internal/v1"
TIMEOUT_S = 10.0

__all__ = ["CretoError", "NotGoverned", "approval", "usage", "whoami"]


class CretoError(Exception):
    """creto refused to answer. ``status`` is the HTTP status, ``problem`` its problem+json document (RFC 9457)."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        super().__init__(str(problem.get("detail") or problem.get("title") or f"HTTP {status}"))
        self.status = status
        self.problem = problem


class NotGoverned(CretoError):
    """There is no creto here: the program was not started with ``creto run``."""

    def __init__(self) -> None:
        super().__init__(0, {"detail": "creto.internal cannot be reached: start this program with `creto run`"})


def whoami() -> dict[str, Any]:
    """Identity of this agent: ``id``, ``name``, ``chain`` from the root human, ``expires_at`` in unix seconds."""
    return _get("whoami")


def usage() -> dict[str, Any]:
    """What this agent has used and what is left of its budgets, in the units of each meter."""
    return _get("usage")


def approval(id: str) -> dict[str, Any]:
    """State of one approval of this agent. Raises CretoError with status 404 when it has none of that id."""
    return _get(f"approvals/{quote(id, safe='')}")


def _get(path: str) -> dict[str, Any]:
    # Environments that set http_proxy for everything must not send this request around.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{BASE_URL}/{path}", timeout=TIMEOUT_S) as response:
            return cast(dict[str, Any], json.load(response))
    except urllib.error.HTTPError as error:
        with error:
            raise CretoError(error.code, _problem(error.read())) from None
    except (urllib.error.URLError, TimeoutError):
        raise NotGoverned from None


def _problem(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}
