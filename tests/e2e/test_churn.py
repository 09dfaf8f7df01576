"""No connection to a live backend breaks, whatever happens around it."""

from __future__ import annotations

import random

from tests.e2e.conftest import Service
from tests.world.traffic import failed

SEED = 20
CHANGES = 20
CONNECTIONS = 200


def test_200_connections_outlive_20_random_changes(service: Service) -> None:
    """Backends are added, drained, undrained and re-weighted while 200 downloads are open the whole time."""
    chance = random.Random(SEED)
    serving = {"b1": 1, "b2": 1}  # node -> weight
    drained: set[str] = set()
    spare = ["b3", "b4"]
    service.serve(*serving)
    service.settle()
    downloads = service.downloads(CONNECTIONS)

    for _ in range(CHANGES):
        active = sorted(serving.keys() - drained)
        kinds = ["weigh", *(["add"] if spare else []), *(["drain"] if len(active) > 1 else [])]
        match chance.choice([*kinds, *(["undrain"] if drained else [])]):
            case "add":
                node = spare.pop()
                serving[node] = 1
                service.register(node)
            case "drain":
                node = chance.choice(active)
                drained.add(node)
                service.drain(node)
            case "undrain":
                node = chance.choice(sorted(drained))
                drained.remove(node)
                service.undrain(node)
            case "weigh":
                node = chance.choice(sorted(serving))
                serving[node] = chance.choice([w for w in (1, 2, 5, 10) if w != serving[node]])
                service.register(node, weight=serving[node])
        service.until_weights(serving)
        service.until_serving(*serving.keys() - drained)
        assert downloads.events("end") == []

    service.here.release()
    downloads.finish()
    ended = downloads.events("end")
    assert len(ended) == CONNECTIONS
    assert failed(ended) == []
