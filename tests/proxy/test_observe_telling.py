"""What is told from the journal: the access log, spans, and the trace context that is sent on."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import example, given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from creto_hotpath.counters import Counters
from creto_hotpath.journal import Journal
from creto_proxy.audit import encode
from creto_proxy.model import Outcome, Usage
from creto_proxy.observe import otlp
from creto_proxy.observe.access_log import AccessLog, line_of
from creto_proxy.observe.consumer import Followed, Tell, lag_gauges
from creto_proxy.observe.observer import Observer
from creto_proxy.observe.otlp import QUEUE, Traces
from creto_proxy.observe.spans import OPT_IN, span_of, wanted
from creto_proxy.observe.tracecontext import forward, sampled, span_id, traceparent
from creto_proxy.replay import Replay
from creto_proxy.testing import make_outcome, make_request

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{PARENT}-01"
SECRET = "sk-live-0123456789"


def outcome(**changes: Any) -> Outcome:
    made = make_outcome(make_request("POST", path="/v1/chat/completions", query=f"key={SECRET}", body=SECRET.encode()))
    for name, value in changes.items():
        setattr(made, name, value)
    return made


class TestTraceContext:
    @pytest.mark.parametrize(
        ("field", "kept"),
        [
            (GOOD, GOOD),
            (GOOD[:-2] + "00", GOOD[:-2] + "00"),
            (GOOD[:-2] + "03", GOOD[:-2] + "03"),
            (GOOD[:-2] + "ff", GOOD[:-2] + "03"),  # unknown flags are not ours to pass on
            ("cc" + GOOD[2:], GOOD),
            ("cc" + GOOD[2:] + "-what-the-future-brings", GOOD),
        ],
    )
    def test_well_formed(self, field: str, kept: str) -> None:
        assert traceparent([field]) == kept

    @pytest.mark.parametrize(
        "field",
        [
            "", GOOD[:-1], GOOD + "0", GOOD + "-", GOOD + "-00", GOOD.upper(), "ff" + GOOD[2:], " " + GOOD, GOOD + "\n",
            f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE}-{PARENT}-0g", f"0-{TRACE}-{PARENT}-01",
            f"cc-{TRACE}-{PARENT}-01.x", f"00_{TRACE}-{PARENT}-01", f"00-{TRACE}{PARENT}-01", GOOD + "," + GOOD,
            f"00-{TRACE[:-1]}é-{PARENT}-01", f"00-{TRACE[:-1]}\u0660-{PARENT}-01",
        ],
    )  # fmt: skip
    def test_malformed_is_none_at_all(self, field: str) -> None:
        assert traceparent([field]) == ""

    def test_more_than_one_is_none(self) -> None:
        assert traceparent([GOOD, GOOD]) == "" and traceparent([]) == ""

    @settings(deadline=None)
    @given(st.text(max_size=70))
    @example(GOOD)
    def test_what_is_taken_is_always_canonical(self, text: str) -> None:
        kept = traceparent([text])
        assert kept == "" or (len(kept) == 55 and traceparent([kept]) == kept)

    def test_only_a_recorded_trace_is_sent_on_with_our_span(self) -> None:
        request = make_request().id
        edits = {"accept-encoding": "identity"}
        assert forward(GOOD[:-2] + "00", request, edits) is edits and forward("", request, None) is None
        sent = forward(GOOD, request, edits)
        assert sent == {**edits, "traceparent": f"00-{TRACE}-{span_id(request):016x}-01"}
        assert edits == {"accept-encoding": "identity"} and traceparent([str(sent["traceparent"])]) != ""

    def test_the_request_takes_it_from_its_head(self) -> None:
        from creto_hotpath.http1 import parse_request
        from creto_proxy.target import Targets
        from creto_proxy.testing import make_agent, make_flow

        def trace_of(*fields: str) -> str:
            lines = "".join(f"{field}\r\n" for field in fields)
            parsed = parse_request(f"GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\n{lines}\r\n".encode())
            assert parsed is not None
            return Targets().request(parsed[0], make_flow(), make_agent(), 0).trace

        assert trace_of(f"TraceParent:  {GOOD} ") == GOOD
        assert trace_of() == "" and trace_of("traceparent: 00-x") == ""
        assert trace_of(f"traceparent: {GOOD}", f"Traceparent: {GOOD}") == ""


class TestSpans:
    def test_a_model_request_follows_the_conventions(self) -> None:
        usage = Usage("exact", "openai", "gpt-4o-mini-2024", {"input": 12, "output": 7, "cache_read": 3}, 4200)
        span = span_of(outcome(trace=GOOD, usage=usage, resource="model:gpt-4o-mini", policies=("p1",)), latest=False)
        assert span.name == "chat gpt-4o-mini"
        assert (span.trace, span.parent, span.flags) == (int(TRACE, 16), int(PARENT, 16), 1)
        assert span.end_ns - span.start_ns == 1_000_000
        for name, value in {
            "http.request.method": "POST",
            "http.response.status_code": 200,
            "url.full": "https://api.example.com:443/v1/chat/completions",
            "server.address": "api.example.com",
            "server.port": 443,
            "gen_ai.system": "openai",
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": "gpt-4o-mini",
            "gen_ai.response.model": "gpt-4o-mini-2024",
            "gen_ai.usage.input_tokens": 12,
            "gen_ai.usage.output_tokens": 7,
            "creto.agent": "spiffe://local/agent/tester",
            "creto.decision": "allow",
            "creto.policies": ("p1",),
            "creto.cost_nano_usd": 4200,
        }.items():
            assert span.attributes[name] == value, name
        assert "gen_ai.provider.name" not in span.attributes and span.error == ""
        assert SECRET not in repr(span)

    def test_the_latest_names_are_used_when_asked_for(self) -> None:
        usage = Usage("exact", "gemini", "g", {"input": 1, "output": 2, "cache_read": 3}, 0)
        made = outcome(usage=usage, target="/v1beta/models/g:generateContent")
        assert span_of(made, latest=False).attributes["gen_ai.system"] == "gcp.gemini"
        span = span_of(made, latest=True)
        assert span.attributes["gen_ai.provider.name"] == "gcp.gemini" and "gen_ai.system" not in span.attributes
        assert span.attributes["gen_ai.usage.cache_read.input_tokens"] == 3
        assert span.name == "generate_content g"

    def test_refusals_errors_and_tunnels(self) -> None:
        refused = span_of(outcome(decision="deny", reason="host_not_allowed", status=403), latest=False)
        assert refused.error == refused.attributes["error.type"] == "host_not_allowed" and refused.name == "POST"
        assert span_of(outcome(status=500), latest=False).error == "500"
        assert span_of(outcome(error="upstream_timeout", status=504), latest=False).error == "upstream_timeout"
        tunnel = span_of(outcome(kind="tunnel", method="", status=0, target=""), latest=False)
        assert tunnel.name == "tunnel" and "http.request.method" not in tunnel.attributes
        odd = span_of(outcome(method="BREW"), latest=False)
        assert odd.attributes["http.request.method"] == "_OTHER" and odd.name == "HTTP"

    def test_the_caller_decides_and_without_one_the_ratio(self) -> None:
        assert wanted(outcome(trace=GOOD), 0.0) and not wanted(outcome(trace=GOOD[:-2] + "00"), 1.0)
        assert all(wanted(outcome(), 1.0) for _ in range(50)) and not any(wanted(outcome(), 0.0) for _ in range(50))
        kept = sum(wanted(outcome(), 0.25) for _ in range(2000))
        assert 350 < kept < 650
        one = outcome()
        assert len({wanted(one, 0.5) for _ in range(5)}) == 1
        assert sampled(GOOD) and not sampled("")


class TestAccessLog:
    def log(self, path: Path, *, max_bytes: int = 0, keep: int = 2) -> AccessLog:
        self.counted = 0

        def count(lines: int) -> None:
            self.counted += lines

        return AccessLog(path, max_bytes=max_bytes, keep=keep, count=count)

    def test_a_line_tells_all_and_no_secret(self, tmp_path: Path) -> None:
        log = self.log(tmp_path / "a.log")
        usage = Usage("exact", "openai", 'mo"del\n\u2028', {"input": 3}, 7)
        log.write([outcome(trace=GOOD, usage=usage), outcome(decision="deny", status=403)])
        text = (tmp_path / "a.log").read_text()
        lines = [json.loads(line) for line in text.split("\n")[:-1]]
        assert len(lines) == self.counted == 2
        assert lines[0]["model"] == 'mo"del\n\u2028' and lines[0]["trace_id"] == TRACE
        assert lines[0]["time"] == "2026-01-01T00:00:00.000000Z" and lines[0]["tokens"] == {"input": 3}
        assert lines[1]["decision"] == "deny" and lines[0].keys() == lines[1].keys()
        assert SECRET not in text
        assert (tmp_path / "a.log").stat().st_mode & 0o777 == 0o600

    def test_every_field_is_documented(self) -> None:
        page = (Path(__file__).resolve().parents[2] / "docs/operations.md").read_text()
        assert [name for name in line_of(outcome()) if f"`{name}`" not in page] == []

    def test_a_file_that_was_moved_away_is_followed_by_a_new_one(self, tmp_path: Path) -> None:
        path = tmp_path / "a.log"
        log = self.log(path)
        log.write([outcome()])
        path.rename(tmp_path / "a.log.old")
        log.write([outcome(), outcome()])
        log.reopen()
        log.write([outcome()])
        assert len(path.read_bytes().splitlines()) == 3
        assert len((tmp_path / "a.log.old").read_bytes().splitlines()) == 1

    def test_a_large_file_makes_room_and_old_ones_go(self, tmp_path: Path) -> None:
        path = tmp_path / "a.log"
        one, two = self.log(path, max_bytes=2000), self.log(path, max_bytes=2000)
        for number in range(30):
            (one, two)[number % 2].write([outcome(status=number)])
        assert sorted(each.name for each in tmp_path.iterdir()) == ["a.log", "a.log.1", "a.log.2"]
        lines = [json.loads(line)["status"] for name in ("a.log.2", "a.log.1", "a.log") if (tmp_path / name).exists()
                 for line in (tmp_path / name).read_text().splitlines()]  # fmt: skip
        assert lines == sorted(lines) and lines[-1] == 29
        assert all((tmp_path / f"a.log.{n}").stat().st_size < 4000 for n in (1, 2))

    def test_what_a_full_disk_tore_ends_before_the_next_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        log = self.log(tmp_path / "a.log")
        write = os.write

        def half(fd: int, data: Any) -> int:
            if len(data) > 50:
                return write(fd, bytes(data[:50]))
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", lambda fd, data: half(fd, data[:51]) if len(data) <= 100 else write(fd, data[:50]) and half(fd, b""))
        with pytest.raises(OSError, match="No space"):
            log.write([outcome(status=1)])
        monkeypatch.undo()
        log.write([outcome(status=1)])
        torn, whole = (tmp_path / "a.log").read_text().splitlines()
        assert json.loads(whole)["status"] == 1 and len(torn) == 50

    def test_a_path_that_cannot_be_written_is_an_error_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(OSError):
            self.log(tmp_path / "none" / "a.log")


class Kept:
    """A sink that keeps what it is told, unless it is told to fail."""

    def __init__(self) -> None:
        self.ids: list[bytes] = []
        self.failures = 0

    def write(self, records: Sequence[Outcome]) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError(28, "No space left on device")
        self.ids += [record.id for record in records]

    def close(self) -> None:
        return None


def journal(directory: Path, worker: str, count: int = 3) -> list[bytes]:
    directory.mkdir(exist_ok=True)
    (directory / f"{worker}.lock").touch()
    made = [outcome() for _ in range(count)]
    with Journal(str(directory), worker, flush="record") as written:
        for each in made:
            written.append(encode(each))
    return [each.id for each in made]


class TestTell:
    def test_each_record_is_told_once_over_restarts_and_none_from_before(self, tmp_path: Path) -> None:
        journals, positions = tmp_path / "journal", tmp_path / "observe.pos"
        journal(journals, "before")
        told: list[bytes] = []
        expected: list[bytes] = []
        for life in range(3):
            sink = Kept()
            tell = Tell(journals, positions, [sink])
            if life:
                expected += journal(journals, f"worker{life}")
            replay = Replay(journals, f"own{life}", (tell,))
            replay.start()
            assert replay.stop()
            tell.close()
            told += sink.ids
        assert told == expected

    def test_a_sink_that_fails_gets_the_same_records_again(self, tmp_path: Path) -> None:
        sink = Kept()
        (tmp_path / "journal").mkdir()
        tell = Tell(tmp_path / "journal", tmp_path / "pos", [sink])
        sink.failures = 1
        records = [outcome(), outcome()]
        with pytest.raises(OSError):
            tell.apply("w-1.jnl", records, 100)
        assert tell.position("w-1.jnl") == 0
        tell.apply("w-1.jnl", records, 100)
        assert tell.position("w-1.jnl") == 100 and sink.ids == [record.id for record in records]

    def test_positions_are_shared_survive_torn_lines_and_do_not_pile_up(self, tmp_path: Path) -> None:
        (tmp_path / "journal").mkdir()
        one, two = (Tell(tmp_path / "journal", tmp_path / "pos", [Kept()]) for _ in range(2))
        journal(tmp_path / "journal", "w")
        (segment,) = (path.name for path in (tmp_path / "journal").glob("*.jnl"))
        one.apply(segment, [outcome()], 50)
        assert two.position(segment) == 50
        for upto in range(51, 5000):
            one.apply(segment, [], upto)
        with (tmp_path / "pos").open("ab") as file:
            file.write(f"{segment} 49".encode())  # torn: the end of the number is missing
        again = Tell(tmp_path / "journal", tmp_path / "pos", [Kept()])
        assert again.position(segment) == 4999
        assert (tmp_path / "pos").stat().st_size < 100

    def test_progress_failures_and_lag_can_be_seen(self, tmp_path: Path) -> None:
        journals = tmp_path / "journal"
        journals.mkdir()
        observer = Observer(Counters(str(tmp_path / "c.tab")), "0")
        sink = Kept()
        tell = Followed(Tell(journals, tmp_path / "pos", [sink]), observer)
        journal(journals, "w")
        (segment,) = journals.glob("*.jnl")
        (gauge,) = lag_gauges(journals, [tell]).values()
        assert tell.position(segment.name) == 0 and gauge() == segment.stat().st_size
        sink.failures = 1
        with pytest.raises(OSError):
            tell.apply(segment.name, [outcome()], segment.stat().st_size)
        tell.apply(segment.name, [outcome(), outcome()], segment.stat().st_size)
        cell = observer.registry.cell
        assert gauge() == 0
        assert observer.counters.get(cell("journal_records_total", "observe")) == 2
        assert observer.counters.get(cell("journal_consumer_errors_total", "observe")) == 1


class Collector:
    """An OTLP/HTTP receiver: decodes what it gets; ``status`` is what it answers."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.requests: list[ExportTraceServiceRequest] = []
        self.status = 200
        self.got = asyncio.Event()

    async def receive(self, request: web.Request) -> web.Response:
        if self.status == 200:
            decoded = ExportTraceServiceRequest()
            decoded.ParseFromString(await request.read())
            self.requests.append(decoded)
            self.spans += [s for r in decoded.resource_spans for scope in r.scope_spans for s in scope.spans]
        self.got.set()
        return web.Response(status=self.status, content_type="application/x-protobuf")


@pytest.fixture
async def collector() -> Any:
    made = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", made.receive)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"  # type: ignore[attr-defined]
    yield made
    await runner.cleanup()


class TestOtlp:
    async def test_spans_arrive_as_the_protocol_has_them(self, collector: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(OPT_IN, "http, gen_ai_latest_experimental")
        counts: dict[str, int] = {}
        traces = Traces(collector.url, ratio=1.0, count=lambda result, n: counts.update({result: counts.get(result, 0) + n}))
        usage = Usage("exact", "anthropic", "claude", {"input": 5, "output": 6}, 0)
        one = outcome(trace=GOOD, usage=usage, target="/v1/messages")
        refused = outcome(decision="deny", reason="host_not_allowed", status=403)
        traces.write([one, refused, outcome(trace=GOOD[:-2] + "00")])
        await asyncio.to_thread(traces.close)
        assert counts == {"exported": 2}
        first, second = collector.spans
        assert first.trace_id.hex() == TRACE and first.parent_span_id.hex() == PARENT
        assert first.span_id == one.id[8:] and first.kind == Span.SPAN_KIND_CLIENT
        assert first.end_time_unix_nano - first.start_time_unix_nano == one.total_ns
        values = {each.key: each.value for each in first.attributes}
        assert values["gen_ai.provider.name"].string_value == "anthropic"
        assert values["gen_ai.usage.output_tokens"].int_value == 6
        assert [v.string_value for v in values["creto.chain"].array_value.values] == list(one.chain)
        assert second.trace_id == refused.id and second.parent_span_id == b"" and second.status.code == 2
        resource = collector.requests[0].resource_spans[0]
        assert {each.key: each.value.string_value for each in resource.resource.attributes}["service.name"] == "creto"
        assert resource.scope_spans[0].schema_url == "https://opentelemetry.io/schemas/1.40.0"

    async def test_a_collector_that_refuses_or_is_away_costs_spans_and_nothing_else(
        self, collector: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(otlp, "FLUSH_S", 60.0)
        counts: dict[str, int] = {}
        collector.status = 400
        traces = Traces(collector.url, ratio=1.0, count=lambda result, n: counts.update({result: counts.get(result, 0) + n}))
        traces.write([outcome()])
        await collector.got.wait()
        traces.write([outcome() for _ in range(2 * QUEUE)])
        await asyncio.to_thread(traces.close)
        assert sum(counts.values()) == 2 * QUEUE + 1
        assert counts["failed"] >= 1 and counts.get("exported", 0) == 0 and counts["dropped"] >= 1
