"""Which client is held with what, for how long."""

from __future__ import annotations

import math

import pytest

from creto_oversight.hold import NONE, Heartbeat, heartbeat
from creto_proxy.testing import FakeHeaders


def beat(agent: str, **fields: str) -> Heartbeat:
    return heartbeat(
        FakeHeaders({"User-Agent": agent, **{name.replace("_", "-"): value for name, value in fields.items()}})
    )


# (user agent, status, slowest interval that keeps it alive, longest hold that it survives)
TABLE = [
    ("OpenAI/Python 3.52.0", 102, 15, math.inf),
    ("AsyncOpenAI/Python 3.52.0", 102, 15, math.inf),
    ("Anthropic/Python 2.11.0", 102, 15, math.inf),
    ("AsyncAnthropic/Python 2.11.0", 102, 15, math.inf),
    ("python-httpx/0.28.1", 102, 2, math.inf),
    ("python-requests/2.34.2", 100, 15, math.inf),
    ("Python-urllib/3.11", 100, 15, math.inf),
    ("python-urllib3/2.8.0", 100, 15, math.inf),
    ("Python/3.11 aiohttp/3.14.5", 102, 15, 240),
    ("curl/7.88.1", 102, 15, math.inf),
    ("git/2.39.5", 102, 15, math.inf),
    ("node", 102, 15, 240),
    ("undici", 102, 15, 240),
]


@pytest.mark.parametrize(("agent", "status", "slowest_s", "longest_s"), TABLE, ids=[row[0] for row in TABLE])
def test_known_client(agent: str, status: int, slowest_s: float, longest_s: float) -> None:
    found = beat(agent)
    assert found.status == status
    assert 0 < found.every_s <= slowest_s
    assert 4 < found.limit_s <= longest_s


@pytest.mark.parametrize(
    "agent", ["", "Wget/1.21", "my-agent/1.0", "Go-http-client/1.1", "not curl/8", "x python-httpx/1"]
)
def test_unknown_client_gets_no_heartbeat_and_a_short_hold(agent: str) -> None:
    assert beat(agent) == NONE
    assert NONE.status == 0 and NONE.limit_s <= 4


@pytest.mark.parametrize(("declared", "slowest_s"), [("2", 1.0), ("600", 15.0), ("7.5", 3.75), ("0.0001", 0.25)])
def test_sdk_heartbeat_is_faster_than_half_its_declared_timeout(declared: str, slowest_s: float) -> None:
    assert beat("OpenAI/Python 3", x_stainless_read_timeout=declared).every_s <= slowest_s


@pytest.mark.parametrize("declared", ["NOT_GIVEN", "", "-1", "nan", "inf", "1e999", "0", "abc"])
def test_nonsense_timeouts_are_ignored(declared: str) -> None:
    assert beat("OpenAI/Python 3", x_stainless_timeout=declared) == beat("OpenAI/Python 3")


def test_a_renamed_sdk_is_known_by_its_other_fields() -> None:
    assert beat("my-product/1", x_stainless_lang="python") == beat("OpenAI/Python 3")
    assert beat("OpenAI/JS 6", x_stainless_lang="js").limit_s <= 240


@pytest.mark.parametrize(
    "fields",
    [
        {"mcp_protocol_version": "2025-11-25"},
        {"mcp_session_id": "x"},
        {"accept": "application/json, text/event-stream"},
    ],
)
def test_mcp_is_held_within_its_request_budget(fields: dict[str, str]) -> None:
    assert beat("python-httpx/0.28", **fields).limit_s <= 50
    assert beat("anything", **fields).limit_s <= 50


@pytest.mark.parametrize(
    ("prefer", "limit_s"),
    [("wait=3", 3.0), ("respond-async", 0.0), ("respond-async, wait=9", 0.0), ('foo; wait="2"', 2.0), ("wait=0", 0.0)],
)
def test_a_client_may_ask_for_a_shorter_hold(prefer: str, limit_s: float) -> None:
    assert beat("curl/8", prefer=prefer).limit_s == limit_s


@pytest.mark.parametrize("prefer", ["wait=1e9", "wait=-1", "wait=x", "wait", "return=minimal"])
def test_a_client_cannot_ask_for_a_longer_hold(prefer: str) -> None:
    assert beat("my-agent/1.0", prefer=prefer).limit_s == NONE.limit_s
