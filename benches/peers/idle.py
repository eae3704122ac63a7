"""What memory does an idle kept-alive connection hold in user space, plain and with TLS?

After a warm-up, so many connections are opened, each asks for 1 KiB once and is then left alone. What the proxy's
processes grew by (proportional set size, ``/proc/PID/smaps_rollup``), over the connections: kernel socket buffers are
not in it. nginx and haproxy set their tables of connections aside at start, so those are not in their growth.
"""

from __future__ import annotations

import socket
import ssl
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peers import creto, programs
from peers.agent import get, open_connection
from peers.load import Say, settle, tree
from peers.settings import Settings, started

WARM_UP = 2000
# What the bench and the programs need beside one descriptor for each connection.
SPARE = 256
# A creto process keeps two further descriptors in reserve for each connection it takes.
PER_CONNECTION = 3


def measure(folder: Path, settings: Settings, say: Say) -> dict[str, Any]:
    files = programs.most_files()
    wanted = settings.connections
    room = (files - SPARE) // PER_CONNECTION
    # Connections spread unevenly over workers.
    workers = 1 if room >= wanted else -(-wanted * 5 // (4 * room))
    if workers > 1 and not creto.knows_workers():
        workers = 1
    count = min(wanted, files - SPARE, room if workers == 1 else wanted)
    result: dict[str, Any] = {"wanted": wanted, "held": count, "descriptors": files, "workers": workers, "rows": []}
    missing: list[str] = []
    result["missing"] = missing
    for tls in (False, True):
        with ExitStack() as stack:
            here = folder / ("tls" if tls else "plain")
            to = stack.enter_context(programs.upstream(here / "upstream"))
            spare = count + SPARE
            peers = started(
                stack,
                missing,
                programs.nginx(here / "nginx", to, tls=tls, connections=spare),
                programs.haproxy(here / "haproxy", to, tls=tls, connections=spare),
            )
            sidecar = stack.enter_context(creto.sidecar(here / "creto", to, tls=tls, workers=workers))
            peers.append(sidecar.tls_peer() if tls else sidecar.peer())
            for peer in peers:
                row = held(peer, count)
                result["rows"].append({"name": peer.name, "tls": tls, **row})
                say(
                    f"{count:,} idle connections {'with TLS' if tls else 'plain   '}: {peer.name:18} "
                    f"{row['bytes_each']:9,.0f} bytes each"
                )
    return result


def held(peer: programs.Peer, count: int) -> dict[str, Any]:
    """What the peer's processes grow by while ``count`` connections to it are idle."""
    assert peer.pid is not None
    with open_connection(peer) as warm:
        for _ in range(WARM_UP):
            get(warm, peer)
    settle(peer.pid)
    before, begun = memory(peer.pid), time.monotonic()
    kept: list[int] = []
    try:
        half = before
        for number in range(count):
            if number == count // 2:
                half = memory(peer.pid)
            sock = open_connection(peer)
            get(sock, peer)
            kept.append(released(sock))
        opened = time.monotonic() - begun
        settle(peer.pid)
        after = memory(peer.pid)
    finally:
        for descriptor in kept:
            socket.close(descriptor)
    return {
        "bytes_each": (after - before) / count,
        # The first connections may live in memory that the warm-up left free.
        "bytes_each_second_half": (after - half) / (count - count // 2),
        "before_bytes": before,
        "after_bytes": after,
        "opened_s": opened,
    }


def released(sock: socket.socket) -> int:
    """The descriptor alone: what the client needs to remember of a TLS session is not what is measured."""
    if isinstance(sock, ssl.SSLSocket):
        sock.settimeout(None)
    return sock.detach()


def memory(pid: int) -> int:
    """Proportional set size of the tree, in bytes."""
    total = 0
    for process in tree(pid):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total
