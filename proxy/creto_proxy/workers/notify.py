"""Tells the service manager how it stands: the datagrams of sd_notify(3), without its library."""

from __future__ import annotations

import logging
import os
import socket
import time

log = logging.getLogger("creto.control")


def notify(*facts: str) -> None:
    """Sends ``facts`` such as ``"READY=1"`` to ``$NOTIFY_SOCKET``; does nothing where there is none."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]  # the abstract namespace (unix(7))
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(1.0)
            sock.sendto("\n".join(facts).encode(), address)
    except OSError as error:
        log.warning("the service manager cannot be told: %s", error)


def reloading() -> None:
    """To be followed by ``READY=1``; the clock reading is what ``Type=notify-reload`` asks for."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
