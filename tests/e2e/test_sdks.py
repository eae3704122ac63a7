"""The real SDKs, unmodified and unconfigured, through ``creto run``: metered, budgeted, refused readably."""

from __future__ import annotations

import json

import pytest

from .conftest import Creto

CHAT = """
import openai
client = openai.OpenAI()
answer = client.chat.completions.create(model="gpt-4o-mini", max_tokens=20, messages=[{"role": "user", "content": "hi"}])
print(answer.usage.prompt_tokens, answer.usage.completion_tokens)
"""

STREAM = """
import openai
chunks = list(openai.OpenAI().chat.completions.create(model="gpt-4o-mini", max_tokens=20, stream=True,
    {options}messages=[{{"role": "user", "content": "hi"}}]))
print(len(chunks), [c.usage.total_tokens for c in chunks if c.usage], all(c.choices for c in chunks))
"""


def test_openai_completion_is_metered_in_tokens_and_nano_dollars(creto: Creto) -> None:
    result = creto.python(CHAT)
    assert result.status == 0, result.err
    prompt, completion = map(int, result.out.split())
    [row] = result.to("api.openai.com")
    usage = row["usage"]
    assert (usage["tokens"]["input"], usage["tokens"]["output"]) == (prompt, completion)
    # gpt-4o-mini: 0.15 and 0.60 USD per million tokens, that is 150 and 600 nano-dollars per token.
    assert usage["cost_nano_usd"] == prompt * 150 + completion * 600
    assert (usage["certainty"], usage["model"]) == ("exact", "gpt-4o-mini")


def test_streamed_completion_is_metered_and_the_client_sees_nothing_extra(creto: Creto) -> None:
    result = creto.python(STREAM.format(options=""))
    assert result.status == 0, result.err
    assert result.out.split()[1:] == ["[]", "True"], "usage was injected upstream and stripped again"
    [row] = result.to("api.openai.com")
    assert row["usage"]["certainty"] == "exact" and row["usage"]["tokens"]["output"] > 0
    assert row["error"] is None, "the SDK closes after [DONE], and by then it has everything"
    sent = json.loads(creto.world.seen.requests[-1]["body"])
    assert sent["stream_options"] == {"include_usage": True}


def test_a_client_that_asked_for_streamed_usage_still_gets_it(creto: Creto) -> None:
    result = creto.python(STREAM.format(options='stream_options={{"include_usage": True}}, '.format()))
    assert result.status == 0, result.err
    assert result.out.split()[2] == "False" and "[]" not in result.out


@pytest.mark.parametrize(
    ("call", "model"),
    [
        ('client.responses.create(model="gpt-4o-mini", input="hi", max_output_tokens=20).usage.total_tokens', "gpt-4o-mini"),
        ('client.embeddings.create(model="text-embedding-3-small", input="hi").usage.total_tokens', "text-embedding-3-small"),
    ],
)
def test_openai_responses_and_embeddings_are_metered(creto: Creto, call: str, model: str) -> None:
    result = creto.python(f"import openai\nclient = openai.OpenAI()\nprint({call})")
    assert result.status == 0, result.err
    [row] = result.to("api.openai.com")
    tokens = row["usage"]["tokens"]
    assert tokens["input"] + tokens.get("output", 0) == int(result.out)
    assert row["usage"]["model"] == model and row["usage"]["cost_nano_usd"] > 0


@pytest.mark.parametrize("stream", [False, True])
def test_anthropic_messages_are_metered(creto: Creto, stream: bool) -> None:
    asked = 'model="claude-sonnet-4-5", max_tokens=20, messages=[{"role": "user", "content": "hi"}]'
    code = f"import anthropic\nclient = anthropic.Anthropic()\nprint(client.messages.create({asked}).usage.output_tokens)"
    if stream:
        code = (
            f"import anthropic\nwith anthropic.Anthropic().messages.stream({asked}) as s:\n"
            "    print(s.get_final_message().usage.output_tokens)"
        )
    result = creto.python(code)
    assert result.status == 0, result.err
    [row] = result.to("api.anthropic.com")
    assert row["usage"]["tokens"]["input"] == 11
    assert row["usage"]["tokens"]["output"] == int(result.out)
    assert row["usage"]["certainty"] == "exact" and row["usage"]["cost_nano_usd"] > 0


def test_a_spent_budget_is_a_readable_429_and_nothing_is_sent(creto: Creto) -> None:
    creto.add('\n[[metering.budgets]]\nlevel = "agent"\nmetric = "cost_usd"\nlimit = "0.0001"\nwindow = "total"\n')
    code = """
import openai
client = openai.OpenAI()
for _ in range(20):
    try: client.chat.completions.create(model="gpt-4o-mini", max_tokens=50, messages=[{"role": "user", "content": "hi"}])
    except openai.RateLimitError as error:
        print(error.status_code, error); break
"""
    result = creto.python(code)
    assert result.out.startswith("429 "), result.out + result.err
    assert "budget" in result.out and "creto" in result.out
    rows = result.to("api.openai.com")
    assert [r["decision"] for r in rows[:-1]] == ["allow"] * (len(rows) - 1)
    assert rows[-1]["reason"] == "budget_exhausted"
    assert len(creto.world.seen.requests) == len(rows) - 1, "the SDK did not retry and nothing was forwarded"
    assert sum(r["usage"]["cost_nano_usd"] for r in rows) <= 100_000


NO_LARGE_MODELS = """
@id("no-large-models") @description("large models are for the night shift")
forbid (principal, action == Creto::Action::"llmCall", resource)
when { context has model && (context.model == "gpt-4o" || context.model like "claude-opus-*") };
"""


def test_a_forbidden_model_is_a_readable_403_for_both_sdks(creto: Creto) -> None:
    (creto.policies / "models.cedar").write_text(NO_LARGE_MODELS)
    code = """
import anthropic, openai
said = [{"role": "user", "content": "hi"}]
for model in ("gpt-4o", "gpt-4o-mini"):
    try: print(openai.OpenAI().chat.completions.create(model=model, max_tokens=20, messages=said).model)
    except openai.PermissionDeniedError as error: print(error.status_code, error)
for model in ("claude-opus-4-1", "claude-sonnet-4-5"):
    try: print(anthropic.Anthropic().messages.create(model=model, max_tokens=20, messages=said).model)
    except anthropic.PermissionDeniedError as error: print(error.status_code, error)
"""
    result = creto.python(code)
    lines = result.out.splitlines()
    assert len(lines) == 4, result.out + result.err
    assert all(line.startswith("403 ") and "large models are for the night shift" in line for line in lines[::2])
    assert lines[1].startswith("gpt-4o-mini") and lines[3].startswith("claude-sonnet-4-5")
    assert [row["decision"] for row in result.to("api.openai.com")] == ["deny", "allow"]
    assert [row["decision"] for row in result.to("api.anthropic.com")] == ["deny", "allow"]


def test_mcp_sdk_lists_and_calls_tools(creto: Creto) -> None:
    from .servers import serving_mcp

    code = """
import asyncio
from mcp import Client
async def main():
    async with Client("https://mcp.example.com/mcp") as client:
        tools = await client.list_tools()
        print([t.name for t in tools.tools])
        result = await client.call_tool("add", {"a": 2, "b": 3})
        print(result.content[0].text)
asyncio.run(main())
"""
    with serving_mcp("mcp.example.com") as (port, ca):
        creto.config.write_text(
            creto.config.read_text()
            .replace(f'"mcp.example.com" = "127.0.0.1:{creto.world.https}"', f'"mcp.example.com" = "127.0.0.1:{port}"')
            .replace(str(creto.world.ca), str(ca))
        )
        result = creto.python(code)
    assert result.out.split("\n")[:2] == ["['add']", "5"], result.out + result.err
    assert {row["decision"] for row in result.to("mcp.example.com")} == {"allow"}
