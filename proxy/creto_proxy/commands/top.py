"""``creto top``: what a running creto does right now, redrawn every second."""

from __future__ import annotations

import json
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from creto_proxy.cli import Operator
    from creto_proxy.observe.view import Look, View

_ROWS = 8
# Budgets are read from the quota table and the ledger: more work than everything else here, and slower to change.
_BUDGETS_EVERY_S = 5.0


@click.command()
@click.option("--once", is_flag=True, help="Look once, for --interval seconds, and end.")
@click.option(
    "--interval", type=click.FloatRange(0.1, 60), default=1.0, show_default=True, help="Seconds between two looks."
)
@click.pass_obj
def top(operator: Operator, once: bool, interval: float) -> None:
    """Show requests, latencies, decisions, holds, budgets and workers as they are now.

    Reads the counters below the state directory, so it needs no listener, only the user that creto runs as. Rates and
    latencies are those of the last interval, over all creto processes on that state directory. q or Ctrl-C ends it;
    with --json there is one document per interval.
    """
    from creto_proxy.observe.view import view

    before = _look(operator.state_dir)
    budgets = _Budgets(operator)
    if once or not (sys.stdout.isatty() or operator.json):
        time.sleep(interval)
        seen = replace(view(before, _look(operator.state_dir)), budgets=budgets())
        _print(operator, seen)
        return
    if operator.json:
        while True:
            time.sleep(interval)
            now = _look(operator.state_dir)
            click.echo(json.dumps(replace(view(before, now), budgets=budgets()).document()))
            before = now
    _live(operator, before, interval, budgets)


def _live(operator: Operator, before: Look, interval: float, budgets: _Budgets) -> None:
    from rich.live import Live

    from creto_proxy.observe.view import view

    with _keys() as quit_pressed, Live(console=operator.console, screen=True, auto_refresh=False) as live:
        live.update("looking ...", refresh=True)
        while not quit_pressed(interval):
            now = _look(operator.state_dir)
            live.update(_drawn(replace(view(before, now), budgets=budgets())), refresh=True)
            before = now


def _look(state: Path) -> Look:
    """Raises ClickException when nothing runs there."""
    from creto_proxy.observe.view import look

    found = look(state)
    if found is None:
        raise click.ClickException(f"no creto runs on {state}; name another state directory with --state-dir")
    return found


@contextmanager
def _keys() -> Iterator[Any]:
    """A function that waits that many seconds for a key that ends it. Keys are not echoed meanwhile."""
    if not sys.stdin.isatty():
        yield lambda seconds: time.sleep(seconds)
        return
    fd = sys.stdin.fileno()
    kept = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield lambda seconds: _quits(fd, seconds)
    except KeyboardInterrupt:
        pass  # how one ends it
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, kept)


def _quits(fd: int, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if select.select([fd], [], [], left)[0] and os.read(fd, 64)[:1] in (b"q", b"Q", b"\x1b", b""):
            return True
    return False


class _Budgets:
    """The budgets nearest to their limit, as ``creto quota`` tells them; none without that command."""

    def __init__(self, operator: Operator) -> None:
        self._operator = operator
        self._next = 0.0
        self._rows: tuple[Mapping[str, Any], ...] = ()

    def __call__(self) -> tuple[Mapping[str, Any], ...]:
        if time.monotonic() >= self._next:
            self._rows = tuple(sorted(self._read(), key=_used_share, reverse=True)[:_ROWS])
            self._next = time.monotonic() + _BUDGETS_EVERY_S
        return self._rows

    def _read(self) -> Sequence[Mapping[str, Any]]:
        command = self._operator.plugin_commands.get("quota")
        if command is None:
            return ()
        asked = _Asked(self._operator)
        with click.Context(command, obj=asked) as context:
            command.invoke(context)
        return asked.budgets


class _Asked:
    """Stands in for the operator of a command whose document is wanted, not its print."""

    json = True

    def __init__(self, operator: Operator) -> None:
        self._operator = operator
        self.budgets: Sequence[Mapping[str, Any]] = ()

    def emit(self, rows: object, document: Mapping[str, Any]) -> None:
        self.budgets = document.get("budgets", ())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operator, name)


def _used_share(budget: Mapping[str, Any]) -> float:
    try:
        limit = Decimal(str(budget["limit"]))
        return float((Decimal(str(budget["used"])) + Decimal(str(budget["reserved"]))) / limit) if limit else 1.0
    except (KeyError, InvalidOperation):
        return 0.0


def _print(operator: Operator, seen: View) -> None:
    if operator.json:
        operator.emit([], seen.document())
    else:
        operator.console.print(_drawn(seen))


def _drawn(seen: View) -> Group:
    from rich.console import Group
    from rich.text import Text

    head = Text.assemble(
        (f"{seen.requests:,.1f}", "bold"), " requests/s   ",
        (f"{seen.refused:,.1f}", "bold red" if seen.refused else "bold"), " refused/s   ",
        f"total p50 {_ms(seen.total_p50_ms)} p99 {_ms(seen.total_p99_ms)}   ",
        f"overhead p50 {_ms(seen.overhead_p50_ms)} p99 {_ms(seen.overhead_p99_ms)}\n",
        f"up {_size(seen.bytes_up)}/s   down {_size(seen.bytes_down)}/s   {seen.connections} connections   ",
        (f"{seen.holds_open} held", "bold yellow" if seen.holds_open else ""),
        *(f"   {count} {result}" for result, count in sorted(seen.holds.items())),
        "\n",
    )  # fmt: skip
    parts: list[Any] = [head]
    for title, rates, overhead in (("agent", seen.agents, True), ("host", seen.hosts, False)):
        rows = [
            (each.name, f"{each.requests:,.1f}", f"{each.refused:,.1f}", _ms(each.p50_ms), _ms(each.p99_ms))
            + ((_ms(each.overhead_p99_ms),) if overhead else ())
            for each in rates[:_ROWS]
        ]
        columns = (title, "req/s", "refused/s", "p50", "p99", *(("overhead p99",) if overhead else ()))
        parts.append(_table(columns, rows, more=len(rates) - len(rows)))
    if seen.decisions:
        decisions = [(verdict, reason or "-", f"{rate:,.1f}") for verdict, reason, rate in seen.decisions[:_ROWS]]
        parts.append(_table(("decision", "reason", "per s"), decisions))
    if seen.budgets:
        parts.append(_table(("budget", "metric", "window", "used", "limit", ""), [_budget(b) for b in seen.budgets]))
    workers = [
        (w.worker, str(w.pid), _span(w.up_s), f"{w.requests:,.1f}", str(w.connections), _size(w.rss_bytes),
         f"{w.cpu:.0%}", _ms(w.lag_p99_ms))
        for w in seen.workers
    ]  # fmt: skip
    parts.append(_table(("worker", "pid", "up", "req/s", "connections", "memory", "CPU", "loop lag p99"), workers))
    return Group(*parts)


def _budget(budget: Mapping[str, Any]) -> tuple[str, ...]:
    share = _used_share(budget)
    texts = (str(budget.get(key, "")) for key in ("level", "metric", "window", "used", "limit"))
    return (*texts, f"{share:.0%}")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], more: int = 0) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", caption=f"and {more} more" if more > 0 else None)
    numbers = {"req/s", "refused/s", "p50", "p99", "overhead p99", "per s", "used", "limit", "", "connections"}
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    table.add_section()
    table.add_row()
    return table


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.0f} us" if value < 1 else f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def _size(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return ""


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
