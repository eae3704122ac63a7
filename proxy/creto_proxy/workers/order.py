"""What a worker is given: everything in one piece of anonymous memory, nothing on its command line or on disk.

The configuration is the one that was validated, so a worker that is started again later is like its siblings whatever
has been written into the files meanwhile. It is pickled: only the controller that made it can have made it.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from dataclasses import dataclass, field

from creto_proxy.config import Config
from creto_proxy.plugins import Found

# Held back until a process, or a new program image in it, has said what they shall do: by default they end it.
HELD = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True, slots=True)
class Order:
    """How to be a worker.

    journal: name of its journal. agent: of the identity of those who connect. authority: the run's CA, exported.
    listeners: (way, descriptor) of the sockets to accept from. link: its end of the channel to the controller. lock:
    of its journal, held as long as it lives.
    """

    run: str
    slot: int
    serial: int
    generation: int
    journal: str
    agent: str
    config: Config
    found: tuple[Found, ...]
    authority: bytes = field(repr=False)
    listeners: tuple[tuple[str, int], ...]
    link: int
    lock: int


def written(content: bytes, name: str) -> int:
    """A descriptor of anonymous memory that holds ``content``."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(fd, len(content))
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(content)
    return fd


def taken(fd: int) -> bytes:
    """What ``written`` put there, once."""
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        return file.read()


def started(order: Order) -> int:
    """The pid of a new process that follows ``order``. Raises OSError."""
    memory = written(pickle.dumps(order), "creto-order")
    try:
        # Not even the controller's directory is searched for modules (-P): whoever writes there is not creto.
        argv = [sys.executable, "-P", "-m", "creto_proxy.workers", str(memory), f"slot={order.slot}", order.journal]
        # A socket, the lock and the order keep their numbers; everything else of the controller is closed on exec.
        kept = [memory, order.link, order.lock, *(fd for _, fd in order.listeners)]
        keep = [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in kept]
        # A group of its own: what a terminal sends to all of the foreground is for the controller to pass on.
        return os.posix_spawn(sys.executable, argv, os.environ, file_actions=keep, setsigmask=HELD, setpgroup=0)
    finally:
        os.close(memory)


def received(fd: int) -> Order:
    """The order that the controller wrote into ``fd``; the descriptors in it are ours alone from now on."""
    order = pickle.loads(taken(fd))
    if not isinstance(order, Order):
        raise TypeError("not an order for a worker")
    for inherited in (order.link, order.lock, *(each for _, each in order.listeners)):
        os.set_inheritable(inherited, False)
    return order
