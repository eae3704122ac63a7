"""The meter over a whole request: reserve, edit, watch, settle."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from creto_metering import Metering
from creto_metering.budgets import Budgets
from creto_proxy.hookspecs import ControlRequest, Meter, Tap
from creto_proxy.model import Decision, Request, Usage
from creto_proxy.testing import FakeClock, compose_plugin, make_agent, make_core, make_outcome, make_request

PRICED = {"model": "m1", "input": "1", "output": "10", "context_window": 1000, "max_output": 100}
DAY = {"level": "agent", "window": "day"}
USAGE = {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25}


class Sidecar:
    """The metering plugin as the core drives it."""

    def __init__(self, stages: Any) -> None:
        self.meter: Meter = stages.meters[0]
        self.ledger = stages.consumers[0]
        self.routes = stages.routes[0]

    def ask(self, body: dict[str, Any] | bytes, **more: Any) -> tuple[Request, Decision]:
        raw = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()
        request = make_request("POST", **{"host": "llm.test", "path": "/v1/chat/completions", "body": raw, **more})
        return request, self.meter.authorize(request)

    def answer(
        self, request: Request, body: Any, *, status: int = 200, media: str = "application/json", completed: bool = True
    ) -> Usage:
        tap = self.meter.tap(request, status, media)
        if tap is not None:
            tap.feed(body if isinstance(body, bytes) else json.dumps(body).encode())
            if completed:
                tap.finish()
        return self.meter.settle(request, tap, status=status, completed=completed)

    @property
    def budgets(self) -> Budgets:
        return self.meter.budgets  # type: ignore[attr-defined,no-any-return]

    def left(self, clock: FakeClock) -> list[tuple[Any, Any]]:
        rows = self.budgets.report(make_agent().path, clock.unix_ns())
        return [(row["used"], row["reserved"]) for row in rows]


@asynccontextmanager
async def sidecar(tmp_path: Path, clock: FakeClock, **settings: Any) -> AsyncIterator[Sidecar]:
    values = {"providers": {"llm.test": "openai", "claude.test": "anthropic"}, "price": [PRICED], **settings}
    plugins = compose_plugin(Metering, tmp_path, values, core=make_core(tmp_path, clock=clock))
    await plugins.start()
    try:
        yield Sidecar(plugins.stages)
    finally:
        assert await plugins.stop() == []


CHAT = {"model": "m1", "messages": [], "max_tokens": 50}
SIZE = len(json.dumps(CHAT, separators=(",", ":")))
RESERVED = (SIZE // 2) * 1000 + 50 * 10_000  # nano-dollars


async def test_exact_usage_replaces_the_reservation(tmp_path: Path) -> None:
    clock = FakeClock()
    budgets = [{**DAY, "metric": "cost_usd", "limit": "1"}, {**DAY, "metric": "tokens", "limit": 1000}]
    async with sidecar(tmp_path, clock, budgets=budgets) as creto:
        request, decision = creto.ask(CHAT)
        assert decision.allowed
        reserved_usd = f"0.{RESERVED:09d}".rstrip("0")
        assert creto.left(clock) == [("0.00", reserved_usd), (0, SIZE // 2 + 50)]
        usage = creto.answer(request, {"model": "m1", "usage": USAGE})
        assert usage == Usage("exact", "openai", "m1", {"input": 20, "output": 5, "total": 25}, 20 * 1000 + 5 * 10_000)
        assert creto.left(clock) == [("0.00007", "0.00"), (25, 0)]


@pytest.mark.parametrize(
    ("body", "media", "completed"),
    [
        (b"{}", "application/json", True),
        (b'{"usage":null}', "application/json", True),
        (b'{"usage":{"prompt_tokens":1', "application/json", False),
        (b"<html>", "text/html", True),
        (b'data: {"choices":[{}],"usage":{"prompt_tokens":1,"completion_tokens":1}}\n\n', "text/event-stream", False),
        (b'data: {"choices":[{}]}\n\n', "text/event-stream", True),
    ],
)
async def test_unknown_usage_keeps_the_whole_reservation(
    tmp_path: Path, body: bytes, media: str, completed: bool
) -> None:
    clock = FakeClock()
    async with sidecar(tmp_path, clock, budgets=[{**DAY, "metric": "tokens", "limit": 1000}]) as creto:
        request, _ = creto.ask(CHAT)
        usage = creto.answer(request, body, media=media, completed=completed)
        assert (usage.certainty, usage.cost_nano_usd) == ("unknown", RESERVED)
        assert creto.left(clock) == [(SIZE // 2 + 50, 0)]


async def test_stream_that_was_cut_short_is_never_refunded_but_charged_more_when_it_used_more(tmp_path: Path) -> None:
    clock = FakeClock()
    start = {"type": "message_start", "message": {"model": "m2", "usage": {"input_tokens": 900, "output_tokens": 1}}}
    body = {"model": "m2", "max_tokens": 10, "messages": []}
    price = {"provider": "anthropic", "model": "m2", "input": "1", "output": "10"}
    budgets = [{**DAY, "metric": "tokens", "limit": 10_000}]
    async with sidecar(tmp_path, clock, budgets=budgets, price=[price]) as creto:
        request, _ = creto.ask(body, host="claude.test", path="/v1/messages")
        cut = f"event: message_start\ndata: {json.dumps(start)}\n\n".encode()
        usage = creto.answer(request, cut, media="text/event-stream", completed=False)
        assert usage.certainty == "unknown"
        assert usage.tokens == {"input": 900, "output": 1, "total": 901}
        assert usage.cost_nano_usd == 900 * 1000 + 10_000
        assert creto.left(clock) == [(901, 0)]


async def test_upstream_error_gives_tokens_and_cost_back_and_counts_the_request(tmp_path: Path) -> None:
    clock = FakeClock()
    budgets = [{**DAY, "metric": m, "limit": "1000"} for m in ("requests", "tokens", "cost_usd")]
    async with sidecar(tmp_path, clock, budgets=budgets) as creto:
        request, _ = creto.ask(CHAT)
        usage = creto.answer(request, {"error": {"message": "no"}}, status=500)
        assert (usage.certainty, usage.cost_nano_usd) == ("none", 0)
        assert creto.left(clock) == [(1, 0), (0, 0), ("0.00", "0.00")]


async def test_request_that_is_never_sent_costs_nothing(tmp_path: Path) -> None:
    clock = FakeClock()
    budgets = [{**DAY, "metric": m, "limit": "1000"} for m in ("requests", "tokens")]
    async with sidecar(tmp_path, clock, budgets=budgets) as creto:
        request, _ = creto.ask(CHAT)
        creto.meter.release(request)
        creto.meter.release(request)
        assert creto.left(clock) == [(0, 0), (0, 0)]


async def test_request_decided_twice_is_reserved_once(tmp_path: Path) -> None:
    clock = FakeClock()
    async with sidecar(tmp_path, clock, budgets=[{**DAY, "metric": "tokens", "limit": 1000}]) as creto:
        request, _ = creto.ask(CHAT)
        assert creto.meter.authorize(request).allowed
        assert creto.left(clock) == [(0, SIZE // 2 + 50)]


async def test_spent_budget_is_refused_before_the_send_and_says_which_and_until_when(tmp_path: Path) -> None:
    clock = FakeClock()
    clock.advance(3600)
    budget = {**DAY, "match": "tester", "metric": "cost_usd", "limit": "0.001"}
    async with sidecar(tmp_path, clock, budgets=[budget]) as creto:
        request, _ = creto.ask(CHAT)
        creto.answer(request, {"model": "m1", "usage": {"prompt_tokens": 0, "completion_tokens": 60}})
        _, decision = creto.ask(CHAT)
        assert (decision.reason, decision.status, decision.retry_after_s) == ("budget_exhausted", 429, 23 * 3600)
        assert decision.facts == {
            "level": "agent:tester",
            "metric": "cost_usd",
            "limit": "0.001",
            "used": "0.0006",
            "reserved": "0.00",
            "requested": f"0.{RESERVED:09d}".rstrip("0"),
            "reset_at": "2026-01-02T00:00:00Z",
            "window": "day",
        }
        assert decision.detail.startswith("budget exhausted: agent:tester may use 0.001 dollars per day and has used or reserved 0.0006;")


async def test_request_larger_than_the_whole_budget_is_told_that_waiting_does_not_help(tmp_path: Path) -> None:
    async with sidecar(tmp_path, FakeClock(), budgets=[{**DAY, "metric": "tokens", "limit": 20}]) as creto:
        _, decision = creto.ask(CHAT)
        assert decision.retry_after_s is None
        assert "set a lower output limit" in decision.detail


async def test_rate_is_told_apart_from_a_budget_and_counts_every_request(tmp_path: Path) -> None:
    async with sidecar(tmp_path, FakeClock(), budgets=[{"rate": "1/m"}]) as creto:
        plain = make_request(host="api.example.com")
        assert creto.meter.authorize(plain).allowed
        assert creto.meter.settle(plain, None, status=200, completed=True) == Usage()
        _, decision = creto.ask(CHAT)
        assert (decision.reason, decision.status, decision.retry_after_s) == ("rate_exceeded", 429, 60.0)


async def test_plain_requests_are_neither_buffered_nor_stopped_by_a_spent_money_budget(tmp_path: Path) -> None:
    async with sidecar(tmp_path, FakeClock(), budgets=[{**DAY, "metric": "cost_usd", "limit": "0"}]) as creto:
        plain = make_request("POST", host="api.example.com", body=b"x")
        assert creto.meter.body_limit(plain) == 0
        assert creto.meter.authorize(plain).allowed
        assert creto.meter.edits(plain) is None
        assert creto.meter.tap(plain, 200, "application/json") is None
        request, decision = creto.ask(CHAT)
        assert creto.meter.body_limit(request) == 32 << 20
        assert decision.reason == "budget_exhausted"


async def test_stream_is_asked_for_usage_and_the_client_does_not_see_it(tmp_path: Path) -> None:
    async with sidecar(tmp_path, FakeClock()) as creto:
        request, _ = creto.ask(b'{"model":"m1","stream":true}')
        edits = creto.meter.edits(request)
        assert edits is not None
        assert edits.headers == {"accept-encoding": "identity"}
        assert edits.body == b'{"model":"m1","stream":true,"stream_options":{"include_usage":true}}'
        tap = creto.meter.tap(request, 200, "text/event-stream; charset=utf-8")
        assert tap is not None
        assert tap.rewrites
        shown = tap.feed(
            b'data: {"choices":[{}],"usage":null}\n\ndata: {"choices":[],"usage":'
            + json.dumps(USAGE).encode()
            + b"}\n\ndata: [DONE]\n\n"
        )
        assert shown == b'data: {"choices":[{}]}\n\ndata: [DONE]\n\n'
        assert tap.finish() == b""
        usage = creto.meter.settle(request, tap, status=200, completed=True)
        assert (usage.certainty, usage.tokens["total"], usage.model) == ("exact", 25, "m1")


@pytest.mark.parametrize(
    ("body", "settings"),
    [
        (b'{"model":"m1","stream":true,"stream_options":{"include_usage":true}}', {}),
        (b'{"model":"m1"}', {}),
        (b'{"model":"m1","stream":true}', {"include_usage": False}),
    ],
)
async def test_client_that_asked_itself_or_does_not_stream_is_left_alone(
    tmp_path: Path, body: bytes, settings: dict[str, Any]
) -> None:
    async with sidecar(tmp_path, FakeClock(), **settings) as creto:
        request, _ = creto.ask(body)
        edits = creto.meter.edits(request)
        assert edits is not None
        assert edits.body is None
        tap = creto.meter.tap(request, 200, "text/event-stream")
        assert isinstance(tap, object)
        assert tap is not None
        assert not tap.rewrites


@pytest.mark.parametrize("body", [b"", b"{", b'{"model":"m1","model":"m1"}', b'{"model":1}'])
async def test_body_that_cannot_be_metered_is_a_bad_request(tmp_path: Path, body: bytes) -> None:
    async with sidecar(tmp_path, FakeClock()) as creto:
        _, decision = creto.ask(body)
        assert (decision.allowed, decision.reason, decision.status) == (False, "bad_request_body", 400)


async def test_encoded_request_body_is_a_bad_request(tmp_path: Path) -> None:
    async with sidecar(tmp_path, FakeClock()) as creto:
        _, decision = creto.ask(CHAT, headers={"Content-Encoding": "gzip"})
        assert decision.reason == "bad_request_body"
        assert "gzip" in decision.detail


async def test_unknown_model_is_charged_the_default_or_denied(tmp_path: Path) -> None:
    clock = FakeClock()
    budgets = [{**DAY, "metric": "cost_usd", "limit": "1.50"}, {**DAY, "metric": "tokens", "limit": 100_000}]
    async with sidecar(tmp_path, clock, budgets=budgets, default_cost_usd="1.00") as creto:
        request, decision = creto.ask({**CHAT, "model": "mystery"})
        assert decision.allowed
        usage = creto.answer(request, {"model": "mystery-1", "usage": USAGE})
        assert (usage.certainty, usage.cost_nano_usd, usage.tokens["total"]) == ("estimated", 10**9, 25)
        assert creto.left(clock) == [("1.00", "0.00"), (25, 0)]
        _, decision = creto.ask({**CHAT, "model": "mystery"})
        assert decision.reason == "budget_exhausted"
    async with sidecar(tmp_path, clock, unknown_model="deny") as creto:
        _, decision = creto.ask({**CHAT, "model": "mystery"})
        assert (decision.reason, decision.status) == ("unknown_model", 403)


async def test_price_is_that_of_the_model_that_answered(tmp_path: Path) -> None:
    dear = {"model": "m1-pro", "input": "100", "output": "100"}
    async with sidecar(tmp_path, FakeClock(), price=[PRICED, dear]) as creto:
        request, _ = creto.ask(CHAT)
        usage = creto.answer(request, {"model": "m1-pro", "usage": USAGE})
        assert (usage.model, usage.cost_nano_usd) == ("m1-pro", 25 * 100_000)
        request, _ = creto.ask(CHAT)
        usage = creto.answer(request, {"model": "never-heard-of", "usage": USAGE})
        assert (usage.model, usage.cost_nano_usd) == ("never-heard-of", 70_000)


async def test_what_cannot_be_metered_is_refused_to_an_agent_with_a_money_budget(tmp_path: Path) -> None:
    money = [{**DAY, "metric": "cost_usd", "limit": "1"}]
    images = {"path": "/v1/images/generations"}
    socket = {"method": "GET", "path": "/v1/realtime", "headers": {"Upgrade": "websocket"}}
    for more in (images, socket, {"kind": "tunnel"}):
        request = make_request(**{"method": "POST", "host": "llm.test", **more})  # type: ignore[arg-type]
        async with sidecar(tmp_path, FakeClock(), budgets=money) as creto:
            assert creto.meter.authorize(request).reason == "unmetered_endpoint"
        async with sidecar(tmp_path, FakeClock(), budgets=money, unmetered="allow") as creto:
            assert creto.meter.authorize(request).allowed
        async with sidecar(tmp_path, FakeClock(), budgets=[{"rate": "9/s"}]) as creto:
            assert creto.meter.authorize(request).allowed


async def test_concurrent_requests_cannot_pass_together(tmp_path: Path) -> None:
    body = {**CHAT, "max_tokens": 100}
    per_request = len(json.dumps(body, separators=(",", ":"))) // 2 + 100
    budget = {**DAY, "metric": "tokens", "limit": 20 * per_request}
    async with sidecar(tmp_path, FakeClock(), budgets=[budget]) as creto:
        assert [creto.ask(body)[1].allowed for _ in range(50)].count(True) == 20


async def test_tap_of_somebody_else_leaves_usage_unknown(tmp_path: Path) -> None:
    class Foreign:
        rewrites = False

        def feed(self, data: bytes) -> None: ...
        def finish(self) -> None: ...

    async with sidecar(tmp_path, FakeClock()) as creto:
        request, _ = creto.ask(CHAT)
        foreign: Tap = Foreign()
        assert creto.meter.settle(request, foreign, status=200, completed=True).certainty == "unknown"


async def test_nothing_is_let_through_before_the_plugin_has_started(tmp_path: Path) -> None:
    meter = compose_plugin(Metering, tmp_path).stages.meters[0]
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="has not been started"):
        meter.authorize(make_request())


async def test_counters_survive_a_restart(tmp_path: Path) -> None:
    budgets = [{**DAY, "metric": "tokens", "limit": 30}]
    body = {"model": "m1", "max_tokens": 1}
    async with sidecar(tmp_path, FakeClock(), budgets=budgets) as creto:
        request, _ = creto.ask(body)
        creto.answer(request, {"usage": USAGE})
    async with sidecar(tmp_path, FakeClock(), budgets=budgets) as creto:
        assert creto.ask(body)[1].reason == "budget_exhausted"


async def test_agent_sees_its_own_usage_and_what_is_left(tmp_path: Path) -> None:
    clock = FakeClock()
    async with sidecar(tmp_path, clock, budgets=[{**DAY, "metric": "tokens", "limit": 1000}]) as creto:
        request, _ = creto.ask(CHAT)
        usage = creto.answer(request, {"model": "m1", "usage": USAGE})
        other = make_request(agent=make_agent("other"))
        creto.ledger.apply("s", [make_outcome(request, usage=usage), make_outcome(other, usage=usage)], 10)
        call = ControlRequest(make_agent(), "GET", "/v1/usage", {}, b"")
        answer = await creto.routes.handle(call)
        assert answer.status == 200
        assert answer.document["agent"] == "spiffe://local/agent/tester"
        assert answer.document["as_of"] == "2026-01-01T00:00:00Z"
        assert answer.document["usage"]["requests"] == 1
        assert answer.document["usage"]["cost_usd"] == "0.00007"
        assert [(m["key"], m["tokens"]["total"]) for m in answer.document["models"]] == [("m1", 25)]
        assert [(b["used"], b["remaining"]) for b in answer.document["budgets"]] == [(25, 975)]
        assert json.dumps(answer.document)
        for method, path, status in (("POST", "/v1/usage", 405), ("GET", "/v1/usage/other", 404)):
            refusal = await creto.routes.handle(ControlRequest(make_agent(), method, path, {}, b""))
            assert refusal.status == status
