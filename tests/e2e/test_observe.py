"""What an operator sees of a running sidecar: metrics, health, access log, traces, `creto top`, the dashboard."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from creto_proxy.observe.registry import FAMILIES

from .conftest import Creto
from .test_approvals import pending
from .test_ways import await_port, curl, free_port

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"
AGENT = "spiffe://local/agent/sidecar"


@dataclass
class Collector:
    """An OTLP/HTTP receiver on a thread of its own."""

    url: str = ""
    spans: list[Span] = field(default_factory=list)

    async def receive(self, request: web.Request) -> web.Response:
        decoded = ExportTraceServiceRequest()
        decoded.ParseFromString(await request.read())
        self.spans += [s for r in decoded.resource_spans for scope in r.scope_spans for s in scope.spans]
        return web.Response(content_type="application/x-protobuf")


@pytest.fixture
def collector() -> Iterator[Collector]:
    made, loop, stop, ready = Collector(), asyncio.new_event_loop(), asyncio.Event(), threading.Event()

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/v1/traces", made.receive)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: (loop.run_until_complete(serve()), loop.close()))
    thread.start()
    assert ready.wait(60)
    yield made
    loop.call_soon_threadsafe(stop.set)
    thread.join(60)


@dataclass
class Sidecar:
    """A running sidecar of two workers with everything on."""

    creto: Creto
    process: subprocess.Popen[str]
    proxy: str
    reverse: str
    admin: str
    log: Path

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        request = urllib.request.Request(self.admin + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def samples(self) -> dict[str, float]:
        """Name and labels as they stand in the text -> value."""
        lines = (line for line in self.get("/metrics")[1].splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def total(self, family: str, *labels: str) -> float:
        found = self.samples().items()
        return sum(value for name, value in found if name.startswith(family) and all(each in name for each in labels))

    def ask(self, path: str, *fields: str, host: str = "plain.allowed.test") -> str:
        options = [part for each in fields for part in ("-H", each)]
        return curl("-x", self.proxy, *options, f"http://{host}{path}")


@contextlib.contextmanager
def running(creto: Creto, extra: str = "") -> Iterator[Sidecar]:
    explicit, reverse, admin = free_port(), free_port(), free_port()
    log = creto.directory / "access.log"
    creto.add(
        f'\n[sidecar]\nworkers = 2\n[listen]\nexplicit = "127.0.0.1:{explicit}"\nreverse = "127.0.0.1:{reverse}"\n'
        '[[reverse]]\nname = "openai"\nupstream = "https://api.openai.com"\n'
        f'[policy]\ndir = "{creto.policies}"\n[admin]\nlisten = "127.0.0.1:{admin}"\n'
        f'[observe]\naccess_log = "{log}"\n{extra}'
    )
    process = subprocess.Popen(
        creto.command("sidecar"), env=creto.environment, cwd=creto.directory, text=True, stderr=subprocess.PIPE
    )
    try:
        for port in (explicit, reverse, admin):
            await_port(port, process)
        proxy, prefix, health = (f"http://127.0.0.1:{port}" for port in (explicit, reverse, admin))
        yield Sidecar(creto, process, proxy, prefix, health, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        sys.stderr.write(process.communicate(timeout=60)[1])


def until(holds: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + 60
    while not (found := holds()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


BUDGET = '[[metering.budgets]]\nlevel = "agent"\nmatch = "*"\nmetric = "tokens"\nlimit = 1000\nwindow = "day"\n'


def test_everything_that_happens_is_seen(creto: Creto, collector: Collector) -> None:
    with running(creto, f'otlp_endpoint = "{collector.url}"\n{BUDGET}') as sidecar:
        until(lambda: sidecar.get("/readyz")[0] == 200, "it is not ready")
        assert '"hello"' in sidecar.ask("/sampled?q=secret", f"traceparent: {SAMPLED}", "tracestate: a=1")
        assert '"hello"' in sidecar.ask("/unsampled", f"traceparent: {UNSAMPLED}", "tracestate: b=2")
        assert '"hello"' in sidecar.ask("/malformed", "traceparent: 00-nonsense")
        assert "host_not_allowed" in sidecar.ask("/", host="evil.test")
        client = openai.OpenAI(base_url=f"{sidecar.reverse}/openai/v1", api_key="sk-secret", max_retries=0)
        messages: Any = [{"role": "user", "content": "hello"}]
        client.chat.completions.create(model="gpt-4o-mini", max_tokens=40, messages=messages)
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="gpt-4o-mini", max_tokens=4000, messages=messages)
        check_propagation(sidecar, collector)
        check_spans(collector)
        check_access_log(sidecar)
        check_metrics(sidecar)
        check_top(sidecar)
        check_dashboard(sidecar)
    assert not list((creto.state / "metrics").glob("*/*")), "the counters of a run that ended are gone"


def check_propagation(sidecar: Sidecar, collector: Collector) -> None:
    sent = {r["path"]: {k.lower(): v for k, v in r["headers"].items()} for r in sidecar.creto.world.seen.requests}
    assert sent["/unsampled"]["traceparent"] == UNSAMPLED and sent["/unsampled"]["tracestate"] == "b=2"
    assert sent["/malformed"]["traceparent"] == "00-nonsense"
    forwarded = sent["/sampled"]["traceparent"]
    assert forwarded.startswith(f"00-{TRACE}-") and forwarded.endswith("-01") and PARENT not in forwarded
    assert sent["/sampled"]["tracestate"] == "a=1"
    span = until(lambda: next((s for s in collector.spans if s.trace_id.hex() == TRACE), None), "no span came")
    # What the upstream was told is its parent is the span that the collector got, and its parent is the agent's.
    assert span.span_id.hex() == forwarded[36:52] and span.parent_span_id.hex() == PARENT


def check_spans(collector: Collector) -> None:
    until(lambda: len(collector.spans) >= 5, "spans are missing")
    named = {span.name: {a.key: a.value for a in span.attributes} for span in collector.spans}
    chat = named["chat gpt-4o-mini"]
    assert chat["gen_ai.system"].string_value == "openai" and chat["gen_ai.usage.output_tokens"].int_value > 0
    assert chat["creto.agent"].string_value == AGENT
    assert not any("unsampled" in str(span.attributes) for span in collector.spans)
    assert all("secret" not in str(span) for span in collector.spans)


def check_access_log(sidecar: Sidecar) -> None:
    text = until(lambda: (t := sidecar.log.read_text()).count("\n") >= 6 and t, "lines are missing")
    lines = [json.loads(line) for line in text.splitlines()]
    assert {line["path"]: line["decision"] for line in lines if line["host"] == "plain.allowed.test"} == {
        "/sampled": "allow", "/unsampled": "allow", "/malformed": "allow",
    }  # fmt: skip
    (refused,) = [line for line in lines if line["host"] == "evil.test"]
    assert (refused["status"], refused["reason"]) == (403, "host_not_allowed")
    chats = [line for line in lines if line["path"] == "/v1/chat/completions"]
    assert chats[0]["tokens"]["output"] > 0 and chats[0]["trace_id"] == ""
    assert next(line for line in lines if line["path"] == "/sampled")["trace_id"] == TRACE
    assert "secret" not in text


def check_metrics(sidecar: Sidecar) -> None:
    until(lambda: sidecar.total("creto_journal_records_total", 'consumer="observe"') >= 6, "not told yet")
    assert sidecar.total("creto_requests_total", 'host="plain.allowed.test"', 'status_class="2xx"') == 3
    assert sidecar.total("creto_requests_total", 'decision="deny"', 'host="other"') >= 1
    assert sidecar.total("creto_quota_denied_total", 'level="agent"', 'metric="tokens"') >= 1
    assert sidecar.total("creto_overhead_seconds_count") == sidecar.total("creto_requests_total") == 6
    assert sidecar.total("creto_workers", 'state="ready"') == 2
    until(lambda: sidecar.total("creto_trace_spans_total", 'result="exported"') >= 5, "spans were not counted")
    assert sidecar.get("/metrics", Accept="application/openmetrics-text")[1].endswith("# EOF\n")
    assert len(json.loads(sidecar.get("/status")[1])["workers"]) == 2
    if shutil.which("promtool") is not None:
        done = promtool("check", "metrics", text=sidecar.get("/metrics")[1])
        assert done.returncode == 0, done.stdout + done.stderr


def check_top(sidecar: Sidecar) -> None:
    document = json.loads(sidecar.creto.call("top", "--once", "--json", "--interval", "0.2").stdout)
    assert {row["name"] for row in document["hosts"]} >= {"plain.allowed.test", "api.openai.com"}
    assert [row["worker"] for row in document["workers"]] == ["0", "1", "controller"]
    assert document["budgets"][0]["metric"] == "tokens" and document["budgets"][0]["used"] > 0
    screen = in_terminal(sidecar, lambda seen: AGENT in seen and "plain.allowed.test" in seen and "controller" in seen)
    assert "\x1b[?1049h" in screen and screen.rstrip().endswith("\x1b[?1049l"), "the screen is as it was before"
    plain = sidecar.creto.call("top", "--once", "--interval", "0.2").stdout
    assert "requests/s" in plain and "\x1b" not in plain


def in_terminal(sidecar: Sidecar, holds: Callable[[str], bool]) -> str:
    """What `creto top` wrote to a terminal until that ``holds``, then q."""
    ours, theirs = pty.openpty()
    environment = {**sidecar.creto.environment, "TERM": "xterm-256color", "COLUMNS": "160", "LINES": "60"}
    process = subprocess.Popen(
        sidecar.creto.command("top", "--interval", "0.3"), env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    screen, deadline, asked = "", time.monotonic() + 60, False
    try:
        while time.monotonic() < deadline:
            if not select.select([ours], [], [], 0.2)[0]:
                continue
            try:
                part = os.read(ours, 1 << 16).decode(errors="replace")
            except OSError:
                break  # the terminal is closed: it has ended
            if not part:
                break
            screen += part
            if not asked and holds(screen):
                asked = True
                os.write(ours, b"q")
        assert asked, screen
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return screen


def check_dashboard(sidecar: Sidecar) -> None:
    """Every series that the dashboard and the alerts name is in a real scrape, with the labels they name."""
    announced = set(re.findall(r"^# TYPE (\S+)", sidecar.get("/metrics")[1], re.M))
    expressions = list(dashboard_expressions()) + list(alert_expressions())
    assert len(expressions) > 50
    for expression in expressions:
        for name in re.findall(r"\bcreto_\w+", expression):
            family = re.sub(r"_(bucket|sum|count)$", "", name)
            assert family in announced, f"{name} in {expression}"
            allowed = {*FAMILIES[family.removeprefix("creto_")].labels, "job", "instance", "le"}
            grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}
            matched = set(re.findall(rf"{name}\{{([^}}]*)\}}", expression) and re.findall(r"(\w+)(?:=~|!~|!=|=)\"", expression))
            assert grouped <= allowed and matched <= allowed, expression


def dashboard_expressions() -> Iterator[str]:
    dashboard = json.loads((DEPLOY / "grafana" / "creto.json").read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in dashboard["panels"]:
        legends = {label for t in panel.get("targets", ()) for label in re.findall(r"{{(\w+)}}", t["legendFormat"])}
        text = " ".join(target["expr"] for target in panel.get("targets", ()))
        assert all(re.search(rf"\b{label}\b", text) for label in legends), panel["title"]
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (each["expr"] for each in dashboard["annotations"]["list"])


def alert_expressions() -> Iterator[str]:
    text = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    yield from (match for match in re.findall(r"expr: (?:\|\n)?((?:.|\n)*?)\n        (?:for|labels):", text))


def test_counters_outlive_the_workers_that_counted(creto: Creto) -> None:
    with running(creto) as sidecar:
        until(lambda: sidecar.get("/readyz")[0] == 200, "it is not ready")
        for number in range(6):
            sidecar.ask(f"/{number}")
        assert sidecar.total("creto_requests_total") == 6
        for worker in json.loads(sidecar.get("/status")[1])["workers"]:
            os.kill(worker["pid"], signal.SIGKILL)
        until(partial(_restarted, sidecar, 2), "nobody noticed")
        assert sidecar.total("creto_requests_total") == 6
        until(lambda: sidecar.get("/readyz")[0] == 200, "no worker came back")
        sidecar.ask("/again")
        assert sidecar.total("creto_requests_total") == 7
        creto.config.write_text(creto.config.read_text().replace("workers = 2", "workers = 1"))
        sidecar.process.send_signal(signal.SIGHUP)  # a new program image of the controller, and one new worker
        until(lambda: _reloaded(sidecar), "it did not reload")
        assert sidecar.total("creto_requests_total") == 7


def _restarted(sidecar: Sidecar, times: float) -> bool:
    return sidecar.total("creto_worker_restarts_total") == times


def _reloaded(sidecar: Sidecar) -> bool:
    try:
        return sidecar.total("creto_generation") == 2 and sidecar.total("creto_workers", 'state="ready"') == 1
    except OSError:
        return False  # between two images nobody answers for a moment


def test_a_request_that_waits_for_a_person_is_seen_to_wait(creto: Creto) -> None:
    with running(creto) as sidecar:
        until(lambda: sidecar.get("/readyz")[0] == 200, "it is not ready")
        (ca,) = creto.state.rglob("ca.pem")
        agent = threading.Thread(
            target=curl, args=("-x", sidecar.proxy, "--cacert", str(ca), "-d", "{}", "https://payments.example.com/v1/refunds")
        )
        agent.start()
        until(lambda: sidecar.total("creto_holds_open") == 1, "nobody is seen to wait")
        assert json.loads(creto.call("top", "--once", "--json", "--interval", "0.2").stdout)["holds_open"] == 1
        assert creto.call("approvals", "deny", pending(creto), "--reason", "no").returncode == 0
        agent.join(60)
        assert sidecar.total("creto_holds_open") == 0
        assert sidecar.total("creto_holds_total", 'result="denied"') == sidecar.total("creto_hold_seconds_count") == 1
        overhead = sidecar.total("creto_overhead_seconds_sum")
        assert overhead < sidecar.total("creto_hold_seconds_sum"), "what people take is not creto's"


def test_a_single_run_writes_the_access_log_too(creto: Creto) -> None:
    log = creto.directory / "run.log"
    creto.add(f'[observe]\naccess_log = "{log}"\n')
    done = creto.python(
        "import urllib.request\nprint(urllib.request.urlopen('http://plain.allowed.test/one').status)",
    )
    assert done.status == 0, done.err
    (line,) = [json.loads(each) for each in log.read_text().splitlines() if '"path":"/one"' in each]
    assert (line["status"], line["link"], line["agent"]) == (200, "run", "spiffe://local/agent/tester")
    assert not list((creto.state / "metrics").glob("*/*"))


def test_top_says_when_nothing_runs(creto: Creto) -> None:
    done = creto.call("top", "--once")
    assert done.returncode == 1 and "no creto runs on" in done.stderr


@pytest.mark.parametrize(
    ("toml", "line"),
    [
        ('[admin]\nlisten = "0.0.0.0:9464"\n', "admin.listen: 0.0.0.0:9464 can be reached from elsewhere"),
        ('[observe]\naccess_log = "/nowhere/at/all.log"\n', "observe.access_log: /nowhere/at/all.log: cannot be written"),
    ],
)
def test_what_cannot_be_had_is_said_before_anything_starts(creto: Creto, toml: str, line: str) -> None:
    creto.add(f'\n[listen]\nexplicit = "127.0.0.1:0"\n{toml}')
    done = creto.call("sidecar")
    assert done.returncode == 2 and line in done.stderr and "Traceback" not in done.stderr


needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed"
)


@needs_promtool
def test_prometheus_accepts_the_rules() -> None:
    done = promtool("check", "config", str(DEPLOY / "prometheus" / "prometheus.yml"))
    assert done.returncode == 0 and "14 rules found" in done.stdout, done.stdout + done.stderr
    done = promtool("test", "rules", str(Path(__file__).with_name("alerts.yml")))
    assert done.returncode == 0, done.stdout + done.stderr


def promtool(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], input=text, capture_output=True, text=True, check=False)
