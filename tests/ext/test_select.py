"""Which form runs is decided by one variable, and a missing build is an error."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import creto_hotpath
from creto_hotpath import _select


def run(code: str, value: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: text for name, text in os.environ.items() if name != "CRETO_NO_EXTENSIONS"}
    if value is not None:
        environment["CRETO_NO_EXTENSIONS"] = value
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("value", "suffix"), [("1", "_py"), ("true", "_py")])
def test_the_variable_picks_the_twins(value: str, suffix: str) -> None:
    done = run("from creto_hotpath import QuotaTable, Journal; print(QuotaTable.__module__, Journal.__module__)", value)
    assert [name[-3:] for name in done.stdout.split()] == [suffix, suffix], done.stderr


@pytest.mark.skipif(not _select.extensions_wanted(), reason="CRETO_NO_EXTENSIONS=1: there may be no build")
@pytest.mark.parametrize("value", [None, "", "0"])
def test_compiled_is_the_rule(value: str | None) -> None:
    done = run("from creto_hotpath import QuotaTable, Journal; print(QuotaTable.__module__, Journal.__module__)", value)
    assert [name[-2:] for name in done.stdout.split()] == ["_c", "_c"], done.stderr


def test_a_missing_build_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CRETO_NO_EXTENSIONS", raising=False)
    with pytest.raises(ImportError, match=r"pip install \.") as caught:
        _select.select("missing")
    assert caught.value.name == "creto_hotpath._missing_c"
    assert "CRETO_NO_EXTENSIONS=1" in str(caught.value)


def test_another_modules_absence_is_not_mistaken_for_a_missing_build(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError("No module named 'msgpack'", name="msgpack")

    monkeypatch.delenv("CRETO_NO_EXTENSIONS", raising=False)
    monkeypatch.setattr(_select, "import_module", absent)
    with pytest.raises(ModuleNotFoundError, match="msgpack"):
        _select.select("journal")


@pytest.mark.parametrize("name", creto_hotpath.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(creto_hotpath, name) is not None
    assert name in dir(creto_hotpath)


def test_a_name_that_is_not_public_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        creto_hotpath.nothing  # noqa: B018
