"""A stand-in sidecar for the jail tests: launches one agent, answers its network, reports what happened.

Run as a program, because ``launch`` forks and because it must be possible to kill it. Reads its order as JSON from
the file named by the first argument, writes its report to the file named by the second.

Every redirected TCP connection is answered with one JSON line telling where it was headed; every DNS datagram is
echoed. Connecting to port 10000 + n sends signal n to the agent.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from creto_proxy.errors import Unsupported
from creto_proxy.hookspecs import RedirectPorts
from creto_proxy.jail import Jail, JailSpec, launch, original_destination


class Rules:
    def install(self, ports: RedirectPorts) -> None:
        from creto_egress import nft, ruleset

        nft.load(ruleset.run_mode(ports.tcp, ports.dns))


class NoRules:
    def install(self, ports: RedirectPorts) -> None:
        raise Unsupported("no such thing here")


def serve(jail: Jail, loop: asyncio.AbstractEventLoop) -> None:
    def accept(listener: Any) -> None:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            return
        with connection:
            destination = original_destination(connection)
            answer = None if destination is None else [str(destination[0]), destination[1]]
            connection.sendall(json.dumps(answer).encode() + b"\n")
        if destination is not None and destination[1] > 10000:
            jail.signal(destination[1] - 10000)

    def echo(sock: Any) -> None:
        try:
            data, peer = sock.recvfrom(4096)
        except BlockingIOError:
            return
        sock.sendto(b"dns:" + data, peer)

    for listener in (*jail.listeners.tcp, *jail.listeners.dns_tcp):
        loop.add_reader(listener, accept, listener)
    for sock in jail.listeners.dns_udp:
        loop.add_reader(sock, echo, sock)


async def run(order: dict[str, Any]) -> dict[str, Any]:
    signals: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, lambda received, _: signals.append(received))
    leak = os.open(order["argv_cwd"], os.O_RDONLY)
    os.set_inheritable(leak, True)  # a careless library: the jail must not depend on close-on-exec
    spec = JailSpec(
        argv=tuple(order["argv"]),
        env={**os.environ, **order["env"], "SIDECAR_PID": str(os.getpid())},
        cwd=Path(order["argv_cwd"]),
        hidden=tuple(Path(p) for p in order["hidden"]),
        readable={Path(host): Path(inside) for host, inside in order["readable"].items()},
        ca_bundle=Path(order["ca_bundle"]) if order["ca_bundle"] else None,
        grace_s=order["grace_s"],
    )
    try:
        jail = launch(spec, Rules() if order["rules"] else NoRules())
    except (Unsupported, OSError) as error:
        return {"error": str(error), "kind": type(error).__name__}
    serve(jail, asyncio.get_running_loop())
    jail.start()
    status = await jail.wait()
    again = jail.poll()
    jail.close()
    jail.close()
    return {"status": status, "again": again, "signals": signals}


def main() -> None:
    order = json.loads(Path(sys.argv[1]).read_text())
    if order["uvloop"]:
        import uvloop

        report = uvloop.run(run(order))
    else:
        report = asyncio.run(run(order))
    Path(sys.argv[2]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
