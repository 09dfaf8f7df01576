"""Who gets in: those in the kernel first, a new VIP whole or not at all, and nobody disturbs anybody."""

from __future__ import annotations

from dataclasses import replace

from lbagent.core.admission import Claim, Verdict, admit
from lbagent.core.model import Live, Proto, RealState, Snapshot, Vip
from tests.catalog import EMPTY, applied
from tests.snapshots import backend, vip


def small(vips: int = 8, reals: int = 64, *live: Vip) -> Live:
    return applied(replace(EMPTY, capacity=replace(EMPTY.capacity, vips=vips, reals=reals)), Snapshot(live))


def verdicts(live: Live, *vips: Vip, gone: tuple[str, ...] = ()) -> dict[str, Verdict]:
    return admit([Claim(vip, vip.service not in gone) for vip in vips], live)


def served(found: dict[str, Verdict]) -> set[str]:
    return {name for name, verdict in found.items() if verdict.vip is not None}


API, WEB = vip("api", backend(1)), vip("web", backend(2))


def test_of_two_that_claim_one_key_the_one_that_has_it_keeps_it() -> None:
    assert served(verdicts(small(), API, WEB)) == {"api"}
    found = verdicts(small(8, 64, WEB), API, WEB)
    assert served(found) == {"web"}
    assert found["api"].problems == ("203.0.113.1:80/tcp is taken by service web",)


def test_who_only_lingers_makes_way() -> None:
    assert served(verdicts(small(8, 64, WEB), API, WEB, gone=("web",))) == {"api"}


def test_keys_that_nobody_else_claims_are_served() -> None:
    both = vip("web", backend(2), protos="both")
    found = verdicts(small(8, 64, API), API, both)
    assert found["web"].vip == replace(both, keys=both.keys[1:])
    assert both.keys[1].proto is Proto.UDP


def test_more_vips_than_fit() -> None:
    others = [vip(f"s{n}", backend(n), n=n) for n in range(2, 5)]
    live = small(2, 64, others[-1])
    found = verdicts(live, *others)
    assert served(found) == {"s2", "s4"}
    assert "hold no more VIPs" in found["s3"].problems[0]


def test_a_number_that_is_still_in_use_by_what_goes_away_is_not_free() -> None:
    live = replace(small(1, 64, WEB), vips={})
    assert served(verdicts(live, API)) == set()


def test_free_numbers_count_as_room() -> None:
    live = small(8, 2, WEB)
    free = {n: replace(real, state=RealState.FREE) for n, real in live.reals.items()}
    assert served(verdicts(replace(live, vips={}, rings={}, reals=free), API)) == {"api"}


def test_a_live_vip_moves_even_when_the_tables_are_full() -> None:
    moved = vip("web", backend(2), n=7)
    assert verdicts(small(1, 2, WEB), moved)["web"] == Verdict(moved)


def test_two_live_vips_that_swap_their_addresses_both_stay() -> None:
    api, web = vip("api", backend(1), n=1), vip("web", backend(2), n=2)
    live = small(2, 3, api, web)
    assert served(verdicts(live, replace(api, keys=web.keys), replace(web, keys=api.keys))) == {"api", "web"}


def test_a_new_vip_whose_reals_do_not_fit_waits_and_a_smaller_one_is_served() -> None:
    big, tiny = vip("big", *(backend(n) for n in range(1, 5))), vip("tiny", backend(9), n=2)
    found = verdicts(small(8, 4), big, tiny)
    assert served(found) == {"tiny"}
    assert "it needs 4 reals, the kernel's tables have 3 left" in found["big"].problems[0]


def test_a_live_vip_keeps_its_backends_and_gets_new_ones_that_fit() -> None:
    more = vip("web", *(backend(n) for n in range(1, 5)))
    found = verdicts(small(8, 4, WEB), more)["web"]
    assert found.vip is not None
    assert [str(b.address) for b in found.vip.backends] == ["10.77.0.1", "10.77.0.2", "10.77.0.3"]
    assert {str(a) for a in found.left_out} == {"10.77.0.4"}
    assert "no room for 1 backends" in found.problems[0]
