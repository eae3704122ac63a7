"""Ways around the sidecar that a hostile agent, or a hostile upstream, would try first."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from creto_hotpath.http1 import parse_request
from creto_platform.authz import Answer, EmbeddedAuthz, Query, Watch
from creto_proxy.audit import decode, encode
from creto_proxy.authorize import Policy
from creto_proxy.cli import Operator
from creto_proxy.errors import ConfigError, CretoError, Permanent, Refused
from creto_proxy.model import Agent, Approval, Decision, Flow, Request, Usage, Verdict
from creto_proxy.paths import AmbiguousPath, canonical, readings
from creto_proxy.settings import Extract
from creto_proxy.target import ReverseRoute, Targets
from creto_proxy.testing import make_agent, make_config, make_flow, make_outcome, make_request
from creto_proxy.workers.listeners import open_listeners

from .test_pipeline import ALLOW, Counting, Lab, Open, Person, approve, broken, lab, post

# -- paths: what is judged is what an upstream may take it for

REFUSED_PATHS = [
    "/v1/./refunds",
    "/v1/../refunds",
    "/public/..",
    "/v1/%2e/refunds",
    "/v1/%2E%2e/refunds",
    "/a/.%2e/b",
    "/a/..;/b",
    "/a/..;x=1/b",
    "/a%2f..%2fb",
    "/a/%252e%252e/b",
    "/a%5c..%5cb",
    "/v1\\refunds",
    "/v1/refunds%00.png",
    "/v1/a%0d%0aHost:x",
    "/v1/%7f",
    "/v1/100%",
    "/v1/%zz",
    "/v1/%u002f",
    "/v1/%c0%afrefunds",
    "/v1/%c0%ae%c0%ae/x",
    "/v1/%e0%80%afrefunds",
]


@pytest.mark.parametrize("path", REFUSED_PATHS)
def test_paths_that_servers_read_differently_are_refused_without_being_quoted(path: str) -> None:
    with pytest.raises(AmbiguousPath) as refused:
        canonical(path)
    assert path not in str(refused.value)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", "/"),
        ("*", "*"),
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/.well-known/openid-configuration", "/.well-known/openid-configuration"),
        ("/a/...", "/a/..."),
        ("/%761/refunds", "/v1/refunds"),
        ("/v1/%72efunds", "/v1/refunds"),
        ("/@scope%2fname", "/@scope%2Fname"),
        ("/api/v4/projects/group%2Fproject", "/api/v4/projects/group%2Fproject"),
        ("/web/2020/http://example.com", "/web/2020/http://example.com"),
        ("/caf%c3%a9/x%20y", "/caf%C3%A9/x%20y"),
        ("/caf%e9", "/caf%E9"),
        ("/v1beta/models/gemini:generateContent", "/v1beta/models/gemini:generateContent"),
        ("/S3/Key(1)+'x'!~", "/S3/Key(1)+'x'!~"),
    ],
)
def test_ordinary_paths_pass_and_unreserved_characters_have_one_spelling(path: str, expected: str) -> None:
    assert canonical(path) == expected


@pytest.mark.parametrize(
    "path",
    [
        "/v1/refunds",
        "/%761/refunds",
        "/v1//refunds",
        "//v1/refunds",
        "/v1%2Frefunds",
        "/v1%252Frefunds",
        "/v1%5Crefunds",
        "/v1;x=1/refunds",
        "/v1/refunds;jsessionid=1",
        "/V1/Refunds",
        "/v1/refunds/",
        "/V1;a//%52efunds",
    ],
)
def test_every_spelling_of_a_path_has_the_plain_one_among_its_readings(path: str) -> None:
    assert "/v1/refunds" in readings(canonical(path))


def test_a_plain_path_has_one_reading() -> None:
    assert readings("/v1/chat/completions") == ("/v1/chat/completions",)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from(["/", ".", "%2e", "%2F", "%5c", "%25", "2e", ";", "a", "B", "%41", "//", "%00"]), max_size=12
    )
)
def test_a_canonical_path_stays_canonical_and_none_of_its_readings_goes_up(parts: list[str]) -> None:
    try:
        path = canonical("/" + "".join(parts))
    except AmbiguousPath:
        return
    assert canonical(path) == path and readings(path)[0] == path and len(readings(path)) <= 8
    for reading in readings(path):
        assert not {".", ".."} & set(reading.split("/"))


def read(raw: str, flow: Flow | None = None) -> Request:
    parsed = parse_request(raw.replace("\n", "\r\n").encode())
    assert parsed is not None
    routes = [ReverseRoute.parse("api", "https://up.test/base")]
    return Targets(routes).request(parsed[0], flow or make_flow(), make_agent(), 0)


def test_what_is_judged_is_canonical_and_what_is_sent_is_what_the_agent_signed() -> None:
    request = read("GET http://a.test/%7euser/x%2fy?q=%2e HTTP/1.1\nHost: a.test\n\n")
    assert (request.path, request.sent_path, request.query) == ("/~user/x%2Fy", "/%7euser/x%2fy", "q=%2e")


@pytest.mark.parametrize("target", ["/api/../x", "/api/%2e%2e/x", "/api/..%2fx"])
def test_a_reverse_route_cannot_be_left_upwards(target: str) -> None:
    with pytest.raises(Permanent) as refused:
        read(f"GET {target} HTTP/1.1\nHost: x\n\n", make_flow(way="reverse"))
    assert (refused.value.status, refused.value.reason) == (400, "ambiguous_path")


PAYMENTS = """
@id("reads") permit (principal, action == Creto::Action::"httpRead", resource == Creto::Host::"pay.test");
@id("writes") permit (principal, action == Creto::Action::"httpWrite", resource == Creto::Host::"pay.test")
when { context.path like "/v1*" };
@id("no-refunds") forbid (principal, action == Creto::Action::"httpWrite", resource)
when { context.path like "/v1/refunds*" };
@id("no-deletes") forbid (principal, action, resource) when { context.method == "DELETE" };
@id("packages") permit (principal, action, resource == Creto::Host::"npm.test") when { context.path like "/@scope%2F*" };
"""


@pytest.fixture(scope="module")
def payments(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    directory = tmp_path_factory.mktemp("policies")
    (directory / "p.cedar").write_text(PAYMENTS)
    return Policy(EmbeddedAuthz(directory))


def ask(policy: Policy, method: str, target: str, host: str = "pay.test", *fields: str) -> Decision:
    lines = "".join(f"{field}\n" for field in fields)
    return policy.authorize(read(f"{method} http://{host}{target} HTTP/1.1\nHost: {host}\n{lines}\n"))


@pytest.mark.parametrize(
    "target", ["/v1/refunds", "/v1//refunds", "/v1%2frefunds", "/%761/refunds/1", "/v1/REFUNDS", "/v1;a=b/refunds"]
)
def test_a_forbidden_path_is_forbidden_however_it_is_spelled(payments: Policy, target: str) -> None:
    decision = ask(payments, "POST", target)
    assert (decision.verdict, decision.policies) == (Verdict.DENY, ("no-refunds",))


@pytest.mark.parametrize("target", ["/v1/charges", "/v1/Charges//x;y", "/v1/a%2Fb/"])
def test_other_spellings_need_no_permit_of_their_own(payments: Policy, target: str) -> None:
    assert ask(payments, "POST", target).allowed


def test_a_permit_is_for_the_path_as_it_stands_and_not_for_another_reading_of_it(payments: Policy) -> None:
    assert ask(payments, "GET", "/@scope%2fname", "npm.test").allowed
    assert not ask(payments, "GET", "/@scope/name", "npm.test").allowed
    assert not ask(payments, "POST", "//v1/charges").allowed


@pytest.mark.parametrize("field", ["X-HTTP-Method-Override", "x-http-method", "X-Method-Override"])
def test_a_method_that_the_server_is_asked_to_take_instead_is_judged_as_well(payments: Policy, field: str) -> None:
    assert ask(payments, "POST", "/v1/charges", "pay.test", f"{field}: PATCH").allowed
    assert ask(payments, "POST", "/v1/charges", "pay.test", f"{field}: delete").policies == ("no-deletes",)
    assert ask(payments, "GET", "/v1/refunds").allowed
    assert ask(payments, "GET", "/v1/refunds", "pay.test", f"{field}: POST").policies == ("no-refunds",)


@pytest.mark.parametrize("field", ["X-Original-URL", "X-Rewrite-URL"])
def test_a_field_that_replaces_the_path_is_refused(payments: Policy, field: str) -> None:
    with pytest.raises(Refused) as refused:
        ask(payments, "POST", "/v1/charges", "pay.test", f"{field}: /v1/refunds")
    assert (refused.value.reason, refused.value.status) == ("path_override", 400)


def test_an_upgrade_is_a_write_because_anything_can_follow_it() -> None:
    plain = "GET http://a.test/ HTTP/1.1\nHost: a.test\n"
    assert read(plain + "\n").action == "httpRead"
    assert read(plain + "Connection: upgrade\nUpgrade: websocket\n\n").action == "httpWrite"


# -- bodies: what policy finds is what the server finds


class Reads:
    """An authz that reads an amount and remembers the contexts it was given."""

    epoch = 1

    def __init__(self) -> None:
        self.contexts: list[Mapping[str, Any]] = []

    def reads(self, action: str) -> frozenset[str]:
        return frozenset({"amount"})

    def lasting(self, query: Query) -> frozenset[str] | None:
        return None

    def watch(self, host: str) -> Watch:
        return Watch()

    def decide(self, query: Query) -> Answer:
        self.contexts.append(query.context)
        return Answer("allow", "policy_permit", "")


def amount(body: bytes, path: str = "/v1/refunds", **headers: str) -> Mapping[str, Any]:
    rule = Extract(host="pay.test", path="/v1/refunds", field="/order/amount", attribute="amount")
    authz = Reads()
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    Policy(authz, [rule]).authorize(make_request("POST", host="pay.test", path=path, headers=fields, body=body))
    return authz.contexts[0]


def test_a_field_is_found_under_every_spelling_of_its_path() -> None:
    for path in ("/v1/refunds", "/v1//refunds", "/v1/refunds/", "/v1%2Frefunds"):
        assert amount(b'{"order": {"amount": 7}}', path) == {"amount": 7}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"order": {"amount": 100000, "amount": 1}}', "ambiguous_body"),
        (b'{"order": {"amount": 1, "Amount": 100000}}', "ambiguous_body"),
        (b'{"order": {"Amount": 100000}}', "ambiguous_body"),
        (b'{"order": {"amount": 1}, "order": {"amount": 100000}}', "ambiguous_body"),
        (b'{"order": {"amount": 1}, "\\u006frder": {}}', "ambiguous_body"),
        (b'{"order": {"amount": 1}', "unreadable_body"),
        (b'{"order": {"amount": 01}}', "unreadable_body"),
        (b"\xef\xbb\xbf{}", "unreadable_body"),
        ('{"order": {"amount": 1}}'.encode("utf-16"), "unreadable_body"),
    ],
)
def test_bodies_that_parsers_read_differently_are_refused_where_policy_decides_on_them(
    body: bytes, reason: str
) -> None:
    with pytest.raises(Refused) as refused:
        amount(body, content_type="application/json")
    assert (refused.value.reason, refused.value.status) == (reason, 400)
    assert "100000" not in refused.value.detail


def test_a_compressed_body_is_refused_where_policy_decides_on_it() -> None:
    with pytest.raises(Refused) as refused:
        amount(b"\x1f\x8b", content_encoding="gzip")
    assert refused.value.reason == "unreadable_body"


def test_a_form_has_no_json_fields_and_duplicates_elsewhere_do_not_matter() -> None:
    assert amount(b"order[amount]=1", content_type="application/x-www-form-urlencoded") == {}
    assert amount(b'{"note": {"a": 1, "a": 2}, "order": {"amount": 5}}') == {"amount": 5}


# -- the connection and its end


async def test_a_path_is_sent_byte_for_byte_and_recorded_in_canonical_spelling(tmp_path: Path) -> None:
    async with lab(tmp_path) as here:
        assert (await here.get("good.test", "/%7eme/@scope%2fname//x;y?q=%7e")).endswith(b"ok")
        assert here.received[0].startswith(b"GET /%7eme/@scope%2fname//x;y?q=%7e HTTP/1.1\r\n")
        assert b"HTTP/1.1 400" in await here.get("good.test", "/a/../b")
    assert [o.target for o in here.journal()] == ["/~me/@scope%2Fname//x;y", ""]


async def test_connect_is_answered_when_the_egress_stage_fails(tmp_path: Path) -> None:
    async with lab(tmp_path, egress=broken(Open, "name_allowed")) as here:
        answer = await here.send(b"CONNECT good.test:443 HTTP/1.1\r\nHost: good.test:443\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 503") and b"plugin egress" in answer
    assert [o.action for o in here.journal()] == ["tunnel"]


async def test_an_agent_that_breaks_off_the_tls_handshake_leaves_one_record_and_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with lab(tmp_path) as here:
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        writer.write(b"CONNECT good.test:443 HTTP/1.1\r\nHost: good.test:443\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        # The certificate is creto's, which this client does not know.
        with pytest.raises((ssl.SSLError, OSError)):
            await writer.start_tls(ssl.create_default_context(), server_hostname="good.test")
        writer.close()
        async with asyncio.timeout(60):
            while not here.journal():
                await asyncio.sleep(0.01)
    [outcome] = here.journal()
    assert (outcome.decision, outcome.error, outcome.host) == ("deny", "bad_connection", "good.test")
    assert not [r for r in caplog.records if r.name == "asyncio" and r.levelname == "ERROR"], caplog.text


async def test_a_held_body_is_kept_even_where_none_may_be(tmp_path: Path) -> None:
    """With no room for bodies nothing with a body can be approved; it must not pass unseen."""
    async with lab(tmp_path, gate=(person := Person(approve)), held_body_bytes=0) as here:
        assert b"HTTP/1.1 413" in await here.send(post("held.test"))
        assert person.bodies == [] and here.received == []


async def test_nobody_is_asked_about_what_could_not_be_sent(tmp_path: Path) -> None:
    class Closed(Open):
        def name_allowed(self, agent: Agent, name: str, port: int | None) -> Decision:
            return Decision(Verdict.DENY, "host_not_allowed")

    person, meter = Person(approve), Counting()
    async with lab(tmp_path, egress=Closed(), gate=person, meter=meter) as here:
        assert b"host_not_allowed" in await here.send(post("held.test"))
    assert person.bodies == [] and meter.reserved == meter.released == 1


async def test_an_agent_revoked_while_its_call_was_held_is_refused(tmp_path: Path) -> None:
    agents = [make_agent("a")]

    def revoke(request: Request) -> Decision:
        agents[0] = make_agent("a", expires_at=0)
        return approve(request)

    async with lab(tmp_path, gate=(person := Person(revoke)), agent=lambda: agents[0]) as here:
        assert b"unknown_agent" in await here.send(post("held.test"))
        assert here.received == [] and person.spent == 0
    assert [o.decision for o in here.journal()] == ["deny"]


async def test_an_agent_renewed_while_its_call_was_held_goes_on_under_the_new_delegation(tmp_path: Path) -> None:
    agents = [make_agent("a", expires_at=4e9)]

    def renew(request: Request) -> Decision:
        agents[0] = make_agent("a", expires_at=5e9)
        return approve(request)

    seen: list[Agent] = []

    class Watching(Counting):
        def authorize(self, request: Request) -> Decision:
            seen.append(request.agent)
            return ALLOW

    async with lab(tmp_path, gate=Person(renew), agent=lambda: agents[0], meter=Watching()) as here:
        assert (await here.send(post("held.test"))).endswith(b"ok")
    assert [agent.expires_at for agent in seen] == [4e9, 5e9]


async def test_a_revoked_agents_requests_on_an_open_connection_are_refused_and_recorded(tmp_path: Path) -> None:
    agents = [make_agent("a")]
    async with lab(tmp_path, agent=lambda: agents[0]) as here:
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        request = b"GET http://good.test/ HTTP/1.1\r\nHost: good.test\r\n\r\n"
        writer.write(request)
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        agents[0] = make_agent("a", expires_at=0)
        writer.write(request)
        assert (await reader.read()).startswith(b"HTTP/1.1 407")
        writer.close()
        assert len(here.received) == 1
    assert [(o.decision, o.status) for o in here.journal()] == [("allow", 200), ("deny", 407)]


async def test_one_connection_too_many_is_reset_and_the_others_are_not_hurt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with lab(tmp_path, capacity=2) as here:
        idle = [await asyncio.open_connection("127.0.0.1", here.port) for _ in range(2)]
        for _ in range(2):
            with pytest.raises((OSError, AssertionError)):
                assert await here.get("good.test")
        assert caplog.text.count("more than 2 connections") == 1
        idle[0][1].write(b"GET http://good.test/ HTTP/1.1\r\nHost: good.test\r\n\r\n")
        assert (await idle[0][0].readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        for _, writer in idle:
            writer.close()
            await writer.wait_closed()
        async with asyncio.timeout(60):
            while not (answer := await _get_or_nothing(here)):
                await asyncio.sleep(0.01)
        assert answer.endswith(b"ok")


async def _get_or_nothing(here: Lab) -> bytes:
    with contextlib.suppress(OSError):
        return await here.get("good.test")
    return b""


async def test_what_is_cut_off_at_the_end_is_on_record(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"websocket" in head:
            writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nhello")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhello")
        with contextlib.suppress(OSError):
            await reader.read()
        writer.close()

    writers = []
    async with lab(tmp_path, serve=serve, grace_s=0.05) as here:
        for extra in (b"", b"Connection: upgrade\r\nUpgrade: websocket\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
            writer.write(b"GET http://good.test/ HTTP/1.1\r\nHost: good.test\r\n" + extra + b"\r\n")
            assert b"hello" in await reader.readuntil(b"hello")
            writers.append(writer)
        writers[1].write(b"ping")
        await writers[1].drain()
        await asyncio.sleep(0.05)
    for writer in writers:
        writer.close()
    plain, upgraded = sorted(here.journal(), key=lambda o: o.status, reverse=True)
    assert (plain.status, plain.error) == (200, "aborted")
    assert (upgraded.status, upgraded.action) == (101, "httpWrite")
    assert upgraded.bytes_up > len("ping") and upgraded.total_ns >= upgraded.upstream_ns


async def test_a_refusal_after_a_retry_is_recorded_as_failed_and_with_sane_times(tmp_path: Path) -> None:
    """The pooled connection is dead and a new one cannot be had: the record must not say that all went well."""
    calls = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await reader.readuntil(b"\r\n\r\n")
        here.upstream.close()  # nobody listens any more when creto dials again
        writer.close()

    async with lab(tmp_path, serve=serve) as here:
        assert (await here.get("good.test")).endswith(b"ok")
        assert b"HTTP/1.1 502" in await here.get("good.test")
    _, failed = here.journal()
    assert calls == 1 and (failed.status, failed.error) == (502, "upstream_unreachable")
    assert 0 <= failed.upstream_ns <= failed.total_ns


# -- records and what is printed of them


def test_a_hostile_models_name_cannot_keep_an_outcome_from_being_recorded() -> None:
    outcome = make_outcome(make_request(), usage=Usage("exact", "p", "gpt\ud800", {"input": 1}, 5))
    assert decode(encode(outcome)).usage.model == "gpt\\ud800"


def test_a_request_shows_no_secret_when_it_is_printed() -> None:
    flow = make_flow()
    flow.credentials = "proxy-secret"
    request = make_request(
        "POST", query="key=query-secret", headers={"Authorization": "header-secret"}, body=b"body-secret", flow=flow
    )
    request.approval = Approval("ovr_1", True, 1, frozenset(), "f")
    assert "secret" not in repr(request)


@pytest.mark.parametrize("as_json", [True, False])
def test_what_commands_print_cannot_steer_the_terminal(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "a\x1b[2J\x9b31m\x7f\u202eb\ud800"
    Operator(as_json=as_json).emit([{"name": hostile}], [{"name": hostile, "fine": "größe"}])
    printed = capsys.readouterr().out
    assert all(char.isprintable() or char == "\n" for char in printed)
    if as_json:
        assert json.loads(printed) == [{"name": hostile, "fine": "größe"}] and "größe" in printed


def test_errors_name_no_path_or_secret_of_a_malformed_request() -> None:
    with pytest.raises((CretoError, ValueError)) as refused:
        read("CONNECT user:hunter2@a.test:443 HTTP/1.1\nHost: a.test\n\n")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("way", ["explicit", "reverse"])
@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"])
def test_a_listener_that_others_could_reach_is_refused(way: str, address: str) -> None:
    with pytest.raises(ConfigError) as refused:
        open_listeners(make_config({"listen": {"explicit": "", way: address}}))
    assert f"listen.{way}" in refused.value.problems[0] and "loopback" in refused.value.problems[0]
