"""Messages that are almost right: the corpus, changed in a few places with words of its own language."""

from __future__ import annotations

from hypothesis import strategies as st

from .targets import Target

# Longer messages cost time and show nothing new; limits have tests of their own.
MOST_BYTES = 4096


def mutated(target: Target) -> st.SearchStrategy[bytes]:
    """A seed of ``target`` after up to six edits, or now and then only words or only noise."""
    seeds = [seed for seed in target.seeds() if len(seed) <= MOST_BYTES] or target.seeds()
    words = st.one_of(st.sampled_from(target.pieces), st.binary(min_size=1, max_size=4))

    @st.composite
    def edited(draw: st.DrawFn) -> bytes:
        data = draw(st.sampled_from(seeds))
        for _ in range(draw(st.integers(0, 6))):
            at = draw(st.integers(0, len(data)))
            kind = draw(st.sampled_from(("insert", "replace", "delete", "repeat", "swap", "join")))
            size = draw(st.integers(1, 24))
            span = data[at : at + size]
            if kind == "insert":
                data = data[:at] + draw(words) + data[at:]
            elif kind == "replace":
                word = draw(words)
                data = data[:at] + word + data[at + len(word) :]
            elif kind == "delete":
                data = data[:at] + data[at + size :]
            elif kind == "repeat":
                data = data[:at] + span + data[at:]
            elif kind == "swap":
                data = data[:at] + span.swapcase() + data[at + size :]
            else:
                other = draw(st.sampled_from(seeds))
                data = data[:at] + other[draw(st.integers(0, len(other))) :]
        return data[: max(MOST_BYTES, len(seeds[0]))]

    noise = st.one_of(st.lists(words, max_size=24).map(b"".join), st.binary(max_size=200))
    return st.one_of(edited(), edited(), edited(), noise)
