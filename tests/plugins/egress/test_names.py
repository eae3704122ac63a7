"""Spelling and matching of host names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from creto_egress.names import BadName, NameTable, normalise, pattern_labels

LABEL = st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True)
NAME = st.lists(LABEL, min_size=1, max_size=5).map(".".join)


def table(*patterns: str) -> NameTable[str]:
    return NameTable((pattern, pattern) for pattern in patterns)


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ("API.Allowed.TEST", "api.allowed.test"),
        ("api.allowed.test.", "api.allowed.test"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("a_b.example", "a_b.example"),
        ("3com.example", "3com.example"),
    ],
)
def test_spellings_of_one_name_are_one(written: str, normal: str) -> None:
    assert normalise(written) == normal


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "a..b",
        "a.test..",
        "-a.test",
        "a-.test",
        "a" * 64 + ".test",
        ".".join(["abcdefghi"] * 26),
        "a b.test",
        "a\0.test",
        "user@evil.test",
        "a.test/x",
        "a%2eb.test",
        "[::1]",
        "bücher.example",
        "\u212aelvin.test",
        "аpi.allowed.test",  # Cyrillic a
        "xn--a-0.test",
        "xn--99999999.test",
        "xn--dca.test",  # upper-case E with acute
        "xn--abc.test",  # control characters
        "xn--e-xbb.test",  # e and a combining accent
        "xn--.test",
        "xn---.test",
        "2852039166",
        "0xa9fea9fe",
        "0251.0376.0251.0376",
        "169.254.169.254",
        "a.0x",
        "*.test",
    ],
)
def test_what_another_program_could_read_differently_is_no_name(name: str) -> None:
    with pytest.raises(BadName):
        normalise(name)


@pytest.mark.parametrize(
    ("name", "matches"),
    [
        ("a.wild.test", True),
        ("xn--bcher-kva.wild.test", True),
        ("wild.test", False),
        ("a.b.wild.test", False),
        ("evilwild.test", False),
        ("a.wild.test.evil.test", False),
    ],
)
def test_wildcard_is_exactly_one_more_label(name: str, matches: bool) -> None:
    assert list(table("*.wild.test").matching(name)) == (["*.wild.test"] if matches else [])


def test_exact_patterns_come_before_wildcards() -> None:
    assert list(table("*.x.test", "a.x.test").matching("a.x.test")) == ["a.x.test", "*.x.test"]


@pytest.mark.parametrize(
    ("name", "covered"), [("a.evil.test", True), ("a.b.evil.test", True), ("evil.test", False), ("xevil.test", False)]
)
def test_denied_wildcard_covers_every_depth(name: str, covered: bool) -> None:
    assert bool(list(table("*.evil.test").covering(name))) is covered


@pytest.mark.parametrize("pattern", ["*", "a.*.test", "*a.test", "**.test", "*.", "*.*.test"])
def test_other_wildcards_are_refused(pattern: str) -> None:
    with pytest.raises(BadName):
        pattern_labels(pattern)


@given(NAME)
def test_normalising_twice_changes_nothing(name: str) -> None:
    assert normalise(normalise(name.upper() + ".")) == normalise(name)


@given(st.text(max_size=40))
def test_any_text_is_a_name_or_refused(text: str) -> None:
    try:
        name = normalise(text)
    except BadName:
        return
    assert name.isascii() and name == name.lower() and not name.endswith(".")
    assert normalise(name) == name


@given(st.lists(st.tuples(st.booleans(), NAME), max_size=8), NAME)
def test_table_agrees_with_comparing_one_by_one(patterns: list[tuple[bool, str]], name: str) -> None:
    written = [("*." if wild else "") + base for wild, base in patterns]
    one_by_one = [p for p in written if (p[2:] == name.partition(".")[2] if p.startswith("*.") else p == name)]
    assert sorted(table(*written).matching(name)) == sorted(one_by_one)
    below = [p for p in written if (name.endswith(p[1:]) if p.startswith("*.") else p == name)]
    assert sorted(table(*written).covering(name)) == sorted(below)
