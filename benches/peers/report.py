"""Writes docs/performance.md and its plots from what was measured, and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plots

from peers.bars import Bar, bars
from peers.cpu import TOGETHER
from peers.markdown import bullets, grid, prose
from peers.sections import SECTIONS, soak_section

ROOT = Path(__file__).resolve().parents[2]
CPU_PLOT, SOAK_PLOT = "performance.svg", "performance-soak.svg"
# More of the machine used by others than this, and a figure is not to be quoted.
NOISY = 0.05

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Places:
    """kept: the folder of what was measured. docs: that of the page and its plots."""

    kept: Path
    docs: Path

    @property
    def peers(self) -> Path:
        return self.kept / "peers.json"

    @property
    def soak(self) -> Path:
        return self.kept / "soak.json"

    @property
    def page(self) -> Path:
        return self.docs / "performance.md"


PUBLISHED = Places(ROOT / ".benchmarks", ROOT / "docs")
DRAFT = Places(ROOT / ".benchmarks/draft", ROOT / ".benchmarks/draft")


def write(places: Places = PUBLISHED) -> list[str]:
    """Writes page and plots; gives the table of bars as lines for a terminal."""
    places.docs.mkdir(parents=True, exist_ok=True)
    answers = json.loads(places.peers.read_text()) if places.peers.exists() else {}
    soak = json.loads(places.soak.read_text()) if places.soak.exists() else None
    found = bars(answers, soak)
    panels = list(cpu_panels(answers))
    if panels:
        plot = plots.bars("CPU per request, by proxy", "microseconds per request (log scale)", panels)
        (places.docs / CPU_PLOT).write_text(plot)
    if soak:
        (places.docs / SOAK_PLOT).write_text(soak_plot(soak))
    lines = [*opening(answers, found, bool(panels)), *conditions(answers, soak), *method()]
    for section in SECTIONS:
        lines += section(answers)
    lines += soak_section(soak)
    places.page.write_text("\n".join(lines).rstrip("\n") + "\n")
    return terminal(found)


def terminal(found: Sequence[Bar]) -> list[str]:
    width = max(len(bar.what) for bar in found)
    return ["", *(f"{verdict(bar):>4}  {bar.what:{width}}  {bar.least}: {bar.measured}" for bar in found), ""]


def verdict(bar: Bar) -> str:
    return {True: "yes", False: "NO", None: "-"}[bar.holds]


def opening(answers: Row, found: Sequence[Bar], plotted: bool) -> Iterator[str]:
    yield "# Performance"
    yield ""
    yield from prose(
        "Written by `make bench-peers` and `make soak` from their measurements; edit `benches/peers/`, not this",
        "page. Each question is asked of Creto and of named baselines in the same run, alternating, against the",
        "same upstream with the same client. Ratios hold on other machines; absolute numbers belong to the",
        "conditions named below.",
    )
    yield from noise(answers)
    yield "## What must hold"
    yield ""
    yield from grid(
        ("what", "at least", "measured", "holds"), [(bar.what, bar.least, bar.measured, verdict(bar)) for bar in found]
    )
    if missed := [bar for bar in found if bar.holds is False]:
        said = " ([what the profile says](#what-the-profile-says))" if "profile" in answers else ""
        yield from prose(f"Not reached, and by how much{said}:")
        yield from bullets([f"{bar.what}: {bar.by or bar.measured}." for bar in missed])
    if unknown := [bar for bar in found if bar.holds is None]:
        yield from prose("Not decided:")
        yield from bullets([f"{bar.what}: {bar.by or bar.measured}." for bar in unknown])
    if plotted:
        yield f"![CPU per request by proxy, logarithmic scale]({CPU_PLOT})"
        yield ""


def noise(answers: Row) -> Iterator[str]:
    """What makes this run one not to quote."""
    shares = [
        row["foreign"][0]
        for question in ("cpu", "tls", "latency")
        for load in answers.get(question, {}).get("loads", [])
        for row in load["rows"]
        if row.get("foreign")
    ]
    if loud := [share for share in shares if share > NOISY]:
        yield from prose(
            f"**A noisy run, not to be quoted:** in {len(loud)} of {len(shares)} measurements other programs used",
            f"more than {NOISY:.0%} of the machine, up to {max(loud):.0%}. The column *foreign* says where.",
        )


def conditions(answers: Row, soak: Row | None) -> Iterator[str]:
    yield "## Conditions"
    yield ""
    ran = {name: answer["conditions"] for name, answer in answers.items()}
    if soak:
        ran["soak"] = soak["conditions"]
    versions: dict[str, str] = {}
    for answer in answers.values():
        versions.update(answer["versions"])
    machines = sorted({machine(each) for each in ran.values()})
    yield from bullets([*machines, ", ".join(f"{name} {number}" for name, number in versions.items())])
    rows = [
        (name, f"`{c['command']}`", c["at"], str(c.get("rounds", "")), f"{c['seconds']:g}" if "seconds" in c else "")
        for name, c in ran.items()
    ]
    yield from grid(("question", "command", "at", "rounds", "seconds each"), rows)


def machine(found: Row) -> str:
    return (
        f"{found['cores']} cores of {found['processor']}, {found['memory_gib']} GiB, {found['kernel']}, "
        f"{found['system']}, Python {found['python']}"
    )


def method() -> Iterator[str]:
    yield "## Method"
    yield ""
    yield from prose(
        "Every proxy is started first; then rounds alternate between them, forwards and backwards. Client (`wrk",
        "-t1`) and upstream (nginx, a constant answer) are pinned to the first core, what carries requests to the",
        "second: each proxy with all its processes and threads, Creto with its worker. Creto's controller, which",
        "derives ledger and audit log and carries no request, runs on the first core beside client and upstream; one",
        "row says what it costs when it shares the second with the worker. CPU per request is the run time of the",
        "proxy's whole process tree (`/proc/PID/task/TID/schedstat`), on whichever core, over the requests it",
        "answered. Figures are medians over the rounds with the least and the most of them; *foreign* is the share of",
        "the machine that none of client, upstream and proxy used.",
    )
    yield from prose(
        "`creto sidecar` runs as installed: identity, the default Cedar policy, a budget of requests on each of",
        "four levels, metering, oversight, and the journal written before an answer ends. Its CPU is given in two",
        "parts. *On the path* is the process that carries the requests (where one process does everything: its main",
        "thread). *Derived* is all else that the same requests cause, ledger and audit log from the journal and",
        "`fdatasync`, counted until all of it is idle again after the load. No other proxy here does the second",
        "kind of work. None but LiteLLM, which translates and logs what it passes on, knows what a model request",
        "is; Creto reads its model and the usage in its answer.",
    )


def cpu_panels(answers: Row) -> Iterator[plots.Panel]:
    for question in ("cpu", "tls"):
        for load in answers.get(question, {}).get("loads", []):
            found = []
            for row in sorted(load["rows"], key=lambda row: float(row["served_us"][0])):
                if row["name"] == TOGETHER:
                    continue
                ours = row["name"] == "creto"
                name = "creto, on the path" if ours else row["name"]
                found.append(bar_of(name, row["served_us"], ours))
                if ours:
                    found.append(bar_of("creto, with derived", row["total_us"], ours))
            yield plots.Panel(load["title"], found)


def bar_of(name: str, values: Sequence[float], ours: bool) -> plots.Bar:
    return plots.Bar(name, values[0], values[1], values[2], ours)


def soak_plot(soak: Row) -> str:
    series: dict[str, list[tuple[float, float]]] = {}
    for sample in soak["memory"]:
        for role, size in sample["bytes"].items():
            series.setdefault(role, []).append((sample["at"] / 60, size / 2**20))
    fitted = [
        plots.Line(role, [(trend["begin"] / 60, trend["first"] / 2**20), (trend["end"] / 60, trend["last"] / 2**20)])
        for phase in soak["growth"].values()
        for role, trend in phase.items()
    ]
    marks = [(at / 60, plots.RED) for at in soak["kills"]]
    marks += [(each["at"] / 60, plots.FAINT) for each in soak["reloads"] if each["full"]]
    lines = [plots.Line(role, series[role]) for role in sorted(series) if role != "other"]
    unit = "MiB; grey: all processes replaced, red: a worker killed; black: fitted where nothing drains"
    return plots.lines("Resident memory while it runs, by role", unit, lines, marks, fitted)
