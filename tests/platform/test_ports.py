"""The platform as a whole: eight ports, what is not configured, and the commands that work on its state."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from creto_platform import NotConfigured, Platform, PlatformError, audit_directories, embedded
from creto_platform.audit import Audit, LogTampered, verify_local
from creto_platform.authz.port import Answer, Authz, Query, Watch
from creto_platform.consensus import Consensus
from creto_platform.crypto import Crypto
from creto_platform.memory import Memory, NoMemory
from creto_platform.nhi import Nhi
from creto_platform.storage import NoStorage, Storage
from creto_platform.vault import NoVault, Secret, Vault


class DenyAll:
    epoch = 1

    def decide(self, query: Query) -> Answer:
        return Answer("deny", "policy_no_permit", "")

    def reads(self, action: str) -> frozenset[str]:
        return frozenset()

    def lasting(self, query: Query) -> frozenset[str] | None:
        return None

    def watch(self, host: str) -> Watch:
        return Watch()


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    made = embedded(tmp_path / "state", authz=DenyAll(), trust_domain="example.org", user="alice")
    yield made
    made.close()


def methods(protocol: type) -> set[str]:
    return {
        name
        for name, member in vars(protocol).items()
        if not name.startswith("_") and (callable(member) or isinstance(member, property))
    }


@pytest.mark.parametrize(
    ("field", "port"),
    [
        ("crypto", Crypto),
        ("nhi", Nhi),
        ("authz", Authz),
        ("audit", Audit),
        ("vault", Vault),
        ("storage", Storage),
        ("memory", Memory),
        ("consensus", Consensus),
    ],
)
def test_every_port_of_the_embedded_platform_has_every_method(platform: Platform, field: str, port: type) -> None:
    implementation = getattr(platform, field)
    assert methods(port)
    for name in methods(port):
        assert hasattr(type(implementation), name), f"{field}.{name}"


def argument(parameter: inspect.Parameter) -> Any:
    return b"" if parameter.name in ("value", "data") else "x"


@pytest.mark.parametrize(
    ("port", "absent", "name"),
    [(Vault, NoVault, "vault"), (Storage, NoStorage, "storage"), (Memory, NoMemory, "memory")],
)
def test_a_port_without_backend_says_from_every_method_how_to_get_one(
    port: type, absent: Callable[[], object], name: str
) -> None:
    for method in sorted(methods(port)):
        function = getattr(absent(), method)
        required = {
            parameter.name: argument(parameter)
            for parameter in inspect.signature(function).parameters.values()
            if parameter.default is inspect.Parameter.empty
        }
        with pytest.raises(NotConfigured, match=rf"the {name} port is not configured: set \[{name}\] backend"):
            answer = function(**required)
            if inspect.isawaitable(answer):
                asyncio.run(_await(answer))


async def _await(answer: Any) -> Any:
    return await answer


def test_the_signatures_of_absent_ports_are_those_of_their_protocol() -> None:
    for port, absent in ((Vault, NoVault), (Storage, NoStorage), (Memory, NoMemory)):
        for name in methods(port):
            assert inspect.signature(getattr(absent, name)) == inspect.signature(getattr(port, name)), name


def test_a_secret_does_not_show_its_value() -> None:
    assert "hunter2" not in repr(Secret("path", 1, b"hunter2"))


def test_the_platform_works_together_and_leaves_a_verified_log(platform: Platform, tmp_path: Path) -> None:
    identity = platform.nhi.agent("researcher", ttl_s=60)
    platform.audit.append(
        [
            {
                "id": os.urandom(16),
                "who": identity.id,
                "dch": identity.chain_digest,
                "act": "httpRead",
                "at": platform.consensus.now().unix_ms * 1_000_000,
            }
        ]
    )
    platform.close()
    report = verify_local(*audit_directories(tmp_path / "state"))
    assert report.ok and report.size == 1
    assert report.origin.startswith("example.org/")
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


def test_a_platform_whose_audit_log_was_changed_does_not_start(platform: Platform, tmp_path: Path) -> None:
    platform.close()
    (audit_directories(tmp_path / "state")[1] / "last_signed").unlink()
    with pytest.raises(LogTampered):
        embedded(tmp_path / "state", authz=DenyAll(), trust_domain="example.org")


def test_a_state_of_another_trust_domain_does_not_start(platform: Platform, tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match=r"belongs to trust domain example\.org"):
        embedded(tmp_path / "state", authz=DenyAll(), trust_domain="other.org")


class Operator:
    """What a command gets as its context object, as far as these commands use it."""

    def __init__(self, state_dir: Path, as_json: bool) -> None:
        from types import SimpleNamespace

        self.state_dir = state_dir
        self.json = as_json
        self.config = SimpleNamespace(common=SimpleNamespace(trust_domain="example.org"), owner="alice")

    def emit(self, rows: Any, document: Any) -> None:
        if self.json:
            click.echo(json.dumps(document))
        else:
            for row in rows:
                click.echo(" | ".join(str(value) for value in row.values()))


def creto(state_dir: Path, *arguments: str, as_json: bool = True) -> Result:
    from creto_proxy.commands.audit import audit
    from creto_proxy.commands.keys import keys

    group = {"audit": audit, "keys": keys}[arguments[0]]
    return CliRunner().invoke(group, list(arguments[1:]), obj=Operator(state_dir, as_json))


@pytest.fixture
def state(platform: Platform, tmp_path: Path) -> Path:
    identity = platform.nhi.agent("researcher", ttl_s=3600)
    platform.audit.append(
        [
            {
                "id": bytes([number] * 16),
                "who": identity.id,
                "act": "httpRead",
                "res": f"https://h/{number}",
                "out": "success",
                "at": time.time_ns(),
            }
            for number in range(30)
        ]
    )
    platform.audit.publish()
    return tmp_path / "state"


def test_audit_verify_says_what_was_verified(state: Path) -> None:
    result = creto(state, "audit", "verify")
    assert result.exit_code == 0, result.output
    document = json.loads(result.output)
    assert (document["ok"], document["size"], document["problems"]) == (True, 30, [])
    assert [signer.rpartition(" ")[2] for signer in document["signers"]] == ["(Ed25519)", "(ML-DSA-65)"]
    assert "verified" in creto(state, "audit", "verify", as_json=False).output


def test_audit_verify_fails_in_one_line_with_status_1(state: Path) -> None:
    tile = state / "audit" / "log" / "tile" / "0" / "000.p" / "30"
    tile.write_bytes(bytes(32 * 30))
    result = creto(state, "audit", "verify")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False
    assert result.stderr.count("\n") == 1 and "tile/0/000.p/30" in result.stderr


def test_audit_verify_of_another_log_needs_its_keys(state: Path, tmp_path: Path) -> None:
    directory = str(state / "audit" / "log")
    result = creto(state, "audit", "verify", directory)
    assert result.exit_code == 2 and "--vkey" in result.stderr
    vkeys = json.loads(creto(state, "keys", "audit").output)
    given = creto(state, "audit", "verify", directory, "--vkey", vkeys[0], "--vkey", vkeys[1])
    assert given.exit_code == 0
    (tmp_path / "vkeys").write_text("# the log's keys\n\n" + "\n".join(vkeys))
    assert creto(state, "audit", "verify", directory, "--vkey", str(tmp_path / "vkeys")).exit_code == 0
    only = creto(state, "audit", "verify", directory, "--vkey", vkeys[0])
    assert only.exit_code == 1 and "hybrid" in only.stderr
    assert creto(state, "audit", "verify", directory, "--vkey", vkeys[0], "--policy", "ed25519").exit_code == 0
    assert creto(state, "audit", "verify", directory, "--vkey", "nonsense+1+2").exit_code == 1


def test_audit_verify_extends_an_older_checkpoint(platform: Platform, state: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.write_bytes((state / "audit" / "log" / "checkpoint").read_bytes())
    platform.audit.append([{"id": bytes(16)}])
    platform.audit.publish()
    assert creto(state, "audit", "verify", "--since", str(saved)).exit_code == 0
    saved.write_bytes(b"garbage")
    assert creto(state, "audit", "verify", "--since", str(saved)).exit_code == 1


def test_audit_proof_can_be_verified_by_file(state: Path, tmp_path: Path) -> None:
    path = tmp_path / "entry.tlog-proof"
    assert json.loads(creto(state, "audit", "proof", "7", "--out", str(path)).output)["index"] == 7
    by_id = creto(state, "audit", "proof", bytes([7] * 16).hex(), as_json=False)
    assert by_id.output == path.read_text()
    checked = creto(state, "audit", "verify", "--proof", str(path))
    assert checked.exit_code == 0, checked.output
    assert json.loads(checked.output)["record"]["res"] == "https://h/7"
    path.write_text(path.read_text().replace("index 7", "index 8"))
    refused = creto(state, "audit", "verify", "--proof", str(path))
    assert refused.exit_code == 1 and refused.stderr.count("\n") == 1
    path.write_bytes(b"\xff")
    assert creto(state, "audit", "verify", "--proof", str(path)).exit_code == 1


@pytest.mark.parametrize(("entry", "status"), [("30", 1), ("00" * 16, 0), ("ff" * 16, 1), ("zebra", 2), ("", 1)])
def test_audit_proof_of_what_is_not_there_fails(state: Path, entry: str, status: int) -> None:
    assert creto(state, "audit", "proof", entry).exit_code == status


def test_audit_tail_shows_the_last_entries(state: Path) -> None:
    document = json.loads(creto(state, "audit", "tail", "-n", "2").output)
    assert [item["index"] for item in document] == [28, 29]
    assert document[1]["record"]["id"] == bytes([29] * 16).hex()
    text = creto(state, "audit", "tail", "-n", "1", as_json=False).output
    assert "https://h/29" in text and "success" in text
    assert creto(state, "audit", "tail", "-n", "-1").exit_code == 2


def test_audit_tail_does_not_let_a_record_steer_the_terminal(platform: Platform, state: Path) -> None:
    platform.audit.append([{"id": b"\xee" * 16, "res": "/\x1b[2J\x9b1m\r\n\u202eevil", "who": "ä"}])
    platform.audit.publish()
    text = creto(state, "audit", "tail", "-n", "1", as_json=False).output
    assert "/\\x1b[2J\\x9b1m\\r\\n\\u202eevil" in text and "ä" in text


@pytest.mark.parametrize("command", [("verify",), ("proof", "0"), ("tail",)])
def test_audit_commands_without_a_log_say_so(tmp_path: Path, command: tuple[str, ...]) -> None:
    result = creto(tmp_path, "audit", *command)
    assert result.exit_code == 1
    assert "no audit log" in result.stderr and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_keys_are_listed_by_id_and_without_secrets(state: Path) -> None:
    document = json.loads(creto(state, "keys", "list").output)
    assert [(item["kind"], item["principal"], item["state"]) for item in document] == [
        ("human", "spiffe://example.org/human/alice", "valid"),
        ("agent", "spiffe://example.org/agent/researcher", "valid"),
    ]
    seeds = [json.loads(path.read_text())["seed"] for path in state.rglob("*.key")]
    outputs = [creto(state, "keys", name).output for name in ("list", "tokens", "audit", "selftest")]
    assert len(seeds) == 4
    assert not any(seed in output for seed in seeds for output in outputs)


def test_keys_rotate_and_revoke_take_effect(platform: Platform, state: Path) -> None:
    identity = platform.nhi.agent("researcher")
    (before,) = platform.nhi.agents()
    rotated = json.loads(creto(state, "keys", "rotate", "researcher").output)
    assert rotated["key"] != before.kid.hex()
    assert creto(state, "keys", "rotate", "nobody").exit_code == 1
    tokens = json.loads(creto(state, "keys", "tokens").output)
    assert identity.id in {token["to"] for token in tokens}
    revoked = creto(state, "keys", "revoke", "principal", identity.id, "--reason", "left")
    assert revoked.exit_code == 0
    with pytest.raises(PlatformError, match="revoked"):
        platform.nhi.recheck(identity, time.time())
    listed = json.loads(creto(state, "keys", "list").output)
    assert listed[1]["state"] == "revoked"
    assert creto(state, "keys", "revoke", "key", "xyz").exit_code == 1
    assert creto(state, "keys", "revoke", "planet", "mars").exit_code == 2


def test_keys_enrol_lets_agents_belong_to_somebody_else(platform: Platform, state: Path) -> None:
    assert creto(state, "keys", "enrol", "bob").exit_code == 0
    assert platform.nhi.agent("bobs", owner="bob").chain[0] == "spiffe://example.org/human/bob"
    assert creto(state, "keys", "enrol", "b/o/b").exit_code == 1


def test_keys_of_an_empty_state_are_none(tmp_path: Path) -> None:
    assert json.loads(creto(tmp_path, "keys", "list").output) == []
    assert creto(tmp_path, "keys", "audit").exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_keys_selftest_passes_here(tmp_path: Path) -> None:
    result = creto(tmp_path, "keys", "selftest")
    assert result.exit_code == 0 and json.loads(result.output)[0]["result"] == "passed"
