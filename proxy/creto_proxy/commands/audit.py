"""``creto audit``: verify, prove and follow the audit log, this machine's or anybody's."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

if TYPE_CHECKING:
    from creto_platform.audit import Entry, LogReader, Policy, Report, Verifier
    from creto_proxy.cli import Operator

_FOLLOW_S = 0.5
_POLICIES = click.Choice(["hybrid", "ed25519"])


@click.group()
def audit() -> None:
    """Follow, prove and verify the audit log."""


@audit.command()
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False), required=False)
@click.option("--vkey", "vkeys", multiple=True, metavar="VKEY|FILE", help="Verifier key, or a file of them.")
@click.option("--policy", type=_POLICIES, default="hybrid", help="Signatures that must be there.", show_default=True)
@click.option(
    "--since",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="An older checkpoint that the log must extend.",
)
@click.option(
    "--proof",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Check one proof file instead of a log.",
)
@click.pass_obj
def verify(
    operator: Operator,
    directory: Path | None,
    vkeys: Sequence[str],
    policy: str,
    since: Path | None,
    proof: Path | None,
) -> None:
    """Verify every entry, tile and signature of a log, or one proof.

    DIRECTORY holds the log's `checkpoint`; without it the log of this machine is verified, by its own keys. Somebody
    else's log or proof is verified by keys you got another way: give them with --vkey.
    """
    from creto_platform.audit import AuditError

    try:
        if proof is not None:
            _verify_proof(operator, proof, _vkeys(operator, vkeys), cast("Policy", policy))
            return
        report = _verify_log(operator, directory, vkeys, cast("Policy", policy), since)
    except AuditError as error:
        raise click.ClickException(str(error)) from None
    _emit_report(operator, report)
    if not report.ok:
        raise click.ClickException(f"the log does not verify: {report.problems[0]}")


@audit.command()
@click.argument("entry")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write the proof there.")
@click.pass_obj
def proof(operator: Operator, entry: str, out: Path | None) -> None:
    """Export the proof that ENTRY (index, or record id in hex) is in the log, to be verified offline."""
    from creto_platform.audit import AuditError, export_proof

    reader = _reader(operator)
    try:
        index = _index(reader, entry)
        text = export_proof(reader, index)
    except AuditError as error:
        raise click.ClickException(str(error)) from None
    if out is not None:
        out.write_text(text, encoding="utf-8")
        operator.emit([{"entry": index, "proof": out}], {"index": index, "file": str(out)})
    elif operator.json:
        operator.emit([], {"index": index, "proof": text})
    else:
        click.echo(text, nl=False)


@audit.command()
@click.option(
    "-n", "--lines", type=click.IntRange(0, 1_000_000), default=20, show_default=True, help="Entries to show."
)
@click.option("-f", "--follow", is_flag=True, help="Wait for more until interrupted.")
@click.pass_obj
def tail(operator: Operator, lines: int, follow: bool) -> None:
    """Show the last entries. With --json and --follow one document per line."""
    from creto_platform.audit import AuditError

    reader = _reader(operator)
    try:
        entries = reader.tail(lines)
        if not follow:
            operator.emit([_row(entry) for entry in entries], [_document(entry) for entry in entries])
            return
        seen = reader.checkpoint().size
        while True:
            for entry in entries:
                _print_line(operator, entry)
            time.sleep(_FOLLOW_S)
            entries = reader.read(seen, reader.checkpoint().size - seen)
            seen += len(entries)
    except AuditError as error:
        raise click.ClickException(str(error)) from None


def _verify_log(
    operator: Operator, directory: Path | None, vkeys: Sequence[str], policy: Policy, since: Path | None
) -> Report:
    from creto_platform import audit_directories
    from creto_platform.audit import verify, verify_local

    if directory is not None and not vkeys:
        raise click.UsageError("give the log's verifier keys with --vkey; keys found beside a log prove nothing")
    if directory is None and not vkeys and since is None:
        _reader(operator)
        return verify_local(*audit_directories(operator.state_dir), policy=policy)
    keys = _vkeys(operator, vkeys)
    where = audit_directories(operator.state_dir)[0] / "log" if directory is None else directory
    return verify(where, keys, policy=policy, since=None if since is None else since.read_bytes())


def _verify_proof(operator: Operator, path: Path, vkeys: Sequence[str], policy: Policy) -> None:
    from creto_platform.audit import ProofInvalid, check_proof, parse_vkey
    from creto_platform.crypto import EmbeddedCrypto

    verifiers: list[Verifier] = [parse_vkey(text) for text in vkeys]
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ProofInvalid(f"{path}: not a text file") from None
    entry, checkpoint = check_proof(text, verifiers, EmbeddedCrypto(), policy)
    document = {
        "ok": True,
        "origin": checkpoint.origin,
        "size": checkpoint.size,
        "root": checkpoint.root.hex(),
        **_document(entry),
    }
    operator.emit([{"log": checkpoint.origin, "of": checkpoint.size, **_row(entry)}], document)


def _vkeys(operator: Operator, given: Sequence[str]) -> list[str]:
    """vkeys as given, files read; without any, those of this machine's log."""
    from creto_platform import audit_directories
    from creto_platform.audit import load_vkeys

    if not given:
        return load_vkeys(audit_directories(operator.state_dir)[0] / "vkeys")
    keys: list[str] = []
    for item in given:
        # A vkey has two plus signs and its name none, a path rarely looks like that.
        keys += [item] if item.count("+") >= 2 and not Path(item).exists() else load_vkeys(Path(item))
    return keys


def _reader(operator: Operator) -> LogReader:
    from creto_platform import audit_directories
    from creto_platform.audit import LogReader

    directory = audit_directories(operator.state_dir)[0] / "log"
    if not (directory / "checkpoint").exists():
        raise click.ClickException(f"there is no audit log in {operator.state_dir} yet")
    return LogReader(directory)


def _index(reader: LogReader, entry: str) -> int:
    if entry.isascii() and entry.isdigit() and len(entry) < 20:
        return int(entry)
    try:
        record_id = bytes.fromhex(entry)
    except ValueError:
        raise click.UsageError(f"{entry!r} is neither an index nor a record id") from None
    index = reader.find(record_id)
    if index is None:
        raise click.ClickException(f"there is no record {entry} in the published log")
    return index


def _emit_report(operator: Operator, report: Report) -> None:
    row = {
        "log": report.origin,
        "entries": report.size,
        "root": report.root.hex()[:16],
        "signed by": ", ".join(signer.rpartition(" ")[2].strip("()") for signer in report.signers),
        "result": "verified" if report.ok else "FAILED",
    }
    document = {
        "ok": report.ok,
        "origin": report.origin,
        "size": report.size,
        "root": report.root.hex(),
        "signers": list(report.signers),
        "entries_checked": report.entries,
        "files_checked": report.tiles,
        "problems": list(report.problems),
    }
    operator.emit([row], document)


def _row(entry: Entry) -> dict[str, object]:
    record = entry.record
    return {
        "entry": entry.index,
        "time": _time(record.get("at")),
        "who": _visible(record.get("who", "")),
        "action": _visible(record.get("act", "")),
        "resource": _visible(record.get("res", "")),
        "outcome": _visible(record.get("out", "")),
        "why": _visible(record.get("why", "")),
    }


def _visible(value: object) -> str:
    """Text for a terminal: what an agent put into a record must not steer it."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(value))


def _document(entry: Entry) -> dict[str, Any]:
    return {"index": entry.index, "record": _plain(entry.record)}


def _print_line(operator: Operator, entry: Entry) -> None:
    if operator.json:
        click.echo(json.dumps(_document(entry)))
    else:
        click.echo("  ".join(str(value) for value in _row(entry).values()))


def _plain(value: Any) -> Any:
    """What JSON can hold: bytes as hex."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _time(unix_ns: object) -> str:
    if not isinstance(unix_ns, int):
        return ""
    try:
        return datetime.fromtimestamp(unix_ns / 1e9, UTC).isoformat(sep=" ", timespec="milliseconds")[:-6]
    except (ValueError, OverflowError, OSError):
        return ""
