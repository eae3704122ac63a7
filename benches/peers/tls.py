"""What does the same request cost with TLS on both sides?

nginx, haproxy and the aiohttp proxy end TLS as servers. Creto and mitmproxy end it where they intercept: inside a
CONNECT tunnel, with a certificate of their own authority. The same wrk drives all of them: ``connect.c`` opens the
tunnel when a connection begins, and connections are kept, so that what is counted is records and requests, not
handshakes.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peers import creto, programs
from peers.agent import negotiated
from peers.load import Client, Load, Say, compare
from peers.settings import Settings, started

LOAD = Load("GET 1 KiB, TLS both sides, 64 connections", 64)


def measure(folder: Path, settings: Settings, say: Say) -> dict[str, Any]:
    missing: list[str] = []
    with ExitStack() as stack:
        to = stack.enter_context(programs.upstream(folder / "upstream"))
        sidecar = stack.enter_context(creto.sidecar(folder / "creto", to, tls=True))
        rivals = started(
            stack,
            missing,
            programs.nginx(folder / "nginx", to, tls=True),
            programs.haproxy(folder / "haproxy", to, tls=True),
            programs.aiohttp(folder / "aiohttp", to, tls=True),
            programs.mitmproxy(folder / "mitmproxy", to, tls=True),
        )
        client = Client(folder, to.pid, programs.connect_library(folder))
        peers = [*rivals, sidecar.tls_peer()]
        # Seen by a client of each and by the upstream behind it: the same work for all, or the comparison says so.
        spoken = {peer.name: negotiated(peer) for peer in peers}
        rows = compare(client, peers, LOAD, *settings.rounds_of(say))
    return {"loads": [{"title": LOAD.title, "rows": rows}], "negotiated": spoken, "missing": missing}
