"""One target under atheris (libFuzzer), in a process of its own: ``explore`` starts it. argv: target, libFuzzer flags."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable

import atheris

# Instrumented while it is imported, which is why the targets come after this.
with atheris.instrument_imports(include=["creto_hotpath", "creto_platform", "creto_proxy"]):
    from tests.fuzz.targets import CORPUS, TARGETS

MOST_TRIES = 2000


def shortest(data: bytes, breaks: Callable[[bytes], bool]) -> bytes:
    """``data`` without every piece that it can lose and still break the target."""
    size, tries = len(data) // 2, 0
    while size and tries < MOST_TRIES:
        at = 0
        while at < len(data) and tries < MOST_TRIES:
            tries += 1
            shorter = data[:at] + data[at + size :]
            if breaks(shorter):
                data = shorter
            else:
                at += size
        size //= 2
    return data


def main() -> None:
    name, *flags = sys.argv[1:]
    target = TARGETS[name]

    def breaks(data: bytes) -> bool:
        try:
            target.check(data)
        except Exception:
            return True
        return False

    def check(data: bytes) -> None:
        try:
            target.check(data)
        except Exception:
            found = shortest(data, breaks)
            (CORPUS / name / f"crash-{hashlib.sha256(found).hexdigest()[:12]}").write_bytes(found)
            raise

    atheris.Setup([sys.argv[0], *flags], check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
