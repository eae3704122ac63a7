"""The path of a request, and everything a plugin may import.

    accept -> identify -> authorize -> gate -> egress -> upstream -> meter -> audit

One file per stage, named after it; ``pipeline`` shows the order on one screen. ``model`` holds the nouns that travel
the path, ``hookspecs`` the whole plugin contract, ``errors`` every way to fail and the status an agent sees for it.
``config`` and ``plugins`` run once, before a socket opens: what a request meets afterwards is immutable.

Two rules hold the path together. *Permission is a value*: only ``egress`` makes a ``Permit`` and only ``upstream``
takes one. *The strictest answer wins*: a plugin that denies, raises or hangs refuses the request it was asked about,
and nothing else.

Nothing here imports a plugin; ``creto_hotpath`` and ``creto_platform`` import nothing from here.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("creto-enablement")
except PackageNotFoundError:  # imported from a checkout that is not installed
    __version__ = "0+unknown"
