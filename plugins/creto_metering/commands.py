"""``creto usage`` and ``creto quota``."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from creto_metering.groups import GROUPS, By
from creto_metering.importer import PROVIDERS, ImporterMissing, import_prices, rendered
from creto_metering.money import usd
from creto_metering.windows import SECOND_NS, iso

if TYPE_CHECKING:
    from creto_metering.ledger import Totals
    from creto_metering.settings import Settings
    from creto_proxy.cli import Operator

LEDGER_FILE = "metering.db"
QUOTA_FILE = "quota.tab"

_AGO = re.compile(r"([1-9][0-9]{0,5})([smhdw])")
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def _since(context: click.Context, parameter: click.Parameter, value: str | None) -> int:
    """Unix nanoseconds of an age such as 24h or 7d, or of an ISO date or time (UTC unless it says otherwise)."""
    if value is None:
        return 0
    if (match := _AGO.fullmatch(value)) is not None:
        return time.time_ns() - int(match[1]) * _UNITS_S[match[2]] * SECOND_NS
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is neither an age such as 24h nor a date such as 2026-01-31", context, parameter
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return int(moment.timestamp()) * SECOND_NS


@click.group(invoke_without_command=True)
@click.option("--by", type=click.Choice(GROUPS), default="agent", show_default=True, help="What to sum up.")
@click.option("--since", metavar="WHEN", callback=_since, help="Age such as 24h, or ISO date or time.")
@click.option("--agent", default=None, help="SPIFFE id of one agent only.")
@click.pass_context
def usage(context: click.Context, by: str, since: int, agent: str | None) -> None:
    """Show who used what, and what it cost."""
    if context.invoked_subcommand is not None:
        return
    from creto_metering.ledger import Ledger, LedgerError
    from creto_metering.routes import document, summed

    operator: Operator = context.obj
    ledger = Ledger(operator.state_dir / LEDGER_FILE)
    try:
        ledger.open(create=False)
    except LedgerError as error:
        raise click.ClickException(str(error)) from None
    with closing(ledger):
        rows, as_of = ledger.totals(cast(By, by), since_ns=since, agent=agent)
    operator.emit(
        [_line(row, by) for row in rows],
        {
            "as_of": iso(as_of) if as_of else None,
            "by": by,
            "rows": [document(row) for row in rows],
            # Rows of "caused" overlap, so their sum would count an amount once per ancestor.
            "total": None if by == "caused" else summed(rows),
        },
    )
    if not operator.json:
        click.echo(f"as of {iso(as_of)}" if as_of else "nothing recorded yet")


def _line(row: Totals, by: str) -> dict[str, object]:
    return {
        by: row.key or "-",
        "requests": row.requests,
        "refused": row.refused,
        "tokens in": row.input,
        "cached": row.cache_read,
        "tokens out": row.output,
        "cost USD": usd(row.cost_nano_usd),
        "of it uncertain": usd(row.uncertain_nano_usd),
    }


@usage.command("import-prices")
@click.option("--provider", "providers", multiple=True, default=PROVIDERS, help="Provider to take; may be repeated.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("policies/prices.json"),
    show_default=True,
    help="File to write.",
)
@click.pass_obj
def import_prices_command(operator: Operator, providers: Sequence[str], output: Path) -> None:
    """Write the price file from the installed genai-prices package."""
    try:
        prices, skipped = import_prices(providers)
        output.write_text(rendered(prices), encoding="utf-8")
    except (ImporterMissing, ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    result = {"file": str(output), "source": prices["source"], "models": len(prices["models"])}
    operator.emit([result], {**result, "skipped": skipped})


@click.command()
@click.pass_obj
def quota(operator: Operator) -> None:
    """Show every budget: limit, used, reserved, when it resets."""
    settings = cast("Settings", operator.config.sections["metering"])
    rows = budget_rows(settings, operator.state_dir, time.time_ns())
    documents = [{"level": row["level"], **row} for row in rows]
    if not rows and not operator.json:
        click.echo("Nothing is budgeted yet." if settings.budgets else "There are no budgets: [[metering.budgets]].")
        return
    operator.emit([{k: "-" if v is None else v for k, v in row.items()} for row in documents], {"budgets": documents})


def budget_rows(settings: Settings, state_dir: Path, now_ns: int) -> list[dict[str, Any]]:
    """Every budget of every agent that the ledger knows, each counter once. Reads; defines nothing."""
    table_file = state_dir / QUOTA_FILE
    if not settings.budgets or not table_file.exists():
        return []
    from creto_hotpath.quota import QuotaTable
    from creto_metering.budgets import applying, counted, described

    seen: dict[bytes, dict[str, Any]] = {}
    with closing(QuotaTable(str(table_file))) as table:
        for path in _known_paths(settings, state_dir):
            for slot in applying(settings.budgets, path, table):
                if slot.key not in seen:
                    seen[slot.key] = described(slot, counted(table, slot, now_ns))
    return list(seen.values())


def _known_paths(settings: Settings, state_dir: Path) -> list[tuple[str, ...]]:
    from creto_metering.ledger import Ledger, LedgerError

    named: list[tuple[str, ...]] = [
        (budget.level if budget.level == "platform" else f"{budget.level}:{budget.match}",)
        for budget in settings.budgets
        if budget.match != "*" or budget.level == "platform"
    ]
    ledger = Ledger(state_dir / LEDGER_FILE)
    try:
        ledger.open(create=False)
    except LedgerError:
        return named
    with closing(ledger):
        return [*named, *ledger.paths()]
