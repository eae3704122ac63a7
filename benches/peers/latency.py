"""How long does a request take at the 99th percentile, over one connection and over fifty, beside haproxy?

Twice with h2load, which notes what each request took: each connection asking again as soon as it is answered, which
at fifty connections measures a proxy at its limit; and at one constant rate for all, below every peer's limit, which
is what an agent sees. (wrk's percentiles are none of requests: it adds some that it takes for left out, and none was.)
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peers import creto, programs
from peers.load import Client, Say, middle
from peers.settings import Settings, started

CONNECTIONS = (1, 50)
# The constant rate, as a share of what the slowest peer answered as fast as it could.
SHARE = 0.4
# A percentile of one round hangs on a few dozen requests and on what the machine did meanwhile.
STEADY_ROUNDS = 3


def measure(folder: Path, settings: Settings, say: Say) -> dict[str, Any]:
    missing: list[str] = []
    with ExitStack() as stack:
        to = stack.enter_context(programs.upstream(folder / "upstream"))
        sidecar = stack.enter_context(creto.sidecar(folder / "creto", to))
        rivals = started(stack, missing, programs.nginx(folder / "nginx", to), programs.haproxy(folder / "haproxy", to))
        client = Client(folder, to.pid)
        peers = [programs.Peer("no proxy", to.plain, None), *rivals, sidecar.peer()]
        loads = []
        for connections in CONNECTIONS:
            what = f"GET 1 KiB, {connections} connection{'s'[: connections > 1]}"
            title = f"{what}, as fast as it goes"
            rows = timed(client, peers, connections, None, settings, say, title)
            loads.append({"title": title, "rows": rows})
            rate = float(round(SHARE * min(row["per_second"][0] for row in rows), -2)) or 100.0
            title = f"{what}, {rate:,.0f} requests/s"
            loads.append({"title": title, "rows": timed(client, peers, connections, rate, settings, say, title)})
    return {"loads": loads, "missing": missing}


def timed(
    client: Client,
    peers: list[programs.Peer],
    connections: int,
    rate: float | None,
    settings: Settings,
    say: Say,
    title: str,
) -> list[dict[str, Any]]:
    """Rows of percentiles over alternating rounds, at a constant rate or without one."""
    taken: dict[str, list[tuple[list[int], float, int]]] = {peer.name: [] for peer in peers}
    turns = STEADY_ROUNDS * settings.rounds
    for turn in range(turns):
        for peer in peers if turn % 2 == 0 else list(reversed(peers)):
            done, times = client.h2load(peer, connections, rate, settings.seconds)
            taken[peer.name].append((times, done.foreign, done.errors))
            p99 = quantile(times, 0.99)
            say(f"{title}, round {turn + 1}/{turns}: {peer.name:18} p99 {p99:,.0f} us of {len(times):,} requests")
    rows = []
    for name, rounds in taken.items():
        row: dict[str, Any] = {"name": name, "errors": sum(errors for *_, errors in rounds)}
        for label, q in (("p50_us", 0.5), ("p99_us", 0.99), ("p999_us", 0.999)):
            row[label] = middle([quantile(times, q) for times, *_ in rounds])
        row["per_second"] = middle([len(times) / settings.seconds for times, *_ in rounds])
        row["foreign"] = middle([foreign for _, foreign, _ in rounds])
        rows.append(row)
    return rows


def quantile(ordered: list[int], q: float) -> float:
    return float(ordered[min(len(ordered) - 1, int(len(ordered) * q))]) if ordered else float("nan")
