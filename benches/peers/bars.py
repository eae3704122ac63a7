"""What must hold, and whether it does: one ``Bar`` per line of the table, from the answers of the questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

# With more of the machine used by others than this, a ratio says nothing.
NOISE = 0.25

Answers = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bar:
    """holds None: not measured, or the measurement says nothing. by: how far it is missed, in words."""

    what: str
    least: str
    measured: str
    holds: bool | None
    by: str = ""


def bars(answers: Answers, soak: Answers | None) -> list[Bar]:
    """Every bar, in the order of the page."""
    return [*cpu(answers), *tls(answers), *latency(answers), *hotpath(answers), *sse(answers), *idle(answers),
            *quota(answers), *endurance(soak)]  # fmt: skip


def named(rows: list[Row], name: str) -> Row | None:
    return next((row for row in rows if row["name"] == name and row.get("errors", 0) == 0), None)


def median(row: Row, value: str) -> float:
    return float(row[value][0])


def unmeasured(what: str, least: str, why: str = "not measured") -> Bar:
    return Bar(what, least, why, None)


def reason(rows: list[Row], base: str) -> str:
    """Why there is no figure."""
    failed = [f"{row['errors']:,} errors from {row['name']}" for row in rows if row["name"] in ("creto", base)]
    return ", ".join(each for each in failed if not each.startswith("0 ")) or "not measured"


def judged(bar: Bar, ours: Row, theirs: Row) -> Bar:
    """The bar, undecided when the machine was not ours while it was measured."""
    foreign = max(median(ours, "foreign"), median(theirs, "foreign"))
    if foreign <= NOISE:
        return bar
    return replace(bar, holds=None, by=f"{bar.measured}, while other programs used {foreign:.0%} of the machine")


def at_most(what: str, limit: float, rows: list[Row], base: str) -> Bar:
    """Creto's CPU on the path of a request is at most ``limit`` times that of ``base``."""
    least = f"<= {limit:g}x {base}"
    ours, theirs = named(rows, "creto"), named(rows, base)
    if ours is None or theirs is None:
        return unmeasured(what, least, reason(rows, base))
    ratio, total = (median(ours, value) / median(theirs, "total_us") for value in ("served_us", "total_us"))
    measured = f"{ratio:.2f}x ({total:.2f}x with ledger and audit log derived)"
    return judged(Bar(what, least, measured, ratio <= limit, _over(ratio, limit)), ours, theirs)


def less_than(what: str, factor: float, rows: list[Row], base: str) -> Bar:
    """Creto's CPU on the path of a request is at least ``factor`` times less than that of ``base``."""
    least = f">= {factor:g}x less than {base}"
    ours, theirs = named(rows, "creto"), named(rows, base)
    if ours is None or theirs is None:
        return unmeasured(what, least, reason(rows, base))
    times, total = (median(theirs, "total_us") / median(ours, value) for value in ("served_us", "total_us"))
    measured = f"{times:.1f}x less ({total:.1f}x with ledger and audit log derived)"
    missed = f"{times / factor:.0%} of the bar" if times < factor else ""
    return judged(Bar(what, least, measured, times >= factor, missed), ours, theirs)


def loads_of(answers: Answers, question: str) -> list[Row]:
    loads: list[Row] = answers.get(question, {}).get("loads", [])
    return loads


def cpu(answers: Answers) -> Iterator[Bar]:
    loads = loads_of(answers, "cpu")
    rows: Callable[[int], list[Row]] = lambda index: loads[index]["rows"] if index < len(loads) else []  # noqa: E731
    yield at_most("CPU per governed request, GET 1 KiB, 64 connections", 1.15, rows(0), "nginx proxy_pass")
    yield at_most("the same, 1 connection", 1.15, rows(1), "nginx proxy_pass")
    yield less_than("CPU per governed request, GET 1 KiB, 64 connections", 50, rows(0), "mitmproxy")
    yield less_than("CPU per governed chat completion, 16 connections", 300, rows(2), "LiteLLM")


def tls(answers: Answers) -> Iterator[Bar]:
    loads = loads_of(answers, "tls")
    rows = loads[0]["rows"] if loads else []
    yield at_most("CPU per governed request, TLS both sides", 1.25, rows, "nginx proxy_pass")


def latency(answers: Answers) -> Iterator[Bar]:
    what, least, limit = "p99 latency", "<= 1.3x haproxy", 1.3
    loads = loads_of(answers, "latency")
    if not loads:
        yield unmeasured(what, least)
    for load in loads:
        ours, theirs = named(load["rows"], "creto"), named(load["rows"], "haproxy")
        title = f"{what}, {load['title']}"
        if ours is None or theirs is None:
            yield unmeasured(title, least, reason(load["rows"], "haproxy"))
            continue
        ours_us, theirs_us = median(ours, "p99_us"), median(theirs, "p99_us")
        ratio = ours_us / theirs_us
        measured = f"{ratio:.2f}x ({ours_us:,.0f} against {theirs_us:,.0f} us)"
        yield judged(Bar(title, least, measured, ratio <= limit, _over(ratio, limit)), ours, theirs)


def hotpath(answers: Answers) -> Iterator[Bar]:
    what = "policy + quota, cached, 4 levels x 3 meters"
    rows: list[Row] = answers.get("hotpath", {}).get("rows", [])
    row = next((each for each in rows if each["name"].startswith("bench_policy_and_quota[")), None)
    if row is None:
        yield unmeasured(what, "p99 < 1 us from Python, < 168 ns mean in C")
        return
    p99, loops = row["p99_ns"], answers["hotpath"].get("loops", [])
    yield Bar(f"{what}, from Python, p99", "< 1,000 ns", f"{p99:,.0f} ns", p99 < 1000, _over(p99, 1000))
    if not loops:
        yield unmeasured(f"{what}, in C, mean", "< 168 ns")
        return
    mean = max(median(loop, "in_c_ns") for loop in loops)
    yield Bar(f"{what}, in C, mean", "< 168 ns", f"{mean:,.0f} ns", mean < 168, _over(mean, 168))


def _over(value: float, limit: float) -> str:
    return f"{value / limit:.2f} times the bar" if value >= limit else ""


def sse(answers: Answers) -> Iterator[Bar]:
    what, least = "SSE, time added per event, p99", "< 100 us"
    rows: list[Row] = answers.get("sse", {}).get("rows", [])
    found = [(row["name"], median(row, "added_p99_us")) for row in rows if row["ours"]]
    if not found:
        yield unmeasured(what, least)
    for name, added in found:
        yield Bar(f"{what} ({name})", least, f"{added:,.0f} us", added < 100, _over(added, 100))


def idle(answers: Answers) -> Iterator[Bar]:
    answer = answers.get("idle")
    for tls, kib in ((False, 2), (True, 64)):
        kind = "with TLS" if tls else "plain"
        least = f"< {kib} KiB each in user space"
        row = next(
            (each for each in (answer or {}).get("rows", []) if each["name"] == "creto" and each["tls"] == tls), None
        )
        if answer is None or row is None:
            yield unmeasured(f"idle connections, {kind}", least)
            continue
        size = max(row["bytes_each"], row["bytes_each_second_half"])
        held, wanted = answer["held"], answer["wanted"]
        what = f"{held:,} idle connections, {kind}"
        short = "" if held >= wanted else f"; {wanted:,} need more than {answer['descriptors']:,} descriptors"
        over = _over(size, kib * 1024)
        yield Bar(what, least, f"{size / 1024:.2f} KiB{short}", size < kib * 1024, over)


def quota(answers: Answers) -> Iterator[Bar]:
    answer = answers.get("quota")
    if not answer:
        yield unmeasured("N workers, one quota of 1,000,000 hammered", "exactly 1,000,000 admitted")
        return
    limit = answer["quota"]
    for row in answer["rows"]:
        who = f"{row['workers']} workers" if row["workers"] else "one process (no workers)"
        what = f"{who}, one quota of {limit:,} hammered"
        yield Bar(what, f"exactly {limit:,} admitted", f"{row['ok']:,} admitted", row["exact"])


def endurance(soak: Answers | None) -> Iterator[Bar]:
    least = "RSS flat within 3 %, no lost or doubled outcome"
    if soak is None:
        yield unmeasured("30-minute soak at 70 % load with reloads, worker kills, slow clients", least)
        return
    what = f"{soak['minutes']:g}-minute soak at {soak['share']:.0%} load"
    what += f", {len(soak['reloads'])} reloads, {len(soak['kills'])} worker kills, slow clients"
    account = soak["account"]
    trends = [trend["growth"] for phase in soak["growth"].values() for trend in phase.values()]
    measured = f"RSS {max(trends, default=float('nan')):+.1%} at most; {account['answered']:,} answered, "
    measured += f"{account['lost']} lost, "
    measured += f"{account['doubled']} doubled"
    whole = soak["minutes"] >= 30
    why = "; ".join(soak["problems"]) or ("" if whole else "shorter than 30 minutes")
    yield Bar(what, least, measured, False if soak["problems"] else (True if whole else None), why)
