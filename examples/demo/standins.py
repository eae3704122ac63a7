"""Stand-ins for a model API and a tool API on loopback: right wire formats, their own TLS certificates, no network.

The model API answers as ``api.openai.com`` (chat completions, responses, embeddings, models) and ``api.anthropic.com``
(messages); streamed usage is sent only to clients that asked for it, as the real ones do. The tool API answers as
``payments.example.com`` and counts what really arrived, which is how the demo shows "exactly once".
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import ipaddress
import json
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

WORDS = "Governed agents answer to people .".split()


@dataclass
class Seen:
    """What the stand-ins received, for the demo's and the tests' own checks."""

    requests: list[dict[str, Any]] = field(default_factory=list)

    def count(self, method: str, path: str) -> int:
        return sum(r["method"] == method and r["path"] == path for r in self.requests)


def _usage(prompt: int, completion: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
    }


async def _events(request: web.Request, events: list[str]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    with contextlib.suppress(ConnectionResetError):
        for event in events[:-1]:
            await response.write(event.encode())
            await asyncio.sleep(0.005)
        # The end of the body with the last event: SDKs hang up once they have read that one.
        await response.write_eof(events[-1].encode())
    return response


def _data(document: Any) -> str:
    return f"data: {json.dumps(document)}\n\n"


async def chat(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    prompt = sum(len(str(m.get("content", "")).split()) + 4 for m in body["messages"])
    model, identity = body["model"], {"id": "chatcmpl-demo", "created": 1_700_000_000}
    if not body.get("stream"):
        message = {"role": "assistant", "content": " ".join(WORDS), "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        return web.json_response(
            {**identity, "object": "chat.completion", "model": model, "choices": [choice],
             "usage": _usage(prompt, len(WORDS))}
        )  # fmt: skip
    wants_usage = bool((body.get("stream_options") or {}).get("include_usage"))
    chunk = {**identity, "object": "chat.completion.chunk", "model": model}
    extra: dict[str, Any] = {"usage": None} if wants_usage else {}
    events = [
        _data({**chunk, "choices": [{"index": 0, "delta": {"content": word + " "}, "finish_reason": None}], **extra})
        for word in WORDS
    ]
    events.append(_data({**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], **extra}))
    if wants_usage:
        events.append(_data({**chunk, "choices": [], "usage": _usage(prompt, len(WORDS))}))
    events.append("data: [DONE]\n\n")
    return await _events(request, events)


async def responses(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    usage = {
        "input_tokens": 9, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": len(WORDS),
        "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 9 + len(WORDS),
    }  # fmt: skip
    content = [{"type": "output_text", "text": " ".join(WORDS), "annotations": []}]
    item = {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": content}
    document: dict[str, Any] = {
        "id": "resp_demo", "object": "response", "created_at": 1_700_000_000, "status": "completed",
        "model": body["model"], "output": [item], "usage": usage, "parallel_tool_calls": True, "tool_choice": "auto",
        "tools": [], "metadata": {}, "error": None, "incomplete_details": None, "instructions": None,
        "temperature": 1.0, "top_p": 1.0,
    }  # fmt: skip
    if not body.get("stream"):
        return web.json_response(document)
    started = {**document, "status": "in_progress", "output": [], "usage": None}
    return await _events(
        request,
        [
            f"event: {kind}\n{_data({'type': kind, 'sequence_number': n, 'response': state})}"
            for n, (kind, state) in enumerate([("response.created", started), ("response.completed", document)])
        ],
    )


async def embeddings(request: web.Request) -> web.Response:
    body = await request.json()
    data = [{"object": "embedding", "index": 0, "embedding": [0.0, 0.5, 1.0]}]
    usage = {"prompt_tokens": 5, "total_tokens": 5}
    return web.json_response({"object": "list", "data": data, "model": body["model"], "usage": usage})


async def models(request: web.Request) -> web.Response:
    card = {"id": "gpt-4o-mini", "object": "model", "created": 1_700_000_000, "owned_by": "stand-in"}
    return web.json_response({"object": "list", "data": [card]})


async def messages(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    start = {"input_tokens": 11, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 1}
    message: dict[str, Any] = {
        "id": "msg_demo", "type": "message", "role": "assistant", "model": body["model"], "content": [],
        "stop_reason": None, "stop_sequence": None, "usage": start,
    }  # fmt: skip
    if not body.get("stream"):
        text = [{"type": "text", "text": " ".join(WORDS)}]
        usage = {**start, "output_tokens": len(WORDS)}
        return web.json_response({**message, "content": text, "stop_reason": "end_turn", "usage": usage})
    events: list[dict[str, Any]] = [{"type": "message_start", "message": message}]
    events.append({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})
    for word in WORDS:
        delta = {"type": "text_delta", "text": word + " "}
        events.append({"type": "content_block_delta", "index": 0, "delta": delta})
    events.append({"type": "content_block_stop", "index": 0})
    stop = {"stop_reason": "end_turn", "stop_sequence": None}
    events.append({"type": "message_delta", "delta": stop, "usage": {"output_tokens": len(WORDS)}})
    events.append({"type": "message_stop"})
    return await _events(request, [f"event: {e['type']}\n{_data(e)}" for e in events])


async def refund(request: web.Request) -> web.Response:
    body = await request.json()
    return web.json_response({"id": "re_1", "amount": body.get("amount"), "status": "succeeded"})


async def hello(request: web.Request) -> web.Response:
    return web.json_response({"hello": request.host, "path": request.path})


def application(seen: Seen) -> web.Application:
    """The stand-ins as one application; hosts are told apart by their routes."""

    @web.middleware
    async def record(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        seen.requests.append(
            {"method": request.method, "path": request.path, "host": request.host, "body": await request.read(),
             "headers": dict(request.headers)}
        )  # fmt: skip
        return await handler(request)

    app = web.Application(middlewares=[record])
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_post("/v1/responses", responses)
    app.router.add_post("/v1/embeddings", embeddings)
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/messages", messages)
    app.router.add_post("/v1/refunds", refund)
    app.router.add_get("/{tail:.*}", hello)
    return app


def certificates(directory: Path, names: list[str]) -> tuple[Path, ssl.SSLContext]:
    """(CA file, server context): a CA of the stand-ins' own and one certificate for all of ``names``."""
    now = dt.datetime.now(dt.UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "stand-in CA")])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    ca = (
        x509.CertificateBuilder().subject_name(issuer).issuer_name(issuer).public_key(ca_key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=2)).add_extension(x509.BasicConstraints(True, 0), True)
        .add_extension(usage, True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), False)
        .sign(ca_key, hashes.SHA256())
    )  # fmt: skip
    alternatives: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
    alternatives.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    leaf = (
        x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(issuer).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName(alternatives), True)
        .add_extension(x509.BasicConstraints(False, None), True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), False)
        .sign(ca_key, hashes.SHA256())
    )  # fmt: skip
    pem = serialization.Encoding.PEM
    ca_file, chain = directory / "standin-ca.pem", directory / "standin.pem"
    ca_file.write_bytes(ca.public_bytes(pem))
    chain.touch(mode=0o600)
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    chain.write_bytes(private + leaf.public_bytes(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    return ca_file, context


@dataclass(frozen=True)
class StandIns:
    """https: port of the TLS listener, http: of the plain one, ca: what its clients must trust."""

    https: int
    http: int
    ca: Path
    seen: Seen


@contextlib.contextmanager
def standins(directory: Path, names: list[str]) -> Iterator[StandIns]:
    """Runs the stand-ins on loopback in a thread of their own for as long as the block lasts."""
    ca, context = certificates(directory, names)
    seen, ports, ready = Seen(), [], threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        runner = web.AppRunner(application(seen), access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        for tls in (context, None):
            site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
            await site.start()
            server = site._server
            assert isinstance(server, asyncio.base_events.Server)
            ports.append(server.sockets[0].getsockname()[1])
        ready.set()
        await stop.wait()
        await runner.cleanup()

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(serve())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    if not ready.wait(10):
        raise RuntimeError("the stand-ins did not start")
    try:
        yield StandIns(https=ports[0], http=ports[1], ca=ca, seen=seen)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(5)
