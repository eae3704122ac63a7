"""HTTP/2 at the edges of the relay: frames outside, HTTP/1.1 inside.

The relay holds all governance: decisions, holding, taps, timeouts, limits, records. So an HTTP/2 connection ends here
and each of its streams becomes a relay connection of its own, on a transport that exists only in memory: what an agent
sent is validated, written down as an HTTP/1.1 request and given to a ``Downstream``; what the relay writes is read as
an HTTP/1.1 response and sent as frames. ``agents`` is that side, ``origins`` the other. What HTTP/1.1 between two
hops cannot say (trailers, the code of a reset) goes past the relay from stream to stream.
"""
