"""Plain TCP through an explicit CONNECT: by a rule of the egress plugin for the address or the name, never without."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from creto_egress.guard import Guard
from creto_egress.settings import EgressSettings
from creto_proxy.model import Outcome

from .websocket_lab import lab, on_uvloop

GREETING = b"220 ready\r\n"


@contextlib.asynccontextmanager
async def speaking_first() -> AsyncIterator[int]:
    """The port of a server that greets before it is spoken to, then echoes: neither HTTP nor TLS."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)
        while data := await reader.read(1000):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def talk(directory: Path, target: str, rules: Sequence[str]) -> tuple[bytes, Outcome]:
    """What the agent hears after its CONNECT to ``target``, and the record. ``PORT`` stands for the server's."""
    async with speaking_first() as port:
        egress = Guard(EgressSettings(allow=[rule.replace("PORT", str(port)) for rule in rules]))
        async with lab(directory, port, egress=cast(Any, egress)) as here:
            reader, writer = await asyncio.open_connection("127.0.0.1", here.explicit)
            authority = target.replace("PORT", str(port))
            writer.write(f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n".encode())
            heard = await reader.readuntil(b"\r\n\r\n")
            if heard.startswith(b"HTTP/1.1 200"):
                heard = b""
                with contextlib.suppress(ConnectionError):
                    heard = await reader.read(len(GREETING))
                    writer.write(b"ping")
                    heard += await reader.read(4)
            writer.close()
            [outcome] = await here.recorded()
    return heard, outcome


@pytest.mark.parametrize(
    ("target", "rules"),
    [
        ("127.0.0.1:PORT", ["tcp://127.0.0.1:PORT"]),
        ("127.0.0.1:PORT", ["127.0.0.0/8:*", "tcp://127.0.0.1:PORT"]),
        ("up.test:PORT", ["tcp://up.test:PORT", "127.0.0.1:PORT"]),
    ],
)
def test_a_server_that_speaks_first_is_reached_by_a_tcp_rule(tmp_path: Path, target: str, rules: list[str]) -> None:
    heard, outcome = on_uvloop(talk(tmp_path, target, rules))
    assert heard == GREETING + b"ping"
    assert (outcome.decision, outcome.kind, outcome.scheme, outcome.error) == ("allow", "tcp", "tcp", "")
    assert (outcome.host, outcome.bytes_up, outcome.bytes_down) == (target.split(":")[0], 4, len(heard))


@pytest.mark.parametrize(
    ("target", "rules"),
    [
        ("127.0.0.1:PORT", ["127.0.0.1:PORT", "tcp://127.0.0.1:1", "tcp://up.test:PORT"]),
        ("up.test:PORT", ["up.test:PORT", "127.0.0.1:PORT", "tcp://up.test:1", "tcp://127.0.0.1:PORT"]),
    ],
)
def test_without_a_tcp_rule_for_it_nothing_of_it_is_heard(tmp_path: Path, target: str, rules: list[str]) -> None:
    heard, outcome = on_uvloop(talk(tmp_path, target, rules))
    assert heard == b""
    assert (outcome.decision, outcome.error) == ("deny", "silent_connection")


def test_a_tcp_rule_grants_its_own_address_only(tmp_path: Path) -> None:
    heard, outcome = on_uvloop(talk(tmp_path, "127.0.0.2:PORT", ["tcp://127.0.0.1:PORT"]))
    assert heard.startswith(b"HTTP/1.1 403") and outcome.reason == "address_not_public"
