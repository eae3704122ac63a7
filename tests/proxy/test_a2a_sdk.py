"""The A2A SDK on both sides of creto, over JSON-RPC: work is given, refused in words that the client passes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from .protocol_lab import PERMIT
from .sdk_lab import governed, served

pytest.importorskip("a2a.server.routes")
pytest.importorskip("starlette")

NO_STREAMS = (
    '@id("no-streams") @description("answers come in one piece here") '
    'forbid (principal, action == Creto::Action::"a2aSend", resource) '
    'when { context has rpc_method && context.rpc_method == "SendStreamingMessage" };'
)
NO_CANCEL = (
    '@id("no-cancel") @description("work is finished once begun") '
    'forbid (principal, action == Creto::Action::"a2aWrite", resource);'
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from a2a.helpers.proto_helpers import get_message_text, new_text_message
    from a2a.server.agent_execution import AgentExecutor
    from a2a.server.request_handlers import DefaultRequestHandler
    from a2a.server.routes import create_agent_card_routes, create_jsonrpc_routes
    from a2a.server.tasks import InMemoryTaskStore
    from starlette.applications import Starlette

    class Echo(AgentExecutor):
        async def execute(self, context: Any, event_queue: Any) -> None:
            await event_queue.enqueue_event(new_text_message(f"echo {get_message_text(context.message)}"))

        async def cancel(self, context: Any, event_queue: Any) -> None:
            raise AssertionError("this is refused before it comes here")

    handler = DefaultRequestHandler(agent_executor=Echo(), task_store=InMemoryTaskStore(), agent_card=card("unused"))
    routes = [*create_agent_card_routes(card("unused")), *create_jsonrpc_routes(handler, "/")]
    with served(Starlette(routes=routes)) as port:
        with governed(tmp_path_factory.mktemp("a2a"), PERMIT, NO_STREAMS, NO_CANCEL, upstream=port) as url:
            yield url


def card(url: str) -> Any:
    from a2a.types.a2a_pb2 import AgentCapabilities, AgentCard, AgentInterface

    return AgentCard(
        name="echo",
        description="says it again",
        version="1",
        capabilities=AgentCapabilities(streaming=True),
        default_input_modes=["text/plain"],
        default_output_modes=["text/plain"],
        supported_interfaces=[AgentInterface(url=url, protocol_binding="JSONRPC", protocol_version="1.0")],
    )


async def ask(base: str, *, streaming: bool) -> list[str]:
    from a2a.client import ClientConfig, create_client
    from a2a.helpers.proto_helpers import get_stream_response_text, new_text_message
    from a2a.types.a2a_pb2 import Role, SendMessageRequest

    async with httpx.AsyncClient() as http:
        client = await create_client(card(base + "/"), ClientConfig(streaming=streaming, httpx_client=http))
        message = new_text_message("hello", role=Role.ROLE_USER)
        return [get_stream_response_text(event) async for event in client.send_message(SendMessageRequest(message=message))]


async def test_work_is_given_and_what_is_forbidden_is_said(base: str) -> None:
    assert await ask(base, streaming=False) == ["echo hello"]
    with pytest.raises(Exception, match="answers come in one piece here"):
        await ask(base, streaming=True)


async def test_cancelling_is_refused_in_words(base: str) -> None:
    from a2a.client import ClientConfig, create_client
    from a2a.types.a2a_pb2 import CancelTaskRequest

    async with httpx.AsyncClient() as http:
        client = await create_client(card(base + "/"), ClientConfig(httpx_client=http))
        with pytest.raises(Exception, match="work is finished once begun"):
            await client.cancel_task(CancelTaskRequest(id="t"))


async def test_the_card_is_read(base: str) -> None:
    from a2a.client import A2ACardResolver

    async with httpx.AsyncClient() as http:
        assert (await A2ACardResolver(http, base).get_agent_card()).name == "echo"
