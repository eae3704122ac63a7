"""Every parser against its corpus and against messages that are almost right. ``make fuzz`` goes further."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from .mutations import mutated
from .targets import CORPUS, TARGETS, Target

EXAMPLES = int(os.environ.get("CRETO_FUZZ_EXAMPLES", "60"))
each_target = pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))


def test_every_corpus_folder_has_a_target() -> None:
    assert {path.name for path in CORPUS.iterdir()} == TARGETS.keys()


@pytest.mark.skipif("CRETO_SANITIZED" not in os.environ, reason="for `make sanitize`")
def test_the_sanitized_modules_are_those_that_run() -> None:
    from creto_hotpath import _http1_c

    assert Path(_http1_c.__file__).is_relative_to(Path(os.environ["CRETO_SANITIZED"]).resolve())


def corpus() -> list[str]:
    return sorted(f"{path.parent.name}/{path.name}" for path in CORPUS.glob("*/*"))


@pytest.mark.parametrize("name", corpus())
def test_corpus_keeps_the_invariant(name: str) -> None:
    target = TARGETS[name.partition("/")[0]]
    target.check((CORPUS / name).read_bytes())


@each_target
def test_mutated_corpus_keeps_the_invariant(target: Target) -> None:
    """Derandomised: the same examples each time, so a failure here belongs to the change at hand."""
    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(mutated(target))
    def check(data: bytes) -> None:
        target.check(data)

    check()
