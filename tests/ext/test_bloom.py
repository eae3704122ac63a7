"""The bloom filter: never a wrong no, rarely a wrong yes, the same bits in both forms."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .conftest import Form

keys = st.binary(min_size=16, max_size=16)


def some_keys(count: int, seed: int) -> list[bytes]:
    source = random.Random(seed)
    return [source.randbytes(16) for _ in range(count)]


def test_an_empty_filter_contains_nothing(form: Form) -> None:
    bloom = form("bloom").Bloom(100)
    assert not any(bloom.may_contain(key) for key in some_keys(200, 1))


def test_what_was_added_is_always_found(form: Form) -> None:
    bloom = form("bloom").Bloom(500)
    added = some_keys(5000, 2)  # ten times what it is sized for: a no must stay exact
    for key in added:
        bloom.add(key)
    assert all(bloom.may_contain(key) for key in added)


def test_wrong_yeses_stay_below_half_a_percent_at_16_bits_per_key(form: Form) -> None:
    bloom = form("bloom").Bloom(2048)
    for key in some_keys(2048, 3):
        bloom.add(key)
    wrong = sum(bloom.may_contain(key) for key in some_keys(10_000, 4))
    assert wrong < 50


@pytest.mark.parametrize(
    ("capacity", "bits", "size"), [(1, 1, 64), (32, 16, 64), (33, 16, 128), (65536, 16, 131072), (1000, 32, 4096)]
)
def test_memory_is_a_power_of_two_of_cache_lines(form: Form, capacity: int, bits: int, size: int) -> None:
    assert form("bloom").Bloom(capacity, bits).size_bytes == size


@pytest.mark.parametrize(("capacity", "bits"), [(0, 16), (-1, 16), (10, 0)])
def test_a_filter_for_nothing_is_refused(form: Form, capacity: int, bits: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        form("bloom").Bloom(capacity, bits)


def test_keys_are_16_bytes(form: Form) -> None:
    bloom = form("bloom").Bloom(10)
    for use in (bloom.add, bloom.may_contain):
        with pytest.raises(ValueError, match="16 bytes"):
            use(bytes(15))
        with pytest.raises(TypeError):
            use("sixteen letters!")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(added=st.lists(keys, max_size=60), asked=st.lists(keys, max_size=60), capacity=st.integers(1, 40))
def test_both_forms_say_yes_to_the_same_keys(
    both: tuple[Form, Form], added: list[bytes], asked: list[bytes], capacity: int
) -> None:
    one, other = (form("bloom").Bloom(capacity, 4) for form in both)
    for key in added:
        one.add(key)
        other.add(key)
    for key in added + asked:
        assert one.may_contain(key) == other.may_contain(key)
