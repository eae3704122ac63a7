"""The sections of docs/performance.md, one for each question."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from peers.bars import named
from peers.markdown import bullets, grid, plural, prose, short, spread

Row = dict[str, Any]


def cpu_section(answers: Row) -> Iterator[str]:
    if answer := answers.get("cpu"):
        yield from cpu_tables(answer, "What CPU does a governed request cost?")


def tls_section(answers: Row) -> Iterator[str]:
    answer = answers.get("tls")
    if not answer:
        return
    yield from cpu_tables(answer, "And with TLS on both sides?")
    yield from prose(
        "nginx, haproxy and the aiohttp proxy end TLS as servers; Creto and mitmproxy end it inside a CONNECT",
        "tunnel that they intercept. The client is the same wrk: a preloaded library opens the tunnel when a",
        "connection begins, and connections are kept; the handshakes that begin a round are in the figures of all.",
        "Negotiated, client side / upstream side:",
    )
    yield from bullets([f"{name}: {spoken}" for name, spoken in answer["negotiated"].items()])
    yield from prose(
        "Creto's contexts and handshakes are those of Python's `ssl`. For records it calls the libssl under it",
        "directly, once it has proved at start that it may (`creto_hotpath.tls.ENGINE` is `openssl`); otherwise",
        "(`ssl`) records go through Python's objects too. That takes about 3 us more CPU for a request like these,",
        "and up to 40 KiB more memory for a connection that rests after long records.",
    )


def cpu_tables(answer: Row, title: str) -> Iterator[str]:
    yield f"## {title}"
    yield ""
    head = ("", "CPU us/request", "on the path", "derived", "in the kernel", "x nginx", "req/s", "p99 us", "foreign")
    for load in answer["loads"]:
        yield f"### {load['title']}"
        yield ""
        base = named(load["rows"], "nginx proxy_pass")
        rows = []
        for row in load["rows"]:
            ours = row["name"].startswith("creto")
            ratio = row["total_us"][0] / base["total_us"][0] if base else float("nan")
            path = row["served_us"][0] / base["total_us"][0] if base else float("nan")
            rows.append(
                (
                    name_of(row),
                    spread(row["total_us"]),
                    spread(row["served_us"]) if ours else "",
                    spread(row["derived_us"]) if ours else "",
                    f"{row['kernel'][0]:.0%}",
                    f"{path:.2f}, all {ratio:.2f}" if ours else f"{ratio:.2f}",
                    f"{row['per_second'][0]:,.0f}",
                    short(row["p99_us"][0]) if row["p99_us"] else "",
                    f"{row['foreign'][0]:.0%}",
                )
            )
        yield from grid(head, rows)
    yield from left_out(answer)


def latency_section(answers: Row) -> Iterator[str]:
    answer = answers.get("latency")
    if not answer:
        return
    yield "## How long does a request take?"
    yield ""
    yield from prose(
        "Asked by h2load, from what it notes of each request. As fast as it goes: each connection asks again as",
        "soon as it is answered, which at fifty connections measures a proxy at its limit. At a constant rate, of",
        "which what is due is sent every 10 ms: the same for all, 40 % of what the slowest of them answered. *No",
        "proxy* is what the machine and the client add by themselves. Percentiles are taken round by round; given is",
        "their median, least and most.",
    )
    for load in answer["loads"]:
        yield f"### {load['title']}"
        yield ""
        base = named(load["rows"], "haproxy")
        rows = []
        for row in load["rows"]:
            ratio = row["p99_us"][0] / base["p99_us"][0] if base and base["p99_us"] and row["p99_us"] else float("nan")
            times = [spread(row.get(value)) for value in ("p50_us", "p99_us", "p999_us")]
            share = f"{row['foreign'][0]:.0%}"
            rows.append((name_of(row), *times, f"{ratio:.2f}", f"{row['per_second'][0]:,.0f}", share))
        yield from grid(("", "p50 us", "p99 us", "p99.9 us", "p99 x haproxy", "req/s", "foreign"), rows)
    yield from left_out(answer)


def hotpath_section(answers: Row) -> Iterator[str]:
    rows = answers.get("hotpath", {}).get("rows")
    if not rows:
        return
    yield "## What do policy and quota cost by themselves?"
    yield ""
    yield from prose(
        "`Admission.admit` of `benches/bench_hotpath.py`: decision table and 4 levels x 3 meters, all charged or",
        "none, in one call from Python. Single calls are timed with the timer included; the mean is over batches",
        "and includes the call.",
    )
    cells = [(f"`{row['name']}`", *(f"{row[value]:,.0f}" for value in ("p50_ns", "p99_ns", "mean_ns"))) for row in rows]
    yield from grid(("", "p50 ns", "p99 ns", "mean ns"), cells)
    loops = answers["hotpath"].get("loops")
    if not loops:
        return
    yield from prose(
        "The same two calls that `Admission.admit` makes, decision table and charge, in a loop in C",
        "(`benches/hotpath_loop.pyx`), beside the same from Python and beside reading the clock in C. The clock is",
        "read twice a batch, so it is not in the figures of the others. Settling, a second call when the answer is",
        "known, is given apart. Nanoseconds each: the median over",
        f"{loops[0]['rounds']} alternating rounds, least and most.",
    )
    kinds = ("in_c_ns", "settled_in_c_ns", "from_python_ns", "clock_ns")
    cells = [(f"{loop['held']}", *(spread(loop[kind]) for kind in kinds)) for loop in loops]
    yield from grid(("held at once", "admitted in C", "settled in C", "admitted from Python", "clock read in C"), cells)


def sse_section(answers: Row) -> Iterator[str]:
    rows = answers.get("sse", {}).get("rows")
    if not rows:
        return
    yield "## How much later does an event of a stream arrive?"
    yield ""
    yield from prose("`benches/bench_sse.py`, the same events with and without Creto in between.")
    keys = ("p50_us", "p99_us", "added_p50_us", "added_p99_us")
    cells = [(row["name"], *(spread(row[key]) for key in keys)) for row in rows]
    yield from grid(("", "p50 us", "p99 us", "added, p50 us", "added, p99 us"), cells)


def idle_section(answers: Row) -> Iterator[str]:
    answer = answers.get("idle")
    if not answer:
        return
    yield "## What does an idle connection hold?"
    yield ""
    held, wanted = answer["held"], answer["wanted"]
    short_of = f"{wanted:,} were wanted; a process may have {answer['descriptors']:,} descriptors here, of which Creto"
    yield from prose(
        f"{plural(held, 'kept-alive connection')} after one request each: growth of the proportional set size of the",
        "proxy's processes over the connections, kernel socket buffers not included. Creto with",
        f"{plural(answer['workers'], 'worker')}. nginx and haproxy set tables for their connections aside at start,",
        "which is not in their growth.",
        *([short_of, "keeps two more in reserve for each connection."] if held < wanted else []),
    )
    rows = [
        (
            row["name"],
            "TLS" if row["tls"] else "plain",
            f"{row['bytes_each']:,.0f}",
            f"{row['bytes_each_second_half']:,.0f}",
            f"{row['before_bytes'] / 2**20:.1f}",
            f"{row['after_bytes'] / 2**20:.1f}",
        )
        for row in answer["rows"]
    ]
    yield from grid(("", "", "bytes each", "second half of them", "MiB before", "MiB with all"), rows)
    yield from left_out(answer)


def quota_section(answers: Row) -> Iterator[str]:
    answer = answers.get("quota")
    if not answer:
        return
    yield "## Do workers share one quota exactly?"
    yield ""
    yield from prose(
        f"A budget of {answer['quota']:,} requests in all, and a tenth more sent by h2load over 64 connections.",
        "Client, upstream and `creto quota` count separately.",
        *([f"{answer['skipped'].capitalize()}."] if answer["skipped"] else []),
    )
    rows = [
        (
            str(row["workers"] or "none"),
            f"{row['ok']:,}",
            f"{row['refused']:,}",
            f"{row['broken'] + row['unanswered']:,}",
            f"{row['upstream']:,}",
            row["used"],
            "yes" if row["exact"] else "**NO**",
        )
        for row in answer["rows"]
    ]
    yield from grid(("workers", "client: 200", "client: 429", "other", "upstream saw", "creto counts", "exact"), rows)


def profile_section(answers: Row) -> Iterator[str]:
    answer = answers.get("profile")
    if not answer or "running" not in answer:
        return
    yield "## What the profile says"
    yield ""
    threads = ", ".join(f"{row['name']} {row['share']:.0%}" for row in answer["threads"] if row["share"] >= 0.005)
    yield from prose(
        f"{answer['samples']:,} samples by py-spy in {answer['seconds']} s of {answer['title']}, in the process that",
        "carries the requests, compiled and system code included; waiting left out. A system call counts for the",
        f"call, so `send` and `recv` are the kernel's TCP. By thread: {threads}. The thread that carries requests,",
        "by the function that was running, and by creto's own functions with all they called:",
    )
    pairs = itertools.zip_longest(answer["running"], answer["within"])
    yield from grid(("running", "share", "within", "share"), [(*cell(left), *cell(right)) for left, right in pairs])


def cell(row: Row | None) -> tuple[str, str]:
    return (f"`{row['name']}`", f"{row['share']:.1%}") if row else ("", "")


def soak_section(soak: Row | None) -> Iterator[str]:
    if soak is None:
        return
    yield "## Does it hold for long?"
    yield ""
    account, client, slow = soak["account"], soak["client"], soak["slow_clients"]
    full = sum(each["full"] for each in soak["reloads"])
    yield from prose(
        f"{soak['minutes']:g} minutes, {plural(soak['workers'], 'worker')} and a controller, {soak['connections']}",
        f"connections at {soak['rate_per_second']:,.0f} requests/s: {soak['share']:.0%} of the",
        f"{soak['capacity_per_second']:,.0f}/s that this machine, with client and upstream on the same cores, sustains",
        "when ledger and audit log have to keep up. Meanwhile 8 clients that send a head a byte a second, 4 that",
        f"hardly read, {plural(len(soak['kills']), 'worker')} killed (SIGKILL), and {len(soak['reloads'])} reloads",
        f"(SIGHUP): {full} that replace every process, in the first third, then",
        f"{len(soak['reloads']) - full} of policies that",
        "are taken in place.",
    )
    yield from bullets([f"**{each}.**" for each in soak["problems"]])
    shed = account["refused"].get("503", 0)
    yield from bullets(
        [
            f"{account['answered']:,} requests answered, {account['lost']} of them without an outcome; "
            f"{account['doubled']} requests with more than one; {shed:,} turned away with 503.",
            f"{account['journal_outcomes']:,} outcomes in the journal, {account['ledger_rows']:,} rows in the ledger, "
            f"{account['audit_entries']:,} entries in the audit log.",
            "Ledger and audit log were "
            f"{soak['late_s'][0]:.1f} s of load behind in the first third, {soak['late_s'][1]:.1f} s in the last "
            f"(medians), {soak['late_s'][2]:.1f} s at most.",
            f"{plural(account['unanswered'], 'request')} under way when the connection broke; "
            f"{account['unanswered_recorded']} of them have an outcome.",
            f"{plural(client['lost'], 'connection')} broken under a request, {soak['unexplained_breaks']} of them not "
            f"within 5 s of a kill; {client['closed']} closed while idle or after an answer that said so.",
            f"{plural(slow['heads_cut'], 'slow head')} cut off, the longest after {slow['longest_head_s']:g} s; "
            f"{slow['slow_bytes_read'] / 2**20:.0f} MiB read slowly.",
        ]
    )
    yield from prose(
        "Resident memory by role, without the mapped journal segment",
        f"({soak['mapped_journal'] / 2**20:.0f} MiB of page cache at most). Samples count while nothing drains or",
        "warms up; a line is fitted through them (Theil-Sen), and its two ends are given. *Replaced*: generations of",
        "processes against each other, at the same age. *Living*: the same processes (worker 1 is the one that is",
        "killed) over the rest of the run.",
    )
    rows = [
        (
            f"{role}, {phase}",
            f"{trend['begin'] / 60:.1f} to {trend['end'] / 60:.1f}",
            f"{trend['samples']:.0f}",
            f"{trend['first'] / 2**20:.1f}",
            f"{trend['last'] / 2**20:.1f}",
            f"{trend['growth']:+.1%}",
        )
        for phase, roles in soak["growth"].items()
        for role, trend in roles.items()
    ]
    yield from grid(("", "minutes", "samples", "MiB, begin", "MiB, end", "growth"), rows)
    yield "![Resident memory over time](performance-soak.svg)"
    yield ""


def left_out(answer: Row) -> Iterator[str]:
    if answer.get("missing"):
        yield from prose(f"Left out: {'; '.join(dict.fromkeys(answer['missing']))}.")


def name_of(row: Row) -> str:
    return f"{row['name']} (**{row['errors']:,} errors**)" if row.get("errors") else str(row["name"])


SECTIONS: tuple[Callable[[Row], Iterator[str]], ...] = (
    cpu_section,
    tls_section,
    latency_section,
    hotpath_section,
    sse_section,
    idle_section,
    quota_section,
    profile_section,
)
