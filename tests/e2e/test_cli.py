"""The commands that an operator types, against a running agent."""

from __future__ import annotations

import json

from tests.e2e.conftest import Service
from tests.world.lab import Lab
from tests.world.traffic import spread

SYSCTLS = ("ipv4/conf/all/arp_ignore", "ipv4/conf/all/arp_announce", "ipv4/conf/all/rp_filter")


def socket(here: Lab) -> str:
    return f"--socket={here.edge.api.where}"


def test_check_finds_nothing_wrong_with_this_world(here: Lab) -> None:
    code, said = here.lbagent(here.edge.host, "check", f"--config={here.edge.config}")
    assert code == 0, said


def test_check_and_run_name_an_interface_that_is_missing(here: Lab) -> None:
    config = here.procs.folder / "missing.toml"
    other = here.edge.config.read_text().replace('"eth0"', '"eth7"').replace('/edge"', '/other"')
    config.write_text(other)
    for command in ("check", "run"):
        code, said = here.lbagent(here.edge.host, command, f"--config={config}")
        assert code == 1
        assert "eth7" in said


def test_status_shows_the_service(service: Service) -> None:
    service.serve("b1")
    code, said = service.here.lbagent(service.here.edge.host, "status", "--json", socket(service.here))
    assert code == 0
    found = {status["name"]: status for status in json.loads(said)["services"]}
    assert found[service.name]["serving"]


def test_drain_waits_until_empty_and_undrain_takes_it_back(service: Service) -> None:
    service.serve("b1", "b2")
    edge, name = service.here.edge.host, f"b1/{service.name}-b1"
    code, said = service.here.lbagent(edge, "drain", service.name, name, "--wait=60s", socket(service.here))
    assert code == 0, said
    assert set(spread(service.requests(30))) == {"b2"}
    code, said = service.here.lbagent(edge, "undrain", service.name, name, socket(service.here))
    assert code == 0, said
    service.until_serving("b1", "b2")


def test_backend_undo_takes_back_all_that_it_changed(here: Lab, service: Service) -> None:
    before = {key: here.client.sysctl(key) for key in SYSCTLS}  # a host that nobody changed
    service.serve("b4")
    backend = here.backends["b4"]
    assert {key: backend.host.sysctl(key) for key in SYSCTLS} != before
    backend.helper.stop()
    assert backend.has(service.vip), "stopping the helper leaves the node serving"
    service.requests(30)
    code, said = here.lbagent(backend.host, "backend", "--undo", f"--config={backend.config}")
    assert code == 0, said
    assert not backend.has(service.vip)
    assert {key: backend.host.sysctl(key) for key in SYSCTLS} == before
    assert here.net.programs(backend.host) == set()
    assert list(here.net.pins(backend.host).glob("*")) == []
    backend.helper = here.start_helper(backend.host, backend.config)
    here.until_serving(service.name, "b4")
