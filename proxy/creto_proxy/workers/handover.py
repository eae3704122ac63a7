"""From one program image to the next in the same process: the descriptors stay open over exec(3), and what they are is
written into anonymous memory, whose number stands in the environment.

The next image may be of another version. It gets plain msgpack, and ``FORM`` says which; a change of meaning is a new
number, and an image that does not know it says so when it is asked with ``creto sidecar --check``, before any exec.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass, field, fields
from typing import Any

import msgpack

from creto_proxy.errors import ConfigError
from creto_proxy.workers.order import HELD, taken, written

FORM = 1
VARIABLE = "CRETO_HANDOVER"
CHECKED = "CRETO_HANDOVER_FORM"


@dataclass(frozen=True, slots=True)
class Inherited:
    """A worker that goes on while its controller is replaced. link, lock: descriptors. received: the start of a
    message that was being read."""

    slot: int
    serial: int
    pid: int
    generation: int
    state: str
    started_at: float
    journal: str
    link: int
    lock: int
    received: bytes = b""


@dataclass(frozen=True, slots=True)
class Handover:
    """What the next image must know. why: "reload" or "restart". listeners: descriptors by ``Listener.key``.
    sockets: further descriptors by name. authority: the run's CA, exported. slots: in how many a worker is to serve.
    reloads: how many there have been. previous: configuration and plugins as they are in force, pickled, to go on with
    should the new ones fail after all.
    """

    why: str
    run: str
    started_at: float
    slots: int
    generation: int
    serial: int
    restarts: int
    reloads: int
    run_lock: int
    directory_lock: int
    control: int
    authority: bytes = field(repr=False)
    previous: bytes = field(repr=False)
    listeners: dict[str, list[int]]
    workers: list[Inherited]
    sockets: dict[str, int] = field(default_factory=dict)

    def descriptors(self) -> list[int]:
        """Every descriptor that the next image needs."""
        found = [self.run_lock, self.directory_lock, self.control, *self.sockets.values()]
        found += [fd for each in self.listeners.values() for fd in each]
        return found + [fd for worker in self.workers for fd in (worker.link, worker.lock)]

    def close_sockets(self) -> None:
        """Closes what the next image has made its own, and what it has no use for."""
        for fd in (*self.sockets.values(), *(fd for each in self.listeners.values() for fd in each)):
            os.close(fd)


def give(handover: Handover) -> None:
    """Goes on as the next image. Returns only when that is impossible: raises OSError, and nothing has changed."""
    document = {each.name: getattr(handover, each.name) for each in fields(handover)}
    document["workers"] = [{each.name: getattr(w, each.name) for each in fields(w)} for w in handover.workers]
    memory = written(msgpack.packb({"form": FORM, **document}), "creto-handover")
    inherited = (memory, *handover.descriptors())
    for fd in inherited:
        os.set_inheritable(fd, True)
    # A signal in between would meet the default action; it is kept until the next image says what it does.
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    try:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, VARIABLE: str(memory)})
    except OSError:
        for fd in inherited:
            os.set_inheritable(fd, False)
        os.close(memory)
        raise


def accept(environ: MutableMapping[str, str]) -> Handover | None:
    """What the image before gave, None when there was none. Raises ConfigError for a form that is not known."""
    number = environ.pop(VARIABLE, "")
    if not number.isdecimal():
        return None
    document: dict[str, Any] = msgpack.unpackb(taken(int(number)))
    if document.pop("form") != FORM:
        raise ConfigError(["the creto that ran here cannot hand over to this version: stop it and start this one"])
    workers = [Inherited(**worker) for worker in document.pop("workers")]
    handover = Handover(workers=workers, **document)
    for fd in handover.descriptors():
        os.set_inheritable(fd, False)
    return handover


def known_form(environ: MutableMapping[str, str]) -> bool:
    """Whether the image that asks, by ``--check``, speaks as this one does. Takes its question out of ``environ``."""
    return environ.pop(CHECKED, str(FORM)) == str(FORM)
