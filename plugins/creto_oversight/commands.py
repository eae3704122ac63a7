"""``creto approvals``: the queue, from any terminal of the operator's account.

Works on the record itself, so no sidecar has to run; one that holds the call notices within a tenth of a second. The
decider is the OS user behind the process (the real uid, never an environment variable), mapped to an approver by the
directory that was stored with the request.

Exit status: 0 done; 1 the answer is no (not eligible, already decided, timed out); 2 there is no such request.
"""

from __future__ import annotations

import json
import os
import pwd
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from creto_oversight.notify import SilentNotifier, printable, utc, where
from creto_oversight.requests import SECOND_NS, ApprovalRequest
from creto_oversight.states import OPEN, State

if TYPE_CHECKING:
    from creto_oversight.approvers import Directory
    from creto_oversight.desk import Desk
    from creto_oversight.store import Line, Store
    from creto_proxy.cli import Operator

BODY_SHOWN = 16_384


class _Refused(click.ClickException):
    exit_code = 1


class _Unknown(click.ClickException):
    exit_code = 2


class _WallClock:
    def now_ns(self) -> int:
        return time.monotonic_ns()

    def unix_ns(self) -> int:
        return time.time_ns()


@click.group()
def approvals() -> None:
    """List and decide what agents are waiting for."""


@approvals.command("list")
@click.option("--all", "everything", is_flag=True, help="Decided ones too.")
@click.pass_obj
def list_approvals(operator: Operator, everything: bool) -> None:
    """What waits for a decision, and approvals not used yet; the youngest first."""
    with _desk(operator) as desk:
        found = desk.listed(everything=everything)
        now_ns = desk.now_ns()
    rows = [_row(request, now_ns) for request in found]
    document = [_document(request) for request in found]
    if not rows and not operator.json:
        click.echo("Nothing waits for approval.")
        return
    operator.emit(rows, document)


@approvals.command()
@click.argument("approval_id", metavar="ID")
@click.pass_obj
def show(operator: Operator, approval_id: str) -> None:
    """Everything about one request: the exact action, who asks, and what happened so far."""
    with _desk(operator) as desk:
        request = desk.look(approval_id)
        history = desk.history(approval_id)
        now_ns = desk.now_ns()
    if operator.json:
        document = _document(request) | {"history": [_history_document(line) for line in history]}
        operator.emit([], document)
        return
    for text in _description(request, history, now_ns):
        click.echo(text)


@approvals.command()
@click.argument("approval_id", metavar="ID")
@click.option("--reason", default="", help="A word to the agent.")
@click.option("--version", type=int, default=None, help="Decide only if the request is still at this version.")
@click.pass_obj
def approve(operator: Operator, approval_id: str, reason: str, version: int | None) -> None:
    """Let the action happen, once, exactly as shown."""
    _decide(operator, approval_id, approve=True, reason=reason, version=version)


@approvals.command()
@click.argument("approval_id", metavar="ID")
@click.option("--reason", required=True, help="Why; the agent is told.")
@click.option("--version", type=int, default=None, help="Decide only if the request is still at this version.")
@click.pass_obj
def deny(operator: Operator, approval_id: str, reason: str, version: int | None) -> None:
    """Refuse the action, with the reason."""
    _decide(operator, approval_id, approve=False, reason=reason, version=version)


@approvals.command()
@click.argument("approval_id", metavar="ID")
@click.option("--reason", default="", help="Why.")
@click.pass_obj
def cancel(operator: Operator, approval_id: str, reason: str) -> None:
    """Withdraw an undecided request or an approval that was not used yet."""
    with _desk(operator) as desk:
        request = desk.cancel(approval_id, _user(), reason)
    _report(operator, request, "cancelled")


@approvals.command()
@click.argument("approval_id", metavar="ID")
@click.option("--reason", required=True, help="What was found out.")
@click.pass_obj
def acknowledge(operator: Operator, approval_id: str, reason: str) -> None:
    """Say that an action of unknown outcome was looked into, so that the agent may ask for it again."""
    with _desk(operator) as desk:
        request = desk.acknowledge(approval_id, _user(), reason)
    _report(operator, request, "acknowledged")


@approvals.command()
@click.pass_obj
def verify(operator: Operator) -> None:
    """Check that nothing was changed, removed or put into the history of decisions."""
    with _store(operator) as store:
        count = store.verify_history()
    operator.emit([{"history lines": count, "result": "verified"}], {"lines": count, "verified": True})


def _decide(operator: Operator, approval_id: str, *, approve: bool, reason: str, version: int | None) -> None:
    with _desk(operator) as desk:
        before = desk.look(approval_id)
        human = _human(before.directory)
        after = desk.decide(approval_id, human, approve=approve, comment=reason, version=version, via=_user())
    if after.revision == before.revision and after.state not in OPEN:
        raise _Refused(f"{approval_id} is {after.state} already, by {_who(after.decided_by)}; nothing was changed.")
    _report(operator, after, _outcome(after))


def _outcome(request: ApprovalRequest) -> str:
    if request.state in OPEN:
        wanted = ", ".join(f"{rules.name} needs {rules.quorum}" for rules in request.rules)
        return f"counted: {len(request.yes)} approved, {len(request.no)} denied; {wanted}"
    if request.state is State.APPROVED:
        return f"approved; the agent may do it once until {utc(request.grant_until_ns)}"
    return str(request.state)


def _report(operator: Operator, request: ApprovalRequest, outcome: str) -> None:
    if operator.json:
        operator.emit([], _document(request))
        return
    click.echo(f"{request.id} {where(request)}: {outcome}")


def _row(request: ApprovalRequest, now_ns: int) -> dict[str, object]:
    state = str(request.state)
    needed = max(rules.quorum for rules in request.rules)
    if request.state in OPEN:
        left = _span(request.deadline_ns - now_ns)
    else:
        left = _span(request.grant_until_ns - now_ns) if request.state is State.APPROVED else "-"
    return {
        "ID": request.id,
        "STATE": state if needed == 1 else f"{state} {len(request.yes)}/{needed}",
        "AGE": _span(now_ns - request.created_ns),
        "LEFT": left,
        "AGENT": printable(request.agent.rpartition("/")[2], 60),
        "ACTION": where(request),
    }


def _description(request: ApprovalRequest, history: list[Line], now_ns: int) -> Iterator[str]:
    shown = request.shown
    yield f"Request    {request.id}  version {request.version}"
    yield f"State      {_outcome(request)}"
    if request.state in OPEN:
        yield f"Deadline   {utc(request.deadline_ns)} ({_span(request.deadline_ns - now_ns)} left)"
    yield f"Agent      {printable(request.agent, 200)}"
    yield f"Chain      {' -> '.join(printable(link, 200) for link in request.chain)}"
    yield f"Profiles   {', '.join(request.profiles)}  (policies: {', '.join(map(printable, request.policies)) or '-'})"
    for rules in request.rules:
        people = ", ".join(_who(name) for name in sorted(rules.eligible(request.reached_s)))
        yield f"Approvers  {rules.name}: {rules.quorum} of {people}; may not approve: {rules.separation}"
    if request.previous is not None:
        ago = _span(now_ns - request.previous.ended_ns)
        earlier = f"{request.previous.id} {request.previous.state}, {ago} ago"
        yield f"Note       the identical action was asked for before: {earlier}"
    if request.question:
        yield f"Question   {printable(request.question)}"
        yield f"Answer     (claimed by the agent) {printable(request.answer) or '-'}"
    yield ""
    yield f"{printable(shown.method)} {printable(shown.path)}{'?' + printable(shown.query) if shown.query else ''}"
    yield f"{shown.scheme}://{printable(shown.host)}:{shown.port}"
    for name, value in shown.headers:
        yield f"  {printable(name, 100)}: {printable(value, 300)}"
    if shown.body_bytes:
        yield ""
        yield f"Body, {shown.body_bytes} bytes, SHA-256 {shown.body_sha256}"
        yield from _body_lines(request)
    yield ""
    for line in history:
        facts = " ".join(f"{key}={printable(str(value), 120)}" for key, value in line.facts.items())
        yield f"{utc(line.at_ns)} {line.event:<12} {printable(line.actor, 120)} {facts}"


def _body_lines(request: ApprovalRequest) -> Iterator[str]:
    text = request.shown.body
    if "json" in request.shown.content_type:
        try:
            text = json.dumps(json.loads(text), indent=2, ensure_ascii=False)
        except (ValueError, RecursionError):
            pass  # shown as stored
    for line in text[:BODY_SHOWN].split("\n"):
        yield f"  {printable(line)}"
    if len(text) > BODY_SHOWN:
        yield f"  ... {len(text) - BODY_SHOWN} more characters; --json has all of them"


def _document(request: ApprovalRequest) -> dict[str, Any]:
    shown = request.shown
    return {
        "id": request.id,
        "state": str(request.state),
        "version": request.version,
        "agent": request.agent,
        "chain": list(request.chain),
        "profiles": list(request.profiles),
        "policies": list(request.policies),
        "created": utc(request.created_ns),
        "deadline": utc(request.deadline_ns),
        "grant_until": utc(request.grant_until_ns) if request.grant_until_ns else None,
        "fingerprint": request.binding,
        "level": request.level,
        "approved_by": sorted(request.yes),
        "denied_by": sorted(request.no),
        "decided_by": request.decided_by or None,
        "comment": request.comment,
        "question": request.question,
        "answer": request.answer,
        "status": request.status or None,
        "error": request.error,
        "previous": {"id": request.previous.id, "state": str(request.previous.state)} if request.previous else None,
        "action": {
            "kind": shown.kind,
            "method": shown.method,
            "scheme": shown.scheme,
            "host": shown.host,
            "port": shown.port,
            "path": shown.path,
            "query": shown.query,
            "content_type": shown.content_type,
            "headers": [list(pair) for pair in shown.headers],
            "body": shown.body,
            "body_bytes": shown.body_bytes,
            "body_sha256": shown.body_sha256,
        },
    }


def _history_document(line: Line) -> dict[str, Any]:
    return {"at": utc(line.at_ns), "event": line.event, "actor": line.actor, **line.facts}


def _span(duration_ns: int) -> str:
    """A duration in its two largest units: ``1h02m``, ``4m05s``, ``7s``."""
    seconds = max(0, duration_ns // SECOND_NS)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86_400
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{seconds % 60:02d}s" if minutes else f"{seconds}s"


def _user() -> str:
    """The identity of the person at the terminal: ``os:NAME`` of the real uid."""
    uid = os.getuid()
    try:
        return f"os:{pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"os:uid-{uid}"


def _human(directory: Directory) -> str:
    human = directory.resolve(_user())
    if human is None:
        raise _Refused(f"{_user()} is not the identity of any approver of this request.")
    return human


def _who(name: str) -> str:
    return printable(name.removeprefix("human:"))


@contextmanager
def _desk(operator: Operator) -> Iterator[Desk]:
    from creto_oversight.desk import Caps, Desk
    from creto_oversight.owners import OWNERS, Owner

    no_caps = Caps(1, 1, 1, 1)  # commands make no requests, so the caps on making them do not matter
    with _store(operator) as store:
        yield Desk(store, Owner(operator.state_dir / OWNERS), no_caps, _WallClock(), SilentNotifier())


@contextmanager
def _store(operator: Operator) -> Iterator[Store]:
    from creto_oversight.engine import CommandRefused
    from creto_oversight.store import DATABASE, Store, StoreUnavailable

    path = operator.state_dir / DATABASE
    if not path.exists():
        raise _Unknown(f"No agent has ever asked for approval here ({path} does not exist); see --state-dir.")
    store = Store(path)
    try:
        store.open()
        yield store
    except CommandRefused as error:
        raise (_Unknown if error.problem == "unknown-request" else _Refused)(error.detail) from None
    except StoreUnavailable as error:
        raise _Refused(str(error)) from None
    finally:
        store.close()
