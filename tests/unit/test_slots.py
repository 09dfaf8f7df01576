"""Slots by the rules of two generations: the compiled loops against tests/reference.py, and bad input."""

from __future__ import annotations

import contextlib
import struct
from array import array
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbagent.core import _ring, slots
from tests import reference
from tests.reference import CHANGED, ENDING, UDP, Record, Slot, quiet, unpack

calm = settings(deadline=None)

BITS = 4
SETTLE_S = 50
REALS = [0, 1, 2, 3, 4, 2**20 - 1]
TIMES = [0, 1, 2, 3, CHANGED - 2, CHANGED - 1, CHANGED, 1 << 22]


def decode(three: bytes) -> Slot:
    """Bytes are what hypothesis draws fastest."""
    owner, elder = REALS[three[0] % len(REALS)], REALS[three[1] % len(REALS)]
    if three[2] & 1:
        return Slot(owner, elder, TIMES[three[2] >> 3 & 7], bool(three[2] & 6))
    return quiet(owner)


reals = st.sampled_from(REALS)
rings = st.binary(min_size=3 << BITS, max_size=3 << BITS).map(
    lambda drawn: reference.pack(decode(drawn[i : i + 3]) for i in range(0, len(drawn), 3))
)
tables = st.binary(min_size=1 << BITS, max_size=1 << BITS).map(
    lambda drawn: [REALS[n % len(REALS)] for n in drawn]
)
numbers = st.sets(st.integers(0, (1 << BITS) - 1), max_size=4)
seconds = st.integers(0, 8).flatmap(lambda s: st.sampled_from([s, s + 2**23, s + 2**40, s + 2**22]))


def words(owners: list[int]) -> bytes:
    return array("I", owners).tobytes()


# ---- owners -------------------------------------------------------------------------------------


@calm
@given(st.lists(st.integers(0, 6)), st.lists(reals, min_size=6, max_size=6))
def test_a_table_of_members_becomes_one_of_reals(table: list[int], named: list[int]) -> None:
    found = array("I", slots.renumber(words(table), named))
    assert found.tolist() == [named[index - 1] if index else 0 for index in table]


@calm
@given(st.lists(reals))
def test_a_fresh_ring_tracks_nothing(owners: list[int]) -> None:
    assert unpack(slots.fresh(words(owners))) == [quiet(owner) for owner in owners]


@calm
@given(rings, tables, st.sets(reals), seconds)
def test_new_owners_succeed_by_the_rules(old: bytes, owners: list[int], dead: set[int], now_s: int) -> None:
    assert slots.succeed(old, words(owners), dead, now_s) == reference.succeed(old, owners, dead, now_s)


def test_the_first_change_makes_the_owner_the_elder() -> None:
    assert after(quiet(1), 2) == Slot(2, 1, 7, True)


def test_the_next_change_keeps_the_elder_and_counts_anew() -> None:
    assert after(Slot(2, 1, 3, True), 5) == Slot(5, 1, 7, True)
    assert after(Slot(2, 1, 3, True), 1) == Slot(1, 1, 7, True)


def test_no_change_changes_nothing() -> None:
    assert after(Slot(2, 1, 3, True), 2) == Slot(2, 1, 3, True)
    assert after(quiet(2), 2, dead={2}) == quiet(2)


def test_connections_of_the_dead_need_no_tracking() -> None:
    assert after(quiet(1), 2, dead={1}) == quiet(2)


def test_a_slot_without_owner_has_no_connections_to_track() -> None:
    assert after(quiet(0), 2) == quiet(2)


def test_a_slot_that_becomes_nobodys_still_serves_its_connections() -> None:
    assert after(quiet(1), 0) == Slot(0, 1, 7, True)
    assert after(quiet(1), 0, dead={1}) == quiet(0)


def after(slot: Slot, owner: int, dead: set[int] | None = None) -> Slot:
    return unpack(slots.succeed(reference.pack([slot]), words([owner]), dead or set(), 7 + 2**23))[0]


# ---- sizes --------------------------------------------------------------------------------------


@calm
@given(rings, st.integers(0, BITS + 3))
def test_sizes_nest(ring: bytes, new_bits: int) -> None:
    assert slots.resize(ring, BITS, new_bits) == reference.resize(ring, BITS, new_bits)


@calm
@given(rings, st.integers(0, 3))
def test_a_ring_that_grew_can_shrink_again(ring: bytes, by: int) -> None:
    grown = slots.resize(ring, BITS, BITS + by)
    assert grown is not None
    assert slots.resize(grown, BITS + by, BITS) == ring


@calm
@given(rings, tables, st.integers(0, 3))
def test_a_stretched_ring_shrinks_once_it_has_settled(ring: bytes, owners: list[int], by: int) -> None:
    """A big ring takes over the owners of a small one: what then settles is the small ring."""
    big = slots.resize(ring, BITS, BITS + by)
    assert big is not None
    stretched = slots.stretch(words(owners), BITS, BITS + by)
    taken_over = slots.succeed(big, stretched, set(), 1000)
    everywhere = slots.settle(taken_over, range(1 << BITS + by))
    assert slots.resize(everywhere, BITS + by, BITS) == slots.fresh(words(owners))


# ---- the end of tracking ------------------------------------------------------------------------


@calm
@given(rings, numbers, st.sampled_from([0, 1, 2, 3, 5, 2**22, 2**24]), seconds)
def test_slots_settle_by_the_rules(ring: bytes, exceptions: set[int], settle_s: int, now_s: int) -> None:
    found = slots.settled(ring, exceptions, settle_s, now_s)
    assert found == reference.settled(ring, exceptions, settle_s, now_s)
    assert slots.settle(ring, found) == reference.settle(ring, found)


@pytest.mark.parametrize(
    ("changed_s", "now_s", "is_over"),
    [
        (100, 150, False),
        (100, 151, True),
        (CHANGED, CHANGED + 50, False),
        (CHANGED, CHANGED + 51, True),
        (5, 5, False),
    ],
)
def test_a_slot_settles_after_the_settle_time_even_where_seconds_wrap(
    changed_s: int, now_s: int, is_over: bool
) -> None:
    ring = slots.succeed(slots.fresh(words([1])), words([2]), set(), changed_s)
    assert slots.settled(ring, set(), SETTLE_S, now_s) == ([0] if is_over else [])
    assert slots.settled(ring, [0], SETTLE_S, now_s) == []


@calm
@given(rings)
def test_a_census_counts_owners_and_elders_of_tracked_slots(ring: bytes) -> None:
    assert slots.census(ring) == reference.census(ring)


# ---- flow records -------------------------------------------------------------------------------

NOW_NS = 1_000 * 10**9
AGES_NS = [s * 10**9 + ns for s in (0, 5, 10, 30, 50) for ns in (-1, 0, 1)]


def record_of(eight: bytes) -> Record:
    return Record(
        NOW_NS - AGES_NS[eight[0] % len(AGES_NS)],
        [1, 2, 1, 2, 0, 3, 9, 2**32 - 1][eight[1] % 8],
        int.from_bytes(eight[2:4], "big") << 16,
        [1, 1, 1, 0, 5, 2**32 - 1][eight[4] % 6],
        [0, 0, 0, 2**16 - 1][eight[5] % 4],
        eight[6] if eight[6] < 3 else 0,
        UDP if eight[7] % 3 == 0 else 6,
    )


records = st.binary(min_size=8 * 20, max_size=8 * 20).map(
    lambda drawn: [record_of(drawn[i : i + 8]) for i in range(0, len(drawn) & ~7, 8)]
)
served = st.binary(min_size=6, max_size=6).map(
    lambda drawn: {
        number: (0 if byte & 28 == 28 else 1, 2**16 - 1 if byte & 3 == 3 else 0, byte & 224 != 224)
        for number, byte in enumerate(drawn)
        if byte != 255
    }
)


def judge(found: list[Record], *args: Any) -> slots.Judgement:
    keys = b"".join(record.key(index) for index, record in enumerate(found))
    return slots.judge(keys, b"".join(record.value for record in found), len(found), *args)


@calm
@given(records, rings, rings, served, st.sampled_from([SETTLE_S, 5]))
def test_records_are_judged_by_the_rules(
    found: list[Record],
    ring: bytes,
    other: bytes,
    known: dict[int, tuple[int, int, bool]],
    settle_s: int,
) -> None:
    vips = {1: (BITS, ring, settle_s), 0: (BITS - 1, other[: 4 << BITS], SETTLE_S)}
    verdict = judge(found, vips, known, NOW_NS, 10, 30)
    said = (verdict.forget, verdict.live, verdict.exceptions)
    assert said == reference.judge(found, vips, known, NOW_NS, 10, 30)


CHANGED_HANDS = Slot(2, 1, 0, True)  # from real 1 to real 2


def verdict_on(
    proto: int = 6, age_s: float = 0, flags: int = 0, slot: Slot = CHANGED_HANDS
) -> tuple[bool, bool]:
    """(whether a record that names real 1 lives on, whether it keeps its slot from settling)"""
    record = Record(NOW_NS - int(age_s * 10**9), 1, 0x12345678, 0, 0, flags, proto)
    ring = reference.pack([slot, slot])
    verdict = judge([record], {0: (1, ring, SETTLE_S)}, {1: (0, 0, True)}, NOW_NS)
    assert verdict.forget == ([] if verdict.live else [0])
    return verdict.live == {1: 1}, verdict.exceptions == {0: [0]}


def test_a_live_record_keeps_its_slot_from_settling_unless_it_agrees_with_the_owner() -> None:
    assert verdict_on() == (True, True)
    assert verdict_on(slot=Slot(1, 2, 0, True)) == (True, False)


def test_a_record_is_forgotten_after_silence() -> None:
    assert verdict_on(age_s=SETTLE_S) == (True, True)
    assert verdict_on(age_s=SETTLE_S + 0.001) == (False, False)


def test_a_connection_that_ended_is_soon_forgotten() -> None:
    assert verdict_on(age_s=10, flags=1) == (True, True)
    assert verdict_on(age_s=10.001, flags=1) == (False, False)


def test_an_end_that_was_seen_never_prolongs() -> None:
    record = Record(NOW_NS - 6 * 10**9, 1, 0, 0, 0, ENDING, 6)
    ring = reference.pack([CHANGED_HANDS, CHANGED_HANDS])
    assert judge([record], {0: (1, ring, 5)}, {1: (0, 0, True)}, NOW_NS).forget == [0]


def test_a_record_of_an_untracked_slot_is_not_needed() -> None:
    assert verdict_on(slot=quiet(2)) == (False, False)


@pytest.mark.parametrize(
    ("vip", "generation", "serves"),
    [(0, 0, False), (0, 1, True), (7, 0, True)],
    ids=["dead", "newer", "of another VIP"],
)
def test_a_record_of_a_real_that_is_not_the_same_any_more_is_forgotten(
    vip: int, generation: int, serves: bool
) -> None:
    ring = reference.pack([CHANGED_HANDS, CHANGED_HANDS])
    record = Record(NOW_NS, 1, 0, 0, 0, 0, 6)
    assert judge([record], {0: (1, ring, SETTLE_S)}, {1: (0, 0, True)}, NOW_NS).live == {1: 1}
    assert judge([record], {0: (1, ring, SETTLE_S)}, {1: (vip, generation, serves)}, NOW_NS).forget == [0]


def test_udp_needs_its_record_in_any_slot_and_no_slot_for_it() -> None:
    assert verdict_on(UDP, slot=quiet(2)) == (True, False)
    assert verdict_on(UDP) == (True, False)
    assert verdict_on(UDP, age_s=30.001) == (False, False)


def test_a_record_from_after_now_is_not_silent() -> None:
    assert verdict_on(age_s=-0.5) == (True, True)


# ---- bad input ----------------------------------------------------------------------------------

ODD = [b"x" * size for size in (1, 3, 7, 9, 12)]


@pytest.mark.parametrize("odd", ODD)
def test_what_is_not_a_ring_is_refused(odd: bytes) -> None:
    good = slots.fresh(words([1, 2]))
    with pytest.raises(ValueError, match="fit together"):
        slots.succeed(odd, words([1, 2]), set(), 0)
    with pytest.raises(ValueError, match="fit together"):
        slots.succeed(good, odd, set(), 0)
    for call in (
        lambda: slots.settled(odd, set(), 1, 1),
        lambda: slots.settle(odd, []),
        lambda: slots.census(odd),
        lambda: slots.resize(odd, 0, 1),
        lambda: slots.stretch(odd, 0, 1),
    ):
        with pytest.raises(ValueError, match="not"):
            call()
    with pytest.raises(ValueError, match="fit together"):
        slots.judge(odd, bytes(24), 1, {}, {}, 0)
    with pytest.raises(ValueError, match="fit together"):
        slots.judge(bytes(40), odd, 1, {}, {}, 0)


def test_what_is_not_a_number_of_a_slot_or_real_is_refused() -> None:
    good = slots.fresh(words([1, 2]))
    for number in (2, -1, 2**70):
        with pytest.raises(ValueError, match="slot"):
            slots.settle(good, [number])
        with pytest.raises(ValueError, match="slot"):
            slots.settled(good, [number], 1, 1)
    for number in (2**20, -1):
        with pytest.raises(ValueError, match="real"):
            slots.succeed(good, words([1, 2]), {number}, 1)
    with pytest.raises(ValueError, match="owner"):
        slots.fresh(words([2**20]))
    with pytest.raises(ValueError, match="owner"):
        slots.succeed(good, words([1, 2**20]), set(), 1)
    with pytest.raises(ValueError, match="member"):
        slots.renumber(words([2]), [1])
    with pytest.raises(ValueError, match="out of range"):
        slots.judge(b"", b"", 0, {2**20: (1, bytes(16), 1)}, {}, 0)
    with pytest.raises(ValueError, match="out of range"):
        slots.judge(b"", b"", 0, {}, {-1: (1, 1, True)}, 0)


def test_a_vip_whose_slots_are_not_its_size_is_refused() -> None:
    with pytest.raises(ValueError, match="slots and bits"):
        slots.judge(b"", b"", 0, {0: (2, bytes(16), 1)}, {}, 0)


def test_an_error_in_what_gives_the_numbers_comes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        slots.settle(slots.fresh(words([1, 2])), (1 // n for n in (1, 0)))


junk: st.SearchStrategy[Any] = st.one_of(
    st.binary(max_size=100),
    st.integers(-2, 70),
    st.integers(-(2**66), 2**66),
    st.lists(st.one_of(st.integers(-2, 70), st.none()), max_size=3),
    st.dictionaries(
        st.one_of(st.integers(-2, 9), st.none()),
        st.one_of(st.none(), st.tuples(st.integers(-1, 5), st.binary(max_size=80), st.integers(-1, 5))),
        max_size=2,
    ),
)
FUNCTIONS = [getattr(_ring, name) for name in dir(_ring) if not name.startswith("_")]
ARGUMENTS = {
    "build": 4,
    "renumber": 2,
    "fresh": 1,
    "heads": 1,
    "succeed": 4,
    "repeat": 3,
    "thin": 2,
    "settled": 4,
    "settle": 2,
}
ARGUMENTS |= {"census": 1, "judge": 8}


@settings(deadline=None, max_examples=300)
@given(st.data(), st.sampled_from(FUNCTIONS))
def test_no_input_is_worse_than_an_exception(data: st.DataObject, function: Any) -> None:
    arguments = data.draw(st.tuples(*[junk] * ARGUMENTS[function.__name__]))
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        function(*arguments)


@calm
@given(
    *[st.binary(max_size=200)] * 2,
    st.binary(max_size=100),
    st.integers(0, 19),
)
def test_nor_is_any_ring(keys: bytes, ids: bytes, heavy: bytes, bits: int) -> None:
    size = min(len(keys) // 8, len(ids) // 8, len(heavy) // 4)
    try:
        built = _ring.build(keys[: size * 8], ids[: size * 8], heavy[: size * 4], bits)
    except ValueError:
        assert not 1 <= bits <= 18 or size > 1 << bits
    else:
        assert len(built) == 4 << bits
        named = {index for (index,) in struct.iter_unpack("<I", built)}
        assert max(named) <= size


def test_buffers_may_start_anywhere() -> None:
    ring = slots.fresh(words([1, 2, 3, 4]))
    shifted = memoryview(b"x" + ring)[1:]
    assert _ring.settle(shifted, [1]) == ring
    assert _ring.census(shifted) == ({1: 1, 2: 1, 3: 1, 4: 1}, {})


def test_a_head_tells_owner_and_tracking_and_nothing_else() -> None:
    words = [5, 5 | 9 << 20, 5 | 9 << 20 | 77 << 40 | 1 << 63, 0, (1 << 20) - 1 | 1 << 63]
    found = array("I", slots.heads(array("Q", words).tobytes())).tolist()
    assert found == [5, 5, 5 | 1 << 31, 0, (1 << 20) - 1 | 1 << 31]
    with pytest.raises(ValueError, match="64-bit"):
        slots.heads(bytes(12))
