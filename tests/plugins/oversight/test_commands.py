"""``creto approvals``, from another process' point of view: only the state directory is shared."""

from __future__ import annotations

import io
import json
import os
import pwd
import re
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from creto_oversight.approvers import Directory
from creto_oversight.commands import approvals
from creto_oversight.notify import StreamNotifier, printable
from creto_oversight.states import Event, State
from creto_proxy.cli import Operator
from creto_proxy.testing import make_request

from .harness import CaseClock, Fixed, Station, Told, refund, rules, submit

ME = pwd.getpwuid(os.getuid()).pw_name
MINE = rules("pay", (f"human:{ME}",))
OTHERS = rules("others", ("human:somebody-else",))
PAIR = rules("pair", (f"human:{ME}", "human:somebody-else"), quorum=2)
MAPPED = Directory({f"os:{ME}": "human:alice"}, frozenset({"human:alice"}))


@pytest.fixture
def clock() -> CaseClock:
    """Starts at the present, because commands read the real clock."""
    return CaseClock(time.time_ns())


@pytest.fixture
def station(tmp_path: Path, clock: CaseClock) -> Iterator[Station]:
    profiles = Fixed({"pay": MINE, "others": OTHERS, "pair": PAIR, "mapped": rules("mapped", ("human:alice",))})
    station = Station(tmp_path, clock, profiles, Told())
    yield station
    station.crash()


def creto(directory: Path, *arguments: str, as_json: bool = False) -> Result:
    operator = Operator(state_dir=directory, as_json=as_json)
    return CliRunner().invoke(approvals, list(arguments), obj=operator, prog_name="approvals")


async def asked(station: Station, profile: str = "pay", amount: int = 800) -> str:
    return str((await submit(station.gate, refund(amount), profile)).facts["approval_id"])


async def test_approving_makes_a_grant(station: Station, tmp_path: Path) -> None:
    request_id = await asked(station)
    result = creto(tmp_path, "approve", request_id)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "approved" in result.output and "POST https://api.stripe.com/v1/refunds" in result.output
    request = station.desk.look(request_id)
    assert (request.state, request.decided_by, request.votes[0].via) == (State.APPROVED, f"human:{ME}", f"os:{ME}")


async def test_denying_needs_a_reason_which_reaches_the_agent(station: Station, tmp_path: Path) -> None:
    request_id = await asked(station)
    assert creto(tmp_path, "deny", request_id).exit_code == 2
    assert creto(tmp_path, "deny", request_id, "--reason", " ").exit_code == 1
    assert creto(tmp_path, "deny", request_id, "--reason", "too much").exit_code == 0
    assert "too much" in (await submit(station.gate, refund())).detail


async def test_the_list_shows_what_waits(station: Station, tmp_path: Path) -> None:
    assert creto(tmp_path, "list").output == "Nothing waits for approval.\n"
    first, second = await asked(station), await asked(station, "pair", 900)
    creto(tmp_path, "deny", first, "--reason", "no")
    creto(tmp_path, "approve", second)
    result = creto(tmp_path, "list")
    assert result.exit_code == 0
    [row] = [line for line in result.output.splitlines() if "ovr_" in line]
    assert row.split()[:3] == [second, "pending", "1/2"]
    assert "59m" in row and "POST https://api.stripe.com/v1/refunds" in row
    listed = json.loads(creto(tmp_path, "list", "--all", as_json=True).stdout)
    assert [(each["id"], each["state"]) for each in listed] == [(second, "pending"), (first, "denied")]


async def test_show_has_everything_a_decision_needs(station: Station, tmp_path: Path) -> None:
    request_id = await asked(station)
    text = creto(tmp_path, "show", request_id).output
    for part in (
        "POST /v1/refunds", "https://api.stripe.com:443", '"amount": 800', "human:erin -> agent:a0 -> agent:a1",
        "Deadline", "refund-over-5", ME, "submitted",
    ):  # fmt: skip
        assert part in text
    document = json.loads(creto(tmp_path, "show", request_id, as_json=True).stdout)
    assert document["action"]["body"] == '{"amount":800,"charge":"ch_1"}'
    assert [line["event"] for line in document["history"]] == ["submitted", "notified"]


@pytest.mark.parametrize("command", [["show"], ["approve"], ["deny", "--reason", "x"], ["cancel"]])
async def test_an_unknown_id_is_said_to_be_unknown(station: Station, tmp_path: Path, command: list[str]) -> None:
    result = creto(tmp_path, *command, "ovr_nothing")
    assert result.exit_code == 2
    assert result.stderr == "Error: There is no request for approval 'ovr_nothing'.\n"


def test_a_state_directory_without_requests_is_said_to_be_one(tmp_path: Path) -> None:
    result = creto(tmp_path, "list")
    assert (result.exit_code, str(tmp_path) in result.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == [], "looking creates nothing"


async def test_who_is_no_approver_cannot_decide(station: Station, tmp_path: Path) -> None:
    request_id = await asked(station, "others")
    for command in (["approve"], ["deny", "--reason", "x"]):
        result = creto(tmp_path, *command, request_id)
        assert (result.exit_code, result.stderr) == (1, f"Error: human:{ME} is not an approver of this request.\n")
    assert station.desk.look(request_id).state is State.PENDING


async def test_the_name_in_the_environment_is_not_believed(
    station: Station, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_id = await asked(station, "others")
    for name in ("USER", "LOGNAME", "LNAME", "USERNAME", "SUDO_USER"):
        monkeypatch.setenv(name, "somebody-else")
    assert creto(tmp_path, "approve", request_id).exit_code == 1


async def test_an_os_user_is_the_approver_he_is_mapped_to(tmp_path: Path, clock: CaseClock) -> None:
    station = Station(tmp_path, clock, Fixed({"pay": rules("pay", ("human:alice",))}, MAPPED), Told())
    request_id = await asked(station)
    assert creto(tmp_path, "approve", request_id).exit_code == 0
    assert station.desk.look(request_id).decided_by == "human:alice"
    station.crash()


async def test_an_approver_with_listed_identities_has_no_others(tmp_path: Path, clock: CaseClock) -> None:
    people = Directory({"os:elsewhere": f"human:{ME}"}, frozenset({f"human:{ME}"}))
    station = Station(tmp_path, clock, Fixed({"pay": MINE}, people), Told())
    result = creto(tmp_path, "approve", await asked(station))
    assert (result.exit_code, f"os:{ME} is not the identity of any approver" in result.stderr) == (1, True)
    station.crash()


async def test_what_is_decided_stays_decided(station: Station, tmp_path: Path) -> None:
    request_id = await asked(station)
    assert creto(tmp_path, "deny", request_id, "--reason", "no").exit_code == 0
    for command in (["approve"], ["deny", "--reason", "again"], ["cancel"]):
        result = creto(tmp_path, *command, request_id)
        assert result.exit_code == 1
        assert "denied" in result.stderr and ME in result.stderr


async def test_what_timed_out_cannot_be_approved(station: Station, tmp_path: Path, clock: CaseClock) -> None:
    clock.advance(-3601)
    request_id = await asked(station)
    result = creto(tmp_path, "approve", request_id)
    assert (result.exit_code, "timed_out" in result.stderr) == (1, True)


async def test_a_decision_about_another_version_is_refused(station: Station, tmp_path: Path) -> None:
    request_id = await asked(station)
    result = creto(tmp_path, "approve", request_id, "--version", "2")
    assert (result.exit_code, "version 1" in result.stderr) == (1, True)


async def test_cancelling_takes_a_grant_back(station: Station, tmp_path: Path) -> None:
    request_id = await asked(station)
    creto(tmp_path, "approve", request_id)
    assert creto(tmp_path, "cancel", request_id, "--reason", "changed my mind").exit_code == 0
    assert (await submit(station.gate, refund())).status == 428


async def test_an_unknown_outcome_is_acknowledged_by_a_person(station: Station, tmp_path: Path) -> None:
    request_id = await asked(station)
    creto(tmp_path, "approve", request_id)
    request = refund()
    assert (await submit(station.gate, request)).allowed and station.gate.spend(request)
    station.desk.settle(request_id, Event.LOST)
    assert (await submit(station.gate, refund())).reason == "outcome_unknown"
    assert creto(tmp_path, "acknowledge", request_id, "--reason", "never arrived").exit_code == 0
    assert (await submit(station.gate, refund())).status == 428


async def test_the_history_is_verified_on_demand(station: Station, tmp_path: Path) -> None:
    await asked(station)
    assert json.loads(creto(tmp_path, "verify", as_json=True).stdout) == {"lines": 2, "verified": True}


HOSTILE = "\x1b[2J\x1b]0;owned\x07\r\x9b31m\u202e\u2066\u200b\x00\x7f\x08[bold]"
FORBIDDEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")


async def test_text_from_an_agent_cannot_act_on_the_terminal(station: Station, tmp_path: Path) -> None:
    body = json.dumps({"note": HOSTILE, HOSTILE: 1}).encode()
    fields = [("Content-Type", "application/json"), ("Prefer", "wait=0"), ("X-Note", HOSTILE), (HOSTILE, "x")]
    request = make_request("POST", path=f"/{HOSTILE}", query=f"q={HOSTILE}", headers=fields, body=body)
    decision = await submit(station.gate, request)
    request_id = str(decision.facts["approval_id"])
    for command in (["list"], ["show", request_id], ["approve", request_id]):
        output = creto(tmp_path, *command).output
        assert "ovr_" in output
        assert FORBIDDEN.search(output) is None


async def test_the_line_on_standard_error_says_how_to_approve(station: Station) -> None:
    stream = io.StringIO()
    request = station.desk.look(await asked(station))
    StreamNotifier(stream).notify(request, Event.SUBMITTED)
    line = stream.getvalue()
    assert line.startswith(f"creto: approval needed: {request.id} ")
    assert line.endswith(f": creto approvals approve {request.id}\n")
    assert "POST https://api.stripe.com/v1/refunds" in line


@given(st.text())
def test_printable_text_is_printable_and_says_what_it_was(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert shown.encode("utf-8", "backslashreplace").decode() == shown
    if "\\" not in text and text.isprintable():
        assert shown == text


def test_escapes_cannot_be_faked() -> None:
    assert printable("\\x1b") == "\\\\x1b"
    assert printable("\x1b") == "\\x1b"
    assert printable("abcdef", 3) == "abc... (3 more characters)"


def test_every_command_is_documented() -> None:
    assert isinstance(approvals, click.Group)
    for command in approvals.commands.values():
        assert command.help
