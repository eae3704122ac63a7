"""MCP in policy: tools as actions and resources, whatever a request declares, one message or many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from creto_proxy.authorize import Policy
from creto_proxy.errors import ConfigError, Refused
from creto_proxy.model import Approval, Verdict
from creto_proxy.protocols.detect import Places
from creto_proxy.protocols.mcp import METHODS
from creto_proxy.settings import Extract
from creto_proxy.testing import FakeHeaders, make_config, make_request

from .protocol_lab import APPROVED, HTTP, PERMIT, Lab, post, rpc, tool_call

NO_DELETE = '@id("no-delete") forbid (principal, action == Creto::Action::"mcpCall", resource in Creto::Tool::"delete_repo");'
NO_DELETES = (
    '@id("no-deletes") forbid (principal, action == Creto::Action::"mcpCall", resource == Creto::Host::"mcp.test") '
    'when { context has tool && context.tool like "delete_*" };'
)
ONLY_SEARCH = '@id("search") permit (principal, action == Creto::Action::"mcpCall", resource in Creto::Tool::"search");'
MODERN = {"MCP-Protocol-Version": "2026-07-28", "Accept": "application/json, text/event-stream"}


@pytest.mark.parametrize("forbid", [NO_DELETE, NO_DELETES])
def test_a_forbidden_tool_is_refused_and_others_pass(tmp_path: Path, forbid: str) -> None:
    lab = Lab(tmp_path, PERMIT, forbid)
    request = post(tool_call("search"))
    assert lab.judge(request).allowed and request.resource == "tool:search"
    refused = post(tool_call("delete_repo"))
    decision = lab.judge(refused)
    assert (decision.verdict, decision.reason) == (Verdict.DENY, "policy_forbid")
    assert refused.resource == "tool:delete_repo"
    assert lab.judge(post(rpc("tools/list"))).allowed


@pytest.mark.parametrize(
    "body",
    [
        b'{"jsonrpc":"2.0","id":1,"method":"tools\\/call","params":{"name":"delete\\u005frepo"}}',
        b'\n{"params":{"_meta":{},"name":"delete_repo"},"id":"x","method":"tools/call","jsonrpc":"2.0"}\r\n',
        b'{"jsonrpc":"2.0","method":"tools/call","params":{"name":"delete_repo"}}',
    ],
)
@pytest.mark.parametrize(
    "headers",
    [
        {}, {"Content-Type": "text/plain"}, {"Content-Type": ""}, {"A2A-Version": "1.0"}, {"Mcp-Session-Id": "s"},
        {"Content-Type": "multipart/form-data, application/json"}, {"Content-Type": "image/png; application/json"},
        {"Content-Type": "application/json; charset=UTF-8"},
    ],
)  # fmt: skip
def test_no_spelling_and_no_declaration_hides_a_tool(tmp_path: Path, body: bytes, headers: dict[str, str]) -> None:
    assert Lab(tmp_path, PERMIT, NO_DELETE).judge(post(body, headers=headers)).reason == "policy_forbid"


@pytest.mark.parametrize("path", ["/", "/mcp", "/messages/", "/v1/anything"])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_a_tool_is_found_wherever_it_is_sent(tmp_path: Path, path: str, method: str) -> None:
    request = post(tool_call("delete_repo"), path=path, method=method)
    assert Lab(tmp_path, PERMIT, NO_DELETE).judge(request).reason == "policy_forbid"


def test_a_method_override_does_not_hide_a_tool(tmp_path: Path) -> None:
    request = post(tool_call("delete_repo"), method="GET", headers={"X-HTTP-Method-Override": "POST"})
    assert Lab(tmp_path, PERMIT, NO_DELETE).judge(request).reason == "policy_forbid"


@pytest.mark.parametrize(
    "body",
    [
        b'{"jsonrpc":"2.0","id":1,"method":"tools/list","method":"tools/call","params":{"name":"delete_repo"}}',
        b'{"method":"tools/list","method":"tools/call","params":{"name":"delete_repo"}}',
        b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"search","name":"delete_repo"}}',
        b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"search"},"Params":{"name":"delete_repo"}}',
        b'{"\\u004asonrpc":"2.0","id":1,"Method":"tools\\/call","params":{"name":"delete_repo"}}',
        b'[{"jsonrpc":"2.0","id":1,"method":"tools/list"},[{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"delete_repo"}}]]',
        b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"search","arguments":{"x":1,"x":2}}}',
        b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":["delete_repo"]}',
        b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":["delete_repo"]}}',
        b'{"jsonrpc":"2.0","id":1,"method":"tools/call"}',
        b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"\\ud800"}}',
        b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"delete_repo "}}',
        b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"delete_repo\\u0000"}}',
        b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"\\u00a0delete_repo"}}',
        b'{"jsonrpc":"1.0","id":1,"method":"tools/call","params":{"name":"search"}}',
        b'{"jsonrpc":"2.0","id":{},"method":"tools/call","params":{"name":"search"}}',
        b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"search"},"result":{}}',
        b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"search","x":NaN}}',
        b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"search"}} {}',
        b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"search","x":' + b"[" * 200 + b"]" * 200 + b"}}",
        b"\xef\xbb\xbf" + json.dumps(tool_call("search")).encode(),
        json.dumps(tool_call("search")).encode("utf-16"),
        b"[]",
        b'[1]',
    ],
)  # fmt: skip
@pytest.mark.parametrize("headers", [{}, {"Mcp-Session-Id": "s"}])
def test_what_servers_may_read_differently_is_400(tmp_path: Path, body: bytes, headers: dict[str, str]) -> None:
    lab = Lab(tmp_path, PERMIT, NO_DELETE)
    decision = lab.judge(post(body, headers=headers))
    if not headers and body in (b"[]", b"[1]"):
        assert decision.allowed, "plain JSON of some other API"
    else:
        assert (decision.status, decision.allowed) == (400, False), decision


def test_plain_json_of_other_apis_passes_where_tools_are_forbidden(tmp_path: Path) -> None:
    lab = Lab(tmp_path, PERMIT, NO_DELETE)
    for body in ({"method": "card", "amount": 5}, {"ID": 1, "Result": []}, [1, 2], "text", rpc("eth_call", ["0x0"])):
        assert lab.judge(post(body)).allowed
    assert lab.judge(post(b'{"a":1,"a":2}')).allowed
    assert lab.judge(post(b"name=delete_repo", headers={"Content-Type": "application/x-www-form-urlencoded"})).allowed
    assert lab.judge(post(b"just words", headers={"Content-Type": "text/plain"})).allowed


def test_two_content_types_do_not_hide_a_tool(tmp_path: Path) -> None:
    request = post(tool_call("delete_repo"))
    request.headers = FakeHeaders([("Content-Type", "image/png"), ("Content-Type", "text/x")])
    assert Lab(tmp_path, PERMIT, NO_DELETE).judge(request).reason == "policy_forbid"


@pytest.mark.parametrize("charset", ["utf-7", '"UTF-7"', "cp037", ""])
def test_another_charset_cannot_be_judged(tmp_path: Path, charset: str) -> None:
    """In UTF-7 this is delete_repo."""
    fields = {"Content-Type": f"application/json; charset={charset}"}
    request = post(tool_call("+AGQ-elete_repo"), headers=fields)
    assert Lab(tmp_path, PERMIT, NO_DELETE).judge(request).reason == "unreadable_body"


def test_a_compressed_body_cannot_be_judged(tmp_path: Path) -> None:
    lab = Lab(tmp_path, PERMIT, NO_DELETE)
    assert lab.judge(post(b"\x1f\x8b..", headers={"Content-Encoding": "gzip"})).reason == "unreadable_body"
    assert Lab(tmp_path, PERMIT).judge(post(b"\x1f\x8b..", headers={"Content-Encoding": "gzip", **MODERN})).allowed


# -- permits


def test_an_http_permit_is_enough_until_a_permit_speaks_of_tools(tmp_path: Path) -> None:
    assert Lab(tmp_path, HTTP, NO_DELETE).judge(post(tool_call("search"))).allowed
    lab = Lab(tmp_path, HTTP, ONLY_SEARCH)
    assert lab.judge(post(tool_call("search"))).allowed
    assert lab.judge(post(tool_call("other"))).reason == "policy_no_permit"
    assert lab.judge(post(rpc("tools/list"))).allowed, "no permit speaks of mcpRead"
    assert lab.judge(post({"plain": "json"})).allowed


def test_a_permit_for_another_host_does_not_close_this_one(tmp_path: Path) -> None:
    elsewhere = ONLY_SEARCH.replace("};", "}").replace(
        'resource in Creto::Tool::"search"', 'resource == Creto::Host::"tools.test"'
    )
    lab = Lab(tmp_path, HTTP, elsewhere)
    assert lab.judge(post(tool_call("other"))).allowed
    assert lab.judge(post(tool_call("other"), host="tools.test")).allowed


def test_a_tool_permit_alone_opens_nothing(tmp_path: Path) -> None:
    assert Lab(tmp_path, ONLY_SEARCH).judge(post(tool_call("search"))).reason == "policy_no_permit"


def test_what_is_forbidden_to_http_stays_forbidden_to_tools(tmp_path: Path) -> None:
    closed = '@id("closed") forbid (principal, action == Creto::Action::"httpWrite", resource == Creto::Host::"mcp.test");'
    lab = Lab(tmp_path, PERMIT, ONLY_SEARCH, closed)
    assert lab.judge(post(tool_call("search"))).policies == ("closed",)
    assert lab.judge(post(tool_call("search"), host="other.test")).allowed


@pytest.mark.parametrize("action", ["httpWrite", "mcpCall"])
def test_attributes_are_known_under_either_action(tmp_path: Path, action: str) -> None:
    rule = f'@id("f") forbid (principal, action == Creto::Action::"{action}", resource) when {{ context has tool && context.tool == "x" }};'
    lab = Lab(tmp_path, PERMIT, rule)
    assert lab.judge(post(tool_call("x"))).reason == "policy_forbid"
    assert lab.judge(post(tool_call("y"))).allowed


def test_answers_are_remembered_by_tool(tmp_path: Path) -> None:
    lab = Lab(tmp_path, PERMIT, NO_DELETE)
    for _ in range(2):
        assert lab.judge(post(tool_call("search"))).allowed
        assert not lab.judge(post(tool_call("delete_repo"))).allowed
    evaluations = lab.authz.evaluations
    lab.judge(post(tool_call("delete_repo")))
    lab.judge(post(tool_call("search")))
    assert lab.authz.evaluations == evaluations


def test_nothing_is_kept_where_no_policy_asks(tmp_path: Path) -> None:
    lab = Lab(tmp_path, PERMIT)
    assert lab.policy.body_limit(post(tool_call("x"))) == 0
    only_here = NO_DELETES.replace("no-deletes", "here")
    lab = Lab(tmp_path, PERMIT, only_here)
    assert lab.policy.body_limit(post(tool_call("x"))) > 0
    assert lab.policy.body_limit(post(tool_call("x"), host="other.test")) == 0
    for kind in ("multipart/form-data; boundary=x", "application/octet-stream", "image/png"):
        assert lab.policy.body_limit(post(b"", headers={"Content-Type": kind})) == 0


# -- methods


@pytest.mark.parametrize(
    ("message", "action", "resource"),
    [
        (rpc("tools/list"), "mcpRead", "mcp:tools/list"),
        (rpc("resources/read", {"uri": "file:///a?token=x"}), "mcpRead", "resource:file:///a"),
        (rpc("prompts/get", {"name": "p"}), "mcpRead", "prompt:p"),
        (rpc("initialize", {}), "mcpRead", "mcp:initialize"),
        (rpc("notifications/initialized", id=None), "mcpRead", "mcp:notifications/initialized"),
        (rpc("tasks/cancel", {"taskId": "t"}), "mcpWrite", "mcp:tasks/cancel a2a:tasks/cancel"),
        (rpc("logging/setLevel", {"level": "debug"}), "mcpWrite", "mcp:logging/setLevel"),
        ({"jsonrpc": "2.0", "id": 4, "result": {"action": "accept"}}, "mcpWrite", "mcp:answer"),
        (tool_call("a\x1b[31m\nb"), "mcpCall", "tool:a\ufffd[31m\ufffdb"),
        (tool_call("n" * 200), "mcpCall", "tool:" + "n" * 128 + "…"),
    ],
)
def test_methods_have_actions_and_resources(tmp_path: Path, message: Any, action: str, resource: str) -> None:
    lab = Lab(tmp_path, PERMIT, f'@id("f") forbid (principal, action == Creto::Action::"{action}", resource);')
    request = post(message)
    assert lab.judge(request).policies == ("f",)
    assert request.resource == resource
    others = {"mcpRead", "mcpWrite", "mcpCall"} - {action}
    rules = [f'@id("{name}") forbid (principal, action == Creto::Action::"{name}", resource);' for name in others]
    if message.get("method") != "tasks/cancel":
        assert Lab(tmp_path, PERMIT, *rules).judge(post(message)).allowed


def test_an_unknown_method_of_mcp_writes(tmp_path: Path) -> None:
    lab = Lab(tmp_path, PERMIT, '@id("f") forbid (principal, action == Creto::Action::"mcpWrite", resource);')
    assert "tools/future" not in METHODS
    assert lab.judge(post(rpc("tools/future"), headers={"Mcp-Session-Id": "s"})).policies == ("f",)
    assert lab.judge(post(rpc("tools/future"))).allowed, "nothing says that this is MCP"
    placed = Lab(tmp_path, PERMIT, '@id("f") forbid (principal, action in Creto::Action::"mcp", resource);', mcp=["mcp.test/mcp"])
    assert placed.judge(post(rpc("tools/future"))).policies == ("f",)
    assert placed.judge(post(rpc("tools/future"), path="/mcp2")).allowed


def test_sessions_are_read_and_ended(tmp_path: Path) -> None:
    lab = Lab(tmp_path, PERMIT, '@id("f") forbid (principal, action == Creto::Action::"mcpWrite", resource);')
    session = {"Mcp-Session-Id": "s", "Accept": "text/event-stream"}
    assert lab.judge(make_request("GET", host="mcp.test", path="/mcp", headers=session)).allowed
    assert lab.judge(make_request("DELETE", host="mcp.test", path="/mcp", headers=session)).policies == ("f",)


# -- batches


def test_a_batch_is_judged_message_by_message(tmp_path: Path) -> None:
    lab = Lab(tmp_path, PERMIT, NO_DELETE)
    request = post([tool_call("a"), rpc("notifications/initialized", id=None), tool_call("b", id=2)])
    assert lab.judge(request).allowed and request.resource == "tool:a mcp:notifications/initialized tool:b"
    status, answers = lab.refusal(post([tool_call("a", id="x"), rpc("notifications/progress", id=None), tool_call("delete_repo", id=7)]))
    assert status == 403
    assert [(answer["id"], answer["error"]["code"]) for answer in answers] == [("x", -32010), (7, -32010)]


def test_revisions_without_batches_have_none(tmp_path: Path) -> None:
    lab = Lab(tmp_path, PERMIT)
    batch = [rpc("tools/list"), tool_call("x", id=2)]
    assert lab.judge(post(batch, headers={"MCP-Protocol-Version": "2025-03-26"})).allowed
    for fields in ({"MCP-Protocol-Version": "2025-06-18"}, MODERN, {"Mcp-Method": "tools/list"}):
        assert lab.judge(post(batch, headers=fields)).reason == "rpc_batch"


def test_a_batch_does_not_hide_a_field_that_policy_decides_on(tmp_path: Path) -> None:
    cap = '@id("cap") forbid (principal, action == Creto::Action::"mcpCall", resource) when { context has amount_minor && context.amount_minor > 500 };'
    rule = Extract(host="mcp.test", field="/params/arguments/amount", attribute="amount_minor")
    policy = Policy(Lab(tmp_path, PERMIT, cap).authz, [rule])
    assert policy.authorize(post(tool_call("pay", amount=500))).allowed
    assert policy.authorize(post(tool_call("pay", amount=501))).policies == ("cap",)
    with pytest.raises(Refused) as refused:
        policy.authorize(post([tool_call("pay", amount=501)]))
    assert refused.value.decision.reason == "rpc_batch"


# -- header fields


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        (tool_call("search"), {"Mcp-Method": "tools/list", "Mcp-Name": "search"}),
        (tool_call("search"), {"Mcp-Method": "tools/call", "Mcp-Name": "other"}),
        (tool_call("search"), {"Mcp-Method": "tools/call"}),
        (tool_call("search"), {"Mcp-Name": "search"}),
        (tool_call("search"), {"Mcp-Method": "Tools/Call", "Mcp-Name": "search"}),
        (tool_call("é"), {"Mcp-Method": "tools/call", "Mcp-Name": "=?base64?w6l=?="}),
        (tool_call("é"), {"Mcp-Method": "tools/call", "Mcp-Name": "=?base64?%%?="}),
        (rpc("resources/read", {"uri": "a:b"}), {"Mcp-Method": "resources/read", "Mcp-Name": "a:c"}),
        (rpc("tasks/get", {"taskId": "1"}), {"Mcp-Method": "tasks/get", "Mcp-Name": "2"}),
        (rpc("ping", {"_meta": {"io.modelcontextprotocol/protocolVersion": "2025-11-25"}}), {"Mcp-Method": "ping"}),
        ({"jsonrpc": "2.0", "id": 1, "result": {}}, {"Mcp-Method": "tools/call"}),
    ],
)
def test_header_fields_must_say_what_the_body_says(tmp_path: Path, message: Any, fields: dict[str, str]) -> None:
    status, document = Lab(tmp_path, PERMIT).refusal(post(message, headers={**MODERN, **fields}))
    assert status == 400 and document["error"]["code"] == -32020
    assert document["id"] == (1 if "method" in message else None)


def test_a_header_field_given_twice_is_refused(tmp_path: Path) -> None:
    request = post(tool_call("a"))
    request.headers = FakeHeaders([*MODERN.items(), ("Mcp-Method", "tools/call"), ("Mcp-Name", "a"), ("Mcp-Name", "b")])
    assert Lab(tmp_path, PERMIT).judge(request).reason == "rpc_header_mismatch"


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        (tool_call("search"), {**MODERN, "Mcp-Method": "tools/call", "Mcp-Name": "search"}),
        (tool_call("é"), {**MODERN, "Mcp-Method": "tools/call", "Mcp-Name": "=?base64?w6k=?="}),
        (rpc("tools/list"), {**MODERN, "Mcp-Method": "tools/list"}),
        (rpc("notifications/cancelled", id=None), MODERN),
        (tool_call("search"), {"MCP-Protocol-Version": "2025-11-25"}),
        (tool_call("search"), {"Accept": MODERN["Accept"]}),
    ],
)
def test_header_fields_that_agree_pass(tmp_path: Path, message: Any, fields: dict[str, str]) -> None:
    assert Lab(tmp_path, PERMIT).judge(post(message, headers=fields)).allowed


# -- approvals


def test_a_person_can_be_asked_about_one_tool(tmp_path: Path) -> None:
    ask = f'@id("ask") @require_oversight("ops") forbid (principal, action == Creto::Action::"mcpCall", resource in Creto::Tool::"deploy") unless {{ {APPROVED} }};'
    lab = Lab(tmp_path, PERMIT, ask)
    request = post(tool_call("deploy"))
    decision = lab.judge(request)
    assert (decision.verdict, decision.profiles) == (Verdict.ESCALATE, ("ops",))
    request.fingerprint = "sha256:x"
    request.approval = Approval("ovr_1", True, 1, frozenset(), "sha256:x", profiles=("ops",))
    assert lab.judge(request).allowed
    assert lab.judge(post([tool_call("a"), tool_call("deploy", id=2)])).verdict is Verdict.ESCALATE


def test_a_message_among_others_that_is_forbidden_is_never_put_to_a_person(tmp_path: Path) -> None:
    ask = f'@id("ask") @require_oversight("ops") forbid (principal, action == Creto::Action::"mcpCall", resource in Creto::Tool::"deploy") unless {{ {APPROVED} }};'
    decision = Lab(tmp_path, PERMIT, NO_DELETE, ask).judge(post([tool_call("deploy"), tool_call("delete_repo", id=2)]))
    assert decision.verdict is Verdict.DENY


# -- any bytes

PIECES = st.sampled_from(
    [b"{", b"}", b"[", b"]", b",", b":", b'"', b'"jsonrpc":"2.0"', b'"id":1', b'"method":"tools/call"', b'"method":"SendMessage"',
     b'"params":', b'"name":"delete_repo"', b'"name":"x"', b'"result":{}', b'"Method":"tools/call"', b"\xff", b"1", b"null", b" "]
)  # fmt: skip
CALLS = st.sampled_from([json.dumps(tool_call(name)).encode() for name in ("delete_repo", "search")])
FIELDS = st.dictionaries(
    st.sampled_from(["Mcp-Method", "Mcp-Name", "MCP-Protocol-Version", "A2A-Version", "Content-Encoding", "Accept"]),
    st.sampled_from(["", "tools/call", "2026-07-28", "application/json", "=?base64?eA==?=", "gzip", "x"]),
    max_size=3,
)


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("strict"), PERMIT, NO_DELETE)


@settings(max_examples=300, deadline=None)
@given(body=st.lists(PIECES | CALLS, max_size=16).map(b"".join) | st.binary(max_size=30), headers=FIELDS)
def test_any_bytes_are_judged_or_refused(strict: Lab, body: bytes, headers: dict[str, str]) -> None:
    decision = strict.judge(post(body, headers=headers))
    assert decision.allowed or decision.status in (400, 403)
    if decision.allowed:
        assert ("tools/call", "delete_repo") not in calls_in(body)


def calls_in(body: bytes) -> list[tuple[Any, Any]]:
    """(method, name) of every call that a lenient parser finds, whatever it says of its version."""
    try:
        document = json.loads(body)
    except ValueError:
        return []
    messages = [each for each in (document if isinstance(document, list) else [document]) if isinstance(each, dict)]
    params = [message.get("params") for message in messages]
    names = [each.get("name") if isinstance(each, dict) else None for each in params]
    return [(message.get("method"), name) for message, name in zip(messages, names, strict=True)]


# -- configuration


def test_places_are_hosts_with_or_without_a_path() -> None:
    found = make_config({"protocols": {"mcp": ["Tools.test/mcp", "*.mcp.test"], "llm": {"*.llm.test": "openai"}}}).protocols
    assert found.mcp == ("tools.test/mcp", "*.mcp.test") and found.llm == {"*.llm.test": "openai"}
    places = Places(found.mcp)
    assert places.have("tools.test", "/mcp") and places.have("tools.test", "/mcp/x") and places.have("tools.test", "//mcp")
    assert places.have("a.mcp.test", "/anything")
    assert not places.have("tools.test", "/mcpx") and not places.have("mcp.test", "/")
    with pytest.raises(ConfigError, match="protocols.mcp"):
        make_config({"protocols": {"mcp": ["https://tools.test"]}})
