"""The relay protocols of the data path, compiled unless the twin is asked for.

``Downstream`` is the protocol of an agent's connection and drives a ``Handler``; ``Exchange`` is one request with the
verbs that answer it; ``Upstream`` and ``Pool`` are the other side; ``Tunnel`` pumps bytes that nobody looks into.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from creto_hotpath._relay_py import Handler, Limits, Tap

if TYPE_CHECKING:
    import asyncio

    from creto_hotpath import _relay_py
    from creto_hotpath._relay_py import Exchange, Lane, Pool, Stack, Tunnel, Wheel, reset, wheel_of

    # asyncio asks for its own base classes; the relay answers to their methods without inheriting from them.
    class Downstream(_relay_py.Downstream, asyncio.Protocol): ...

    class Upstream(_relay_py.Upstream, asyncio.Protocol): ...

else:
    from creto_hotpath._select import select

    _relay = select("relay")
    Downstream = _relay.Downstream
    Exchange = _relay.Exchange
    Lane = _relay.Lane
    Pool = _relay.Pool
    Stack = _relay.Stack
    Tunnel = _relay.Tunnel
    Upstream = _relay.Upstream
    Wheel = _relay.Wheel
    reset = _relay.reset
    wheel_of = _relay.wheel_of

__all__ = [
    "Downstream",
    "Exchange",
    "Handler",
    "Lane",
    "Limits",
    "Pool",
    "Stack",
    "Tap",
    "Tunnel",
    "Upstream",
    "Wheel",
    "reset",
    "wheel_of",
]
