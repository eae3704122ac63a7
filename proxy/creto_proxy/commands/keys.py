"""``creto keys``: the keys of the trust domain, shown by id, rotated, withdrawn. No command prints a secret."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, cast

import click

if TYPE_CHECKING:
    from creto_platform.nhi import Nhi, RevocationKind
    from creto_proxy.cli import Operator


@click.group()
def keys() -> None:
    """Show and rotate keys of the trust domain."""


@keys.command("list")
@click.pass_obj
def list_keys(operator: Operator) -> None:
    """List humans, agents and the audit log's keys, by key id."""
    document: list[dict[str, object]] = []
    if (operator.state_dir / "nhi" / "nhi.db").exists():
        with _nhi(operator) as nhi:
            revoked = {(item.kind, item.value) for item in nhi.revocations()}
            for anchor in nhi.anchors():
                document.append(_key("human", anchor.principal, anchor.kid, "", anchor.created_at, revoked))
            for agent in nhi.agents():
                document.append(_key("agent", agent.id, agent.kid, agent.owner, agent.created_at, revoked))
    rows = [{**item, "key": str(item["key"])[:16]} for item in document]
    operator.emit(rows, document)


@keys.command()
@click.pass_obj
def tokens(operator: Operator) -> None:
    """List delegation tokens made here that have not expired, with the ids that `revoke token` takes."""
    with _nhi(operator) as nhi:
        now = time.time()
        document = [
            {
                "token": token.id,
                "from": token.issuer,
                "to": token.subject,
                "depth": token.depth,
                "expires": _time(token.expires),
            }
            for token in nhi.issued()
            if token.expires > now
        ]
    operator.emit(document, document)


@keys.command()
@click.argument("agent")
@click.pass_obj
def rotate(operator: Operator, agent: str) -> None:
    """Give AGENT a new key. Tokens for the old key hold until they expire; revoke the old key to end them now."""
    with _nhi(operator) as nhi:
        fresh = nhi.rotate(agent)
    document = {"agent": fresh.id, "key": fresh.kid.hex(), "owner": fresh.owner}
    operator.emit([document], document)


@keys.command()
@click.argument("kind", type=click.Choice(["token", "key", "principal"]))
@click.argument("value")
@click.option("--reason", default="", help="Why, for the record.")
@click.pass_obj
def revoke(operator: Operator, kind: str, value: str, reason: str) -> None:
    """Withdraw a token or key (id in hex) or a principal (SPIFFE id) and all authority below it. Cannot be undone."""
    with _nhi(operator) as nhi:
        done = nhi.revoke(cast("RevocationKind", kind), value, reason)
    document = {"kind": done.kind, "value": done.value, "by": done.by, "reason": done.reason}
    operator.emit([document], document)


@keys.command()
@click.argument("user")
@click.pass_obj
def enrol(operator: Operator, user: str) -> None:
    """Give USER, another person, a root key here, so that agents can be theirs."""
    with _nhi(operator) as nhi:
        anchor = nhi.enrol_human(user)
    document = {"human": anchor.principal, "key": anchor.kid.hex()}
    operator.emit([document], document)


@keys.command()
@click.pass_obj
def audit(operator: Operator) -> None:
    """Print the audit log's verifier keys, to be given to whoever verifies it."""
    from creto_platform import audit_directories
    from creto_platform.audit import NoteInvalid, load_vkeys

    path = audit_directories(operator.state_dir)[0] / "vkeys"
    try:
        vkeys = load_vkeys(path)
    except NoteInvalid:
        raise click.ClickException(f"there is no audit log in {operator.state_dir} yet") from None
    if operator.json:
        operator.emit([], vkeys)
        return
    for vkey in vkeys:
        click.echo(vkey)


@keys.command()
@click.pass_obj
def selftest(operator: Operator) -> None:
    """Hold every cryptographic provider to its known answers."""
    from creto_platform.crypto import EmbeddedCrypto

    document = [
        {
            "provider": status.name,
            "result": "passed" if status.enabled else "FAILED",
            "algorithms": ", ".join(sorted(status.algorithms)),
            "detail": status.detail,
        }
        for status in EmbeddedCrypto().status()
    ]
    operator.emit(document, document)
    failed = [str(item["provider"]) for item in document if item["result"] != "passed"]
    if failed:
        raise click.ClickException(f"disabled: {', '.join(failed)}")


@contextmanager
def _nhi(operator: Operator) -> Iterator[Nhi]:
    from creto_platform import PlatformError
    from creto_platform.crypto import EmbeddedCrypto
    from creto_platform.nhi import EmbeddedNhi

    config = operator.config
    try:
        nhi = EmbeddedNhi(
            operator.state_dir / "nhi",
            EmbeddedCrypto(),
            trust_domain=config.common.trust_domain,
            clock=time.time,
            user=config.owner,
        )
        try:
            yield nhi
        finally:
            nhi.close()
    except PlatformError as error:
        raise click.ClickException(str(error)) from None


def _key(
    kind: str, principal: str, kid: bytes, owner: str, created_at: float, revoked: set[tuple[RevocationKind, str]]
) -> dict[str, object]:
    is_revoked = ("key", kid.hex()) in revoked or ("principal", principal) in revoked
    return {
        "kind": kind,
        "principal": principal,
        "owner": owner,
        "key": kid.hex(),
        "created": _time(created_at),
        "state": "revoked" if is_revoked else "valid",
    }


def _time(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(sep=" ", timespec="seconds")[:-6]
