"""What every port may raise besides its own errors."""

from __future__ import annotations


class PlatformError(Exception):
    """Base of everything a platform port raises on purpose; the text names what failed and where."""


class NotConfigured(PlatformError):
    """The port has no backend on this installation. ``hint`` says which setting would give it one."""

    def __init__(self, port: str, hint: str) -> None:
        super().__init__(f"the {port} port is not configured: {hint}")
        self.port = port
        self.hint = hint
