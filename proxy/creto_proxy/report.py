"""What a run did: every request with its decision, totals by agent and by chain, and the audit log's word for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from creto_platform.audit import verify
from creto_proxy.model import Outcome

_STYLE = {"allow": "green", "approved": "cyan", "deny": "red"}
_WORD = {"allow": "allowed", "approved": "approved", "deny": "refused"}


@dataclass(frozen=True, slots=True)
class AuditState:
    """size: records in the log. root: hex of the Merkle root. verified: the log was read back and recomputed."""

    size: int
    root: str
    verified: bool
    detail: str = ""


def audit_state(directory: Path, vkeys: Sequence[str]) -> AuditState:
    """The log below ``directory`` read back from disk and recomputed, as an outsider would with its vkeys alone."""
    found = verify(directory, vkeys)
    return AuditState(found.size, found.root.hex(), found.ok, "; ".join(found.problems))


@dataclass(slots=True)
class Total:
    """Sums over a group of requests; money in nano-dollars."""

    requests: int = 0
    refused: int = 0
    tokens: int = 0
    cost_nano_usd: int = 0
    bytes_up: int = 0
    bytes_down: int = 0

    def add(self, outcome: Outcome) -> None:
        self.requests += 1
        self.refused += outcome.decision == "deny"
        self.tokens += total_tokens(outcome)
        self.cost_nano_usd += outcome.usage.cost_nano_usd
        self.bytes_up += outcome.bytes_up
        self.bytes_down += outcome.bytes_down


@dataclass(slots=True)
class Report:
    """The report as a document; ``document()`` is what ``--report json`` prints."""

    run: str
    exit_status: int
    requests: list[Outcome] = field(default_factory=list)
    by_agent: dict[str, Total] = field(default_factory=dict)
    by_chain: dict[str, Total] = field(default_factory=dict)
    audit: AuditState | None = None

    def document(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "exit_status": self.exit_status,
            "requests": [request_document(outcome) for outcome in self.requests],
            "totals": {
                "by_agent": [{"agent": key, **_total_document(total)} for key, total in self.by_agent.items()],
                "by_chain": [{"chain": key, **_total_document(total)} for key, total in self.by_chain.items()],
            },
            "audit": asdict(self.audit) if self.audit is not None else None,
        }


def build(outcomes: Iterable[Outcome], *, run: str, exit_status: int, audit: AuditState | None) -> Report:
    """Sums up the outcomes of a run, in the order they happened."""
    report = Report(run=run, exit_status=exit_status, audit=audit)
    for outcome in outcomes:
        report.requests.append(outcome)
        report.by_agent.setdefault(outcome.agent, Total()).add(outcome)
        report.by_chain.setdefault(" > ".join(outcome.chain), Total()).add(outcome)
    return report


def total_tokens(outcome: Outcome) -> int:
    """Input plus output tokens; cached and reasoning tokens are parts of those, not added again."""
    tokens = outcome.usage.tokens
    return tokens.get("input", 0) + tokens.get("output", 0)


def usd(nano: int) -> str:
    """Nano-dollars as dollars, exact: six decimals, more where the amount has them, never an exponent."""
    value = Decimal(nano).scaleb(-9)
    text = f"{value:.9f}".rstrip("0")
    whole, _, fraction = text.partition(".")
    return f"{whole}.{fraction.ljust(6, '0')}"


def request_document(outcome: Outcome) -> dict[str, Any]:
    usage = outcome.usage
    return {
        "id": outcome.id.hex(),
        "at_unix_ns": outcome.at_unix_ns,
        "agent": outcome.agent,
        "chain": list(outcome.chain),
        "way": outcome.way,
        "action": outcome.action,
        "method": outcome.method,
        "destination": f"{outcome.scheme}://{outcome.host}:{outcome.port}",
        "path": outcome.target,
        "decision": outcome.decision,
        "reason": outcome.reason or outcome.error,
        "error": outcome.error or None,
        "policies": list(outcome.policies),
        "approval_id": outcome.approval_id or None,
        "status": outcome.status or None,
        "usage": {
            "certainty": usage.certainty,
            "provider": usage.provider or None,
            "model": usage.model or None,
            "tokens": dict(usage.tokens),
            "cost_usd": usd(usage.cost_nano_usd),
            "cost_nano_usd": usage.cost_nano_usd,
        },
        "bytes_up": outcome.bytes_up,
        "bytes_down": outcome.bytes_down,
        "creto_us": outcome.creto_ns / 1000,
        "held_ms": outcome.held_ns / 1e6,
        "upstream_ms": outcome.upstream_ns / 1e6,
        "total_ms": outcome.total_ns / 1e6,
    }


def _total_document(total: Total) -> dict[str, Any]:
    return {**asdict(total), "cost_usd": usd(total.cost_nano_usd)}


def render(report: Report, console: Console) -> None:
    """The coloured tables for a terminal."""
    console.print()
    console.print(_requests_table(report))
    console.print(_totals_table("Totals by agent", "agent", report.by_agent))
    console.print(_totals_table("Totals by delegation chain", "chain", report.by_chain))
    if report.audit is not None:
        audit = report.audit
        word = Text("verified", "bold green") if audit.verified else Text(f"NOT VERIFIED {audit.detail}", "bold red")
        console.print(Text.assemble("audit log  ", f"{audit.size} records  root {audit.root}  ", word), soft_wrap=True)


def _requests_table(report: Report) -> Table:
    table = Table(title=f"Run {report.run}", title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("#", justify="right")
    table.add_column("decision")
    table.add_column("destination", overflow="fold", ratio=3)
    table.add_column("reason", overflow="fold", ratio=2)
    table.add_column("status", justify="right")
    table.add_column("tokens", justify="right")
    table.add_column("cost USD", justify="right", no_wrap=True)
    table.add_column("held", justify="right", no_wrap=True)
    table.add_column("added", justify="right", no_wrap=True)
    for number, outcome in enumerate(report.requests, 1):
        table.add_row(
            str(number),
            Text(_WORD.get(outcome.decision, outcome.decision), _STYLE.get(outcome.decision, "")),
            _plain(_destination(outcome)),
            _plain(_reason(outcome)),
            str(outcome.status or "-"),
            _tokens(outcome),
            usd(outcome.usage.cost_nano_usd) if outcome.usage.cost_nano_usd else "-",
            f"{outcome.held_ns / 1e9:.1f} s" if outcome.held_ns else "-",
            f"{outcome.creto_ns / 1e6:.2f} ms",
        )
    return table


def _totals_table(title: str, key: str, totals: dict[str, Total]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    table.add_column(key, overflow="fold")
    for name in ("requests", "refused", "tokens", "cost USD", "bytes up", "bytes down"):
        table.add_column(name, justify="right")
    for name, total in totals.items():
        table.add_row(
            _plain(name),
            str(total.requests),
            str(total.refused),
            str(total.tokens),
            usd(total.cost_nano_usd),
            str(total.bytes_up),
            str(total.bytes_down),
        )
    return table


def _plain(text: str) -> Text:
    """Text from the agent, without the power to move the cursor or change colours."""
    return Text("".join(c if c.isprintable() else "�" for c in text))


def _destination(outcome: Outcome) -> str:
    where = f"{outcome.host}:{outcome.port}" if outcome.port not in (0, 80, 443) else outcome.host
    return " ".join(part for part in (outcome.method or outcome.action, where + outcome.target) if part)


def _reason(outcome: Outcome) -> str:
    if outcome.reason and outcome.error:
        return f"{outcome.reason} ({outcome.error})"
    return outcome.reason or outcome.error


def _tokens(outcome: Outcome) -> str:
    usage = outcome.usage
    if usage.certainty == "none":
        return "-"
    if usage.certainty == "unknown":
        return "unknown"
    return f"{usage.tokens.get('input', 0)}+{usage.tokens.get('output', 0)}"
