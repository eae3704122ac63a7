"""Counting and telling: what is counted is what Prometheus gets, from however many processes, dead ones included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from creto_hotpath.counters import Counters, read_counters
from creto_proxy.model import Decision, Outcome, Verdict
from creto_proxy.observe.aggregate import Base, aggregate, clear_dead, metrics_directory
from creto_proxy.observe.observer import Observer, Sampler
from creto_proxy.observe.registry import BOUNDS, FAMILIES, label_text, label_values
from creto_proxy.observe.scrape import BOUNDS_NS, Scrape, quantile, render, samples_of
from creto_proxy.observe.view import look, view
from creto_proxy.testing import make_agent, make_outcome, make_request
from creto_proxy.workers.status import NodeStatus, ReloadStatus, WorkerStatus

ALLOW = Decision(Verdict.ALLOW, "policy_permit")


def observer(directory: Path, name: str = "w0") -> Observer:
    directory.mkdir(parents=True, exist_ok=True)
    return Observer(Counters(str(directory / f"{name}.tab")), "0")


def outcome(**changes: Any) -> Outcome:
    made = make_outcome(make_request(host=changes.pop("host", "api.example.com")))
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def samples(text: str, *, openmetrics: bool = False) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by name and sorted labels, as Prometheus' own parser reads it."""
    families: Any = (parse_openmetrics if openmetrics else parse_text)(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def scraped(directory: Path, *, openmetrics: bool = False) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return samples(render(samples_of(aggregate(directory)), openmetrics=openmetrics), openmetrics=openmetrics)


def status(**changes: Any) -> NodeStatus:
    worker = WorkerStatus(slot=0, serial=1, pid=1, generation=1, state="ready", started_at=1.0)
    facts: dict[str, Any] = {
        "run": "r", "pid": 1, "version": "0.1.0", "started_at": 5.0, "generation": 1, "slots": 1, "workers": (worker,),
        "ready": True, "waiting": (), "stopping": False, "consumers_healthy": True, "restarts": 2, "policy": "",
        "reload": ReloadStatus(count=3, failed=1, at=7.0),
    }  # fmt: skip
    return NodeStatus(**{**facts, **changes})


@pytest.mark.parametrize("openmetrics", [False, True])
def test_a_request_is_counted_in_every_family_that_it_concerns(tmp_path: Path, openmetrics: bool) -> None:
    seen = observer(tmp_path)
    seen.request(outcome(total_ns=3_000_000, creto_ns=15_000, upstream_ns=2_900_000, bytes_up=10, bytes_down=20), ALLOW)
    seen.request(outcome(total_ns=3_000_000, creto_ns=15_000, upstream_ns=2_900_000), ALLOW)
    found = scraped(tmp_path, openmetrics=openmetrics)
    agent = ("agent", "spiffe://local/agent/tester")
    labels = (agent, ("decision", "allow"), ("host", "api.example.com"), ("method", "GET"), ("status_class", "2xx"))
    assert found["creto_requests_total", labels] == 2
    assert found["creto_decisions_total", (("cached", "no"), ("reason", "test"), ("verdict", "allow"))] == 2
    assert found["creto_bytes_total", (("direction", "up"),)] == 10
    assert found["creto_request_duration_seconds_sum", (agent,)] == 0.006
    assert found["creto_request_duration_seconds_bucket", (agent, ("le", "0.002"))] == 0
    assert found["creto_request_duration_seconds_bucket", (agent, ("le", "0.005"))] == 2
    assert found["creto_overhead_seconds_bucket", (agent, ("le", "1e-05"))] == 0
    assert found["creto_overhead_seconds_bucket", (agent, ("le", "2e-05"))] == 2
    assert found["creto_upstream_duration_seconds_count", (("host", "api.example.com"),)] == 2


def test_histogram_buckets_are_exact_at_their_bounds(tmp_path: Path) -> None:
    seen = observer(tmp_path)
    cell = seen.registry.cell("hold_seconds")
    for bound in BOUNDS_NS:
        seen.counters.observe(cell, bound)
        seen.counters.observe(cell, bound + 1)
    found = scraped(tmp_path)
    buckets = {
        float(dict(labels)["le"]): value for (name, labels), value in found.items() if name == "creto_hold_seconds_bucket"
    }
    # What equals a bound is in its bucket, what is a nanosecond more is not.
    assert [buckets[bound / 1e9] for bound in BOUNDS_NS] == [2 * n + 1 for n in range(len(BOUNDS_NS))]
    assert buckets[float("inf")] == found["creto_hold_seconds_count", ()] == 2 * len(BOUNDS_NS)


def test_a_budgets_refusal_is_counted_by_level_and_metric(tmp_path: Path) -> None:
    seen = observer(tmp_path)
    facts = {"level": "agent:researcher", "metric": "cost_usd"}
    refusal = Decision(Verdict.DENY, "budget_exhausted", status=429, facts=facts)
    seen.request(outcome(decision="deny", reason="budget_exhausted", status=429), refusal)
    seen.request(outcome(decision="deny", reason="host_not_allowed", status=403), Decision(Verdict.DENY, "host_not_allowed"))
    found = scraped(tmp_path)
    assert found["creto_quota_denied_total", (("level", "agent"), ("metric", "cost_usd"))] == 1
    assert sum(value for (name, _), value in found.items() if name == "creto_quota_denied_total") == 1


def test_holds_are_open_while_somebody_thinks(tmp_path: Path) -> None:
    seen = observer(tmp_path)
    seen.holding(1)
    assert scraped(tmp_path)["creto_holds_open", ()] == 1
    seen.holding(-1)
    seen.held(2_000_000_000, Decision(Verdict.ESCALATE, "approval_pending"))
    found = scraped(tmp_path)
    assert found["creto_holds_open", ()] == 0
    assert found["creto_holds_total", (("result", "pending"),)] == 1
    assert found["creto_hold_seconds_sum", ()] == 2


def test_agents_cannot_fill_the_monitoring_system(tmp_path: Path) -> None:
    seen = observer(tmp_path)
    for number in range(400):
        name = f"h{number}.example.com"
        seen.request(outcome(host=name, decision="deny", status=403), None)  # never allowed: no name of its own
        seen.request(outcome(host=name, agent=make_agent(f"a{number}").id, method=f"M{number}"), ALLOW)
    entries = [entry.name for entry in read_counters(tmp_path / "w0.tab").entries]
    requests = [label_values(entry) for entry in entries if entry.startswith("creto_requests_total")]
    assert len({values[0] for values in requests}) <= BOUNDS["agent"] + 1
    assert len({values[1] for values in requests}) <= BOUNDS["host"] + 1
    assert {values[2] for values in requests} == {"GET", "other"}
    assert {values[1] for values in requests if values[3] == "deny"} == {"other"}
    total = sum(value for (name, _), value in scraped(tmp_path).items() if name == "creto_requests_total")
    assert total == 800, "what has no place of its own is counted all the same"


def test_when_the_file_is_full_counting_goes_on_without_the_new_names(tmp_path: Path) -> None:
    counters = Counters(str(tmp_path / "w0.tab"), 3000, 1 << 14)
    seen = Observer(counters, "0")
    for number in range(50):
        seen.request(outcome(host=f"h{number}"), ALLOW)
    found = scraped(tmp_path)
    assert found["creto_bytes_total", (("direction", "up"),)] == 0
    assert any(name == "creto_requests_total" for name, _ in found)


@pytest.mark.parametrize("value", ['a"b', "a\\b", "a\\", 'x",host="y', "line\nbreak", "tab\t", "\u202eevil", "ä€"])
def test_labels_survive_every_text(tmp_path: Path, value: str) -> None:
    text = label_text(("reason",), (value,))
    shown = "".join(char if char.isprintable() else "?" for char in value)
    assert label_values(text) == (shown,)
    assert samples(f"x{text} 1\n") == {("x", (("reason", shown),)): 1}
    assert "\n" not in text and "\t" not in text


def test_every_family_is_announced_with_help_and_type() -> None:
    text = render({}, openmetrics=False)
    for family in FAMILIES.values():
        assert f"# HELP {family.full_name} " in text and f"# TYPE {family.full_name} {family.kind}\n" in text
        assert (family.kind == "counter") == family.name.endswith("_total")
    assert render({}, openmetrics=True).endswith("# EOF\n")


def test_processes_are_summed_and_gauges_die_with_theirs(tmp_path: Path) -> None:
    one, two = observer(tmp_path, "w0"), observer(tmp_path, "w1")
    for each in (one, two):
        each.request(outcome(), ALLOW)
        each.holding(1)
    assert scraped(tmp_path)["creto_holds_open", ()] == 2
    two.close()
    found = scraped(tmp_path)
    assert found["creto_holds_open", ()] == 1
    assert found["creto_request_duration_seconds_count", (("agent", "spiffe://local/agent/tester"),)] == 2


def test_counters_never_go_back_when_processes_die_and_controllers_are_replaced(tmp_path: Path) -> None:
    key = ("creto_bytes_total", (("direction", "up"),))
    first = Base(tmp_path)
    expected = 0
    for name in ("w1", "w2", "w3"):
        worker = observer(tmp_path, name)
        worker.request(outcome(bytes_up=7), ALLOW)
        expected += 7
        worker.close()
        assert scraped(tmp_path)[key] == expected
        assert first.fold() == 1
        assert not (tmp_path / f"{name}.tab").exists()
        assert scraped(tmp_path)[key] == expected
    assert first.fold() == 0
    first.close()
    second = Base(tmp_path)
    assert second.fold() == 1
    assert scraped(tmp_path)[key] == expected
    assert len(list(tmp_path.iterdir())) == 1
    agent = (("agent", "spiffe://local/agent/tester"),)
    assert scraped(tmp_path)["creto_request_duration_seconds_count", agent] == 3


def test_the_counters_of_dead_runs_are_cleared_and_living_ones_kept(tmp_path: Path) -> None:
    dead, living = metrics_directory(tmp_path, "dead"), metrics_directory(tmp_path, "living")
    observer(dead).close()
    seen = observer(living)
    clear_dead(tmp_path)
    assert not dead.exists() and (living / "w0.tab").exists()
    seen.close()


def test_the_node_tells_about_itself(tmp_path: Path) -> None:
    text = Scrape(tmp_path, tmp_path)(status(), openmetrics=False).decode()
    found = samples(text)
    assert found["creto_ready", ()] == 1
    assert found["creto_worker_restarts_total", ()] == 2
    assert found["creto_workers", (("state", "ready"),)] == 1
    assert found["creto_config_last_reload_successful", ()] == 0
    assert found["creto_config_last_reload_timestamp_seconds", ()] == 7
    assert ("creto_reservations", ()) not in found, "no quota table, no word about one"


def test_the_quota_table_is_looked_at_from_outside(tmp_path: Path) -> None:
    from creto_hotpath.quota import TOTAL, QuotaTable

    table = QuotaTable(str(tmp_path / "quota.tab"), slots=64, reservations=8)
    key = table.key("k")
    table.define(key, TOTAL, 100)
    path = table.path([(key, 0)])
    holds = [table.reserve(path, (1,), 1, 10**9) for _ in range(3)]
    table.release(holds[0])
    found = samples(Scrape(tmp_path, tmp_path)(status(), openmetrics=False).decode())
    assert found["creto_reservations", ()] == 2
    assert found["creto_quota_table_occupancy", ()] == 1 / 64
    (tmp_path / "quota.tab").write_bytes(b"something else" * 1000)
    assert ("creto_reservations", ()) not in samples(Scrape(tmp_path, tmp_path)(status(), openmetrics=False).decode())


def test_the_sampler_measures_the_process_and_asks_its_gauges(tmp_path: Path) -> None:
    seen = observer(tmp_path)
    Sampler(seen, {("connections",): lambda: 5, ("overload_shed_total", "overloaded"): lambda: 3}).sample()
    found = scraped(tmp_path)
    assert found["creto_connections", (("worker", "0"),)] == 5
    assert found["creto_overload_shed_total", (("reason", "overloaded"),)] == 3
    assert found["creto_process_resident_memory_bytes", (("worker", "0"),)] > 1 << 20
    assert 0 < found["creto_process_cpu_seconds_total", (("worker", "0"),)] < 10_000
    with pytest.raises(KeyError):
        Sampler(seen, {("nothing",): lambda: 1})


def test_quantiles_are_known_within_a_tenth(tmp_path: Path) -> None:
    seen = observer(tmp_path)
    cell = seen.registry.cell("hold_seconds")
    for value in range(1, 1001):
        seen.counters.observe(cell, value * 1_000_000)
    cells = next(e.values for e in read_counters(tmp_path / "w0.tab").entries if e.name == "creto_hold_seconds")
    for share in (0.5, 0.9, 0.99):
        found = quantile(cells, share)
        assert found is not None and 1.0 <= found / (share * 1e9) <= 1.1
    assert quantile(seen_nothing(tmp_path), 0.5) is None


def seen_nothing(tmp_path: Path) -> Any:
    seen = observer(tmp_path, "none")
    seen.registry.cell("loop_lag_seconds", "0")
    entries = read_counters(tmp_path / "none.tab").entries
    return next(e.values for e in entries if e.name.startswith("creto_loop_lag_seconds"))


def test_top_sees_what_has_happened_between_two_looks(tmp_path: Path) -> None:
    assert look(tmp_path) is None
    seen = observer(metrics_directory(tmp_path, "run"))
    sampler = Sampler(seen, {("connections",): lambda: 2})
    sampler.sample()
    seen.request(outcome(), ALLOW)
    before = look(tmp_path)
    for _ in range(3):
        seen.request(outcome(host="b.test", creto_ns=20_000, total_ns=5_000_000, upstream_ns=4_000_000), ALLOW)
    seen.request(outcome(host="evil.test", decision="deny", reason="host_not_allowed", status=403), None)
    seen.holding(1)
    now = look(tmp_path)
    assert before is not None and now is not None
    shown = view(before, now)
    assert round(shown.requests * shown.seconds) == 4 and round(shown.refused * shown.seconds) == 1
    assert {row.name: round(row.requests * shown.seconds) for row in shown.hosts} == {
        "b.test": 3, "other": 1, "api.example.com": 0,
    }  # fmt: skip
    assert [(verdict, reason) for verdict, reason, _ in shown.decisions] == [("allow", "test"), ("deny", "host_not_allowed")]
    assert shown.hosts[0].p50_ms == pytest.approx(4.0, rel=0.1)
    assert shown.agents[0].p99_ms == pytest.approx(5.0, rel=0.1)
    assert shown.holds_open == 1 and shown.connections == 2
    assert [row.worker for row in shown.workers] == ["0"]
    seen.close()
    assert look(tmp_path) is None, "a dead creto shows nothing"


def test_a_worker_that_is_replaced_does_not_show_as_a_negative_rate(tmp_path: Path) -> None:
    directory = metrics_directory(tmp_path, "run")
    keeps, dies = observer(directory, "keeps"), observer(directory, "dies")
    for _ in range(5):
        dies.request(outcome(), ALLOW)
    before = look(tmp_path)
    dies.close()
    (directory / "dies.tab").unlink()
    keeps.request(outcome(), ALLOW)
    now = look(tmp_path)
    assert before is not None and now is not None
    assert view(before, now).requests >= 0


def test_seeing_costs_the_request_path_no_import(tmp_path: Path) -> None:
    """What the path imports brings neither a web server nor an SDK with it."""
    code = "import sys, creto_proxy.service; print([m for m in ('aiohttp', 'opentelemetry', 'requests') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
