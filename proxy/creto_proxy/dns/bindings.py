"""Which addresses each link was given for which names: a connection's address must come from one of these answers."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

from creto_proxy.model import Address

# Programs keep addresses longer than their TTL: connection pools reconnect, the JVM caches 30 s by default and some
# forever, browsers a minute. A binding is not a permission, so keeping it longer gives nothing away; ending it early
# makes rotating CDNs fail at random (cilium issues 28427, 42594).
TTL_FLOOR_S = 60
GRACE_S = 600
# About 250 bytes each; what a busy agent resolves in a TTL is in the hundreds.
PER_LINK = 8192
# Names per address: CDNs put many behind one, an agent asks for few.
PER_ADDRESS = 64


class Bindings:
    """(link, address) -> names, with expiry; bounded per link, the least recently used address goes first.

    ``record`` and ``names`` are O(names of that address). Not thread-safe.
    """

    def __init__(self, *, per_link: int = PER_LINK, now_s: Callable[[], float] = time.monotonic) -> None:
        self._per_link = per_link
        self._now_s = now_s
        self._links: dict[str, OrderedDict[Address, OrderedDict[str, float]]] = {}
        self._pinned: dict[str, dict[Address, str]] = {}

    def record(self, link: str, name: str, addresses: Iterable[Address], ttl_s: float) -> None:
        """Remembers an answer. Call before the reply is sent: the client may connect before we run again."""
        table = self._links.setdefault(link, OrderedDict())
        expires = self._now_s() + max(ttl_s, TTL_FLOOR_S) + GRACE_S
        for address in addresses:
            names = table.setdefault(address, OrderedDict())
            names[name] = max(expires, names.get(name, 0.0))
            names.move_to_end(name)
            if len(names) > PER_ADDRESS:
                names.popitem(last=False)
            table.move_to_end(address)
        while len(table) > self._per_link:
            table.popitem(last=False)

    def pin(self, link: str, name: str, address: Address) -> None:
        """Binds an address that belongs to ``name`` alone, for good."""
        self._pinned.setdefault(link, {})[address] = name

    def names(self, link: str, address: Address) -> tuple[str, ...]:
        """Names this link was given ``address`` for, the latest answer first; empty when it never was, or long ago."""
        pinned = self._pinned.get(link, {}).get(address)
        if pinned is not None:
            return (pinned,)
        table = self._links.get(link)
        names = None if table is None else table.get(address)
        if table is None or names is None:
            return ()
        now = self._now_s()
        for name in [name for name, expires in names.items() if expires <= now]:
            del names[name]
        if not names:
            del table[address]
            return ()
        table.move_to_end(address)
        return tuple(reversed(names))

    def forget(self, link: str) -> None:
        """Drops everything of a link that is gone."""
        self._links.pop(link, None)
        self._pinned.pop(link, None)

    def __len__(self) -> int:
        return sum(map(len, self._links.values())) + sum(map(len, self._pinned.values()))
