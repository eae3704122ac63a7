"""Plain connections of the data path: compiled transports, or the event loop's own when the twin is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from creto_hotpath._wire_py import Listener, attach, dial, listen
else:
    from creto_hotpath._select import select

    _wire = select("wire")
    Listener = _wire.Listener
    attach = _wire.attach
    dial = _wire.dial
    listen = _wire.listen

__all__ = ["Listener", "attach", "dial", "listen"]
