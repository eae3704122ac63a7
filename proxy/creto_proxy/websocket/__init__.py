"""WebSocket connections (RFC 6455) whose messages a plugin wants to see.

    agent -> Tunnel -> WatchedTransport -> upstream        and back
                           |
                     Conversation: frames -> messages -> watch -> frames

A connection that nobody watches never gets here: after its 101 the relay pumps bytes. On a watched one the transport
to the upstream is replaced by one that speaks in whole messages, so that tunnel, byte counts, backpressure and the
record at the end stay what they are.
"""

from creto_proxy.websocket.messages import Broken, Conversation
from creto_proxy.websocket.transport import WatchedTransport
from creto_proxy.websocket.upgrade import Upgrade
from creto_proxy.websocket.watch import Watch, Watchers

__all__ = ["Broken", "Conversation", "Upgrade", "Watch", "WatchedTransport", "Watchers"]
