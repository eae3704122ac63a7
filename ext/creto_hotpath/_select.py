"""Compiled module or Python twin: the one place that chooses.

Each hot part exists twice. ``_x_py`` is the specification in plain Python, ``_x_c`` the compiled form with the same
names and the same answers. The compiled one is used unless ``CRETO_NO_EXTENSIONS=1``; when it is missing that is an
error, never a silent fallback: a proxy that is a hundred times slower than it should be looks healthy until it is not.
"""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType

PACKAGE = "creto_hotpath"


def extensions_wanted() -> bool:
    """False when the environment asks for the Python twins with ``CRETO_NO_EXTENSIONS=1``."""
    return os.environ.get("CRETO_NO_EXTENSIONS", "") in ("", "0")


def select(name: str) -> ModuleType:
    """The module that implements ``name`` in this process, e.g. ``select("quota")``.

    Raises ImportError, saying what to do, when the compiled module was not built.
    """
    if not extensions_wanted():
        return import_module(f"{PACKAGE}._{name}_py")
    wanted = f"{PACKAGE}._{name}_c"
    try:
        return import_module(wanted)
    except ModuleNotFoundError as error:
        if error.name != wanted:
            raise
        raise ImportError(
            f"{wanted} is not built for this interpreter. Install from a wheel, or build it with `pip install .` "
            "(needs a C compiler), or set CRETO_NO_EXTENSIONS=1 to run the much slower Python twins.",
            name=wanted,
        ) from error
