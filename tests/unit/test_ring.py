"""A ring is fair, depends on the set of its members alone, and changes little when they do."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from ipaddress import IPv4Address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbagent.core import _ring, ring
from lbagent.core.ring import Member
from lbagent.errors import InconsistentSnapshot
from tests import reference

weights = st.one_of(st.integers(0, 4), st.integers(0, 100), st.sampled_from([1, 65535, 2**32 - 1]))
members = st.builds(Member, st.ip_addresses(v=4), st.integers(0, 65535), weights)
groups = st.lists(members, max_size=12, unique_by=lambda m: m[:2])
seeds = st.integers(0, 2**64 - 1)


def table(found: Sequence[Member], bits: int, seed: int) -> list[int]:
    return array("I", ring.build(found, bits, seed)).tolist()


def names(found: Sequence[Member], bits: int, seed: int) -> list[Member | None]:
    return [found[index - 1] if index else None for index in table(found, bits, seed)]


def many(count: int, weight: int = 1) -> list[Member]:
    return [Member(IPv4Address("10.0.0.0") + 7 * n, 80, weight) for n in range(count)]


# ---- the same as by hand ------------------------------------------------------------------------


@settings(deadline=None)
@given(groups, st.integers(4, 9), seeds)
def test_the_table_is_that_of_plain_probing(found: list[Member], bits: int, seed: int) -> None:
    assert table(found, bits, seed) == reference.build(found, bits, seed)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(33, 400),
    st.sampled_from([[1], [1, 2], [1, 5, 5, 9], [*range(1, 90)], [1, 1, 1, 4000]]),
    seeds,
)
def test_so_is_a_table_of_many_members(count: int, pattern: list[int], seed: int) -> None:
    rng = random.Random(seed)
    found = [m._replace(weight=rng.choice(pattern)) for m in many(count)]
    assert table(found, 11, seed) == reference.build(found, 11, seed)


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 6, 7, 18])
def test_so_are_the_smallest_and_the_biggest_table(bits: int) -> None:
    found = many(min(1 << bits, 3))
    assert table(found, bits, 7) == reference.build(found, bits, 7)
    full = many(1 << min(bits, 7))
    assert table(full, min(bits, 7), 7) == reference.build(full, min(bits, 7), 7)


@settings(deadline=None)
@given(st.lists(members.filter(lambda m: m.weight), min_size=1, max_size=8), st.integers(0, 3))
def test_members_of_one_key_are_told_apart_by_their_name(found: list[Member], keys: int) -> None:
    def key(member: Member, _: int) -> int:
        return (member.port & keys) * 0x9E3779B97F4A7C15 % 2**64

    built = _ring.build(
        array("Q", [key(m, 0) for m in found]),
        array("Q", [int(m.address) << 16 | m.port for m in found]),
        array("I", [m.weight for m in found]),
        6,
    )
    said = [found[index - 1] for index in reference.build(found, 6, 0, key)]
    assert [found[index - 1] for index in array("I", built)] == said


# ---- what it promises ---------------------------------------------------------------------------


@settings(deadline=None)
@given(st.data(), groups, st.integers(4, 8), seeds)
def test_only_the_set_of_members_counts(
    data: st.DataObject, found: list[Member], bits: int, seed: int
) -> None:
    shuffled = data.draw(st.permutations(found))
    assert names(found, bits, seed) == names(shuffled, bits, seed)


@settings(deadline=None)
@given(groups, st.integers(4, 12), seeds)
def test_every_share_is_within_one_slot_of_exact(found: list[Member], bits: int, seed: int) -> None:
    held = Counter(names(found, bits, seed))
    total = sum(member.weight for member in found)
    for member in found:
        exact = Fraction(member.weight << bits, max(total, 1))
        assert abs(held[member] - exact) < 1
    assert held[None] == (0 if total else 1 << bits)


def test_members_without_weight_take_no_slot_and_no_room() -> None:
    found = [*many(16), *(m._replace(port=81, weight=0) for m in many(50))]
    assert Counter(table(found, 4, 7)) == Counter(range(1, 17))


def test_more_members_than_slots_are_refused() -> None:
    with pytest.raises(InconsistentSnapshot, match="17 backends do not fit into a ring, which takes 16"):
        ring.build([*many(17), Member(IPv4Address("1.1.1.1"), 80, 0)], 4, 7)
    with pytest.raises(InconsistentSnapshot, match="65537 backends"):
        ring.build(many(1) * 65537, 18, 7)


def test_a_ring_takes_as_many_members_as_it_may() -> None:
    each = array("Q", range(ring.MEMBERS_MAX))
    built = _ring.build(each, each, array("I", [1] * ring.MEMBERS_MAX), 16)
    assert sorted(array("I", built)) == list(range(1, ring.MEMBERS_MAX + 1))


@pytest.mark.parametrize(
    ("backends", "bits"),
    [(0, 12), (40, 12), (41, 14), (163, 14), (164, 16), (655, 16), (656, 18), (5000, 18)],
)
def test_each_backend_gets_a_hundred_slots_while_a_ring_has_them(backends: int, bits: int) -> None:
    assert ring.ring_bits(backends) == bits


# ---- how little changes -------------------------------------------------------------------------


def moved(before: Sequence[Member], after: Sequence[Member], bits: int, seed: int) -> float:
    """The part of all slots, in %, that went from one address to another although both stayed."""
    stayed = {m.address for m in before} & {m.address for m in after}
    old, new = (
        [None, *(m.address if m.address in stayed else None for m in found)] for found in (before, after)
    )
    pairs = Counter(zip(table(before, bits, seed), table(after, bits, seed), strict=True))
    changed = sum(n for (a, b), n in pairs.items() if old[a] and new[b] and old[a] != new[b])
    return 100 * changed / (1 << bits)


@pytest.mark.parametrize(
    ("count", "bits", "most"), [(3, 12, 0.8), (10, 12, 2.0), (100, 14, 1.6), (100, 16, 0.75), (1000, 18, 0.6)]
)
def test_few_other_slots_move_when_a_member_goes(count: int, bits: int, most: float) -> None:
    found = many(count)
    gone = count // 3
    assert 0 < moved(found, found[:gone] + found[gone + 1 :], bits, 7) < most


@pytest.mark.parametrize("seed", range(3))
def test_few_other_slots_move_when_a_weight_changes(seed: int) -> None:
    rng = random.Random(seed)
    found = [m._replace(weight=rng.randint(1, 20)) for m in many(100)]
    heavier = [found[0]._replace(weight=found[0].weight * 2), *found[1:]]
    lightest_gone = sorted(found, key=lambda m: m.weight)[1:]
    heaviest_gone = sorted(found, key=lambda m: m.weight)[:-1]
    for other in (heavier, lightest_gone, heaviest_gone):
        assert moved(found, other, 16, seed) < 2.5


@pytest.mark.parametrize("seed", range(3))
def test_common_factors_of_weights_make_no_difference(seed: int) -> None:
    found = [m._replace(weight=1 + n % 5) for n, m in enumerate(many(40))]
    tenfold = [m._replace(weight=m.weight * 10) for m in found]
    assert table(found, 12, seed) == table(tenfold, 12, seed)


# ---- digest -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.data(), groups, seeds)
def test_nodes_with_the_same_ring_say_the_same(data: st.DataObject, found: list[Member], seed: int) -> None:
    said = ring.digest(found, 6, seed)
    idle = [m for m in found if m.weight == 0]
    assert ring.digest(data.draw(st.permutations([m for m in found if m not in idle])), 6, seed) == said
    assert len(said) == 16
    assert int(said, 16) >= 0


def test_nodes_with_other_rings_do_not() -> None:
    found = many(5)
    others = [
        ring.digest(found, 12, 1),
        ring.digest(found, 14, 1),
        ring.digest(found, 12, 2),
        ring.digest(found[1:], 12, 1),
        ring.digest([*found[1:], found[0]._replace(weight=2)], 12, 1),
        ring.digest([*found[1:], found[0]._replace(port=81)], 12, 1),
    ]
    assert len(set(others)) == len(others)


def test_a_digest_stays_the_same_over_versions() -> None:
    """Nodes of two versions compare digests, and a new table would move connections on every upgrade."""
    found = [m._replace(weight=1 + n % 3) for n, m in enumerate(many(50))]
    assert ring.digest(found, 14, 0x5EED) == "9578f30d4e6ed09d"
