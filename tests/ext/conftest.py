"""Every compiled part and its Python twin run the same tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest

from creto_hotpath._select import extensions_wanted


@dataclass(frozen=True, slots=True)
class Form:
    """``form("quota")`` is the module that implements it in this form; ``form.name`` is "c" or "py"."""

    name: str

    def __call__(self, part: str) -> ModuleType:
        return import_module(self.module(part))

    def module(self, part: str) -> str:
        return f"creto_hotpath._{part}_{self.name}"

    @property
    def compiled(self) -> bool:
        return self.name == "c"


# Without extensions there may be none to test; with them a missing build fails the tests, as it fails the product.
FORMS = [Form("c"), Form("py")] if extensions_wanted() else [Form("py")]


@pytest.fixture(params=FORMS, ids=lambda form: "compiled" if form.compiled else "twin")
def form(request: pytest.FixtureRequest) -> Form:
    chosen: Form = request.param
    return chosen


@pytest.fixture
def both() -> tuple[Form, Form]:
    """The compiled form and the twin, for tests that compare them."""
    if not extensions_wanted():
        pytest.skip("CRETO_NO_EXTENSIONS=1: there is nothing to compare the twin with")
    return FORMS[0], FORMS[1]


def outcome(call: Callable[..., Any], *args: Any) -> Any:
    """What a call gives, or the type of what it raises, so that two forms can be compared."""
    try:
        return call(*args)
    except (ValueError, TypeError, OverflowError, KeyError, RuntimeError) as error:
        return type(error)
