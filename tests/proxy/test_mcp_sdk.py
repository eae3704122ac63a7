"""The MCP SDK on both sides of creto: tools that may be called are, others are refused in words the client passes on."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from .protocol_lab import PERMIT, rpc, tool_call
from .sdk_lab import governed, served

mcp = pytest.importorskip("mcp")

NO_WIPE = (
    '@id("no-wipe") @description("disks are wiped by people") '
    'forbid (principal, action == Creto::Action::"mcpCall", resource in Creto::Tool::"wipe");'
)


@pytest.fixture(scope="module")
def calls() -> list[str]:
    return []


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, calls: list[str]) -> Iterator[str]:
    from mcp.server import MCPServer
    from mcp.server.transport_security import TransportSecuritySettings

    server = MCPServer("tools")

    @server.tool()
    def add(a: int, b: int) -> str:
        calls.append("add")
        return str(a + b)

    @server.tool()
    def wipe(disk: str) -> str:
        calls.append("wipe")
        return "gone"

    security = TransportSecuritySettings(allowed_hosts=["server.test", "server.test:*"])
    with served(server.streamable_http_app(transport_security=security)) as port:
        with governed(tmp_path_factory.mktemp("mcp"), PERMIT, NO_WIPE, upstream=port) as url:
            yield f"{url}/mcp"


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_the_client_calls_what_it_may_and_is_told_why_not(base: str, calls: list[str], mode: str) -> None:
    calls.clear()
    async with mcp.Client(base, mode=mode) as client:
        assert sorted(tool.name for tool in (await client.list_tools()).tools) == ["add", "wipe"]
        assert (await client.call_tool("add", {"a": 2, "b": 3})).content[0].text == "5"
        with pytest.raises(mcp.MCPError, match="disks are wiped by people") as refused:
            await client.call_tool("wipe", {"disk": "sda"})
        assert refused.value.error.code == -32010
        assert refused.value.error.data["policies"] == ["no-wipe"]
        assert (await client.call_tool("add", {"a": 1, "b": 1})).content[0].text == "2"
    assert calls == ["add", "add"]


def test_a_batch_is_refused_whole_with_an_error_for_each_call(base: str, calls: list[str]) -> None:
    calls.clear()
    batch = [tool_call("add", id="a", a=1, b=2), rpc("ping", id=8), tool_call("wipe", id=9, disk="sda")]
    answer = httpx.post(base, json=batch, headers={"Accept": "application/json, text/event-stream"})
    assert answer.status_code == 403
    assert [(each["id"], each["error"]["code"]) for each in answer.json()] == [("a", -32010), (8, -32010), (9, -32010)]
    assert calls == []


def test_header_fields_that_lie_are_refused_before_the_server_sees_them(base: str, calls: list[str]) -> None:
    calls.clear()
    fields = {"MCP-Protocol-Version": "2026-07-28", "Mcp-Method": "tools/call", "Mcp-Name": "add"}
    answer = httpx.post(base, json=tool_call("wipe", disk="sda"), headers=fields)
    assert (answer.status_code, answer.json()["error"]["code"], answer.json()["id"]) == (400, -32020, 1)
    assert calls == []
