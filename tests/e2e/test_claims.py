"""What the demo claims, one test a claim: the real processes, a real Consul, real connections."""

from __future__ import annotations

import signal
import time

from tests.e2e.conftest import Service
from tests.world import consul
from tests.world.lab import Lab
from tests.world.procs import until
from tests.world.traffic import failed, spread


def test_a_service_with_the_tag_gets_its_vip_and_all_its_backends_serve(service: Service) -> None:
    service.serve("b1", "b2", "b3")
    assert set(spread(service.requests(300))) == {"b1", "b2", "b3"}


def test_a_service_without_the_tag_gets_nothing(service: Service) -> None:
    service.register("b1", tags=("other",))
    assert service.here.edge.service(service.name) is None


def test_a_new_backend_takes_its_share_and_open_downloads_go_on(service: Service) -> None:
    service.serve("b1", "b2", "b3")
    service.settle()
    downloads = service.downloads(30)
    service.register("b4")
    service.until_serving("b1", "b2", "b3", "b4")
    assert 30 < spread(service.requests(300))["b4"] < 120
    assert not downloads.events("end")
    service.here.release()
    downloads.finish()
    assert not failed(downloads.events("end"))


def test_a_drained_backend_keeps_its_downloads_and_gets_nothing_new(service: Service) -> None:
    service.serve("b1", "b2")
    service.settle()
    downloads = service.downloads(20)
    answer = service.drain("b1", reason="maintenance window")
    assert answer["standing"] == "drained"
    assert answer["reason"] == "maintenance window"
    assert not answer["empty"]
    assert set(spread(service.requests(100))) == {"b2"}
    service.here.release()
    downloads.finish()
    assert not failed(downloads.events("end"))
    assert spread(downloads.events("end"))["b1"] > 0


def test_a_drain_answers_when_the_backend_is_empty_and_undrain_brings_it_back(service: Service) -> None:
    service.serve("b1", "b2")
    service.requests(50)
    assert service.drain("b1", wait_s=60)["empty"]
    service.undrain("b1")
    service.until_serving("b1", "b2")
    assert spread(service.requests(100))["b1"] > 0


def test_a_dead_server_costs_only_what_went_to_it_before_its_check_said_so(service: Service) -> None:
    service.serve("b1", "b2", "b3")
    steady = service.traffic("steady", rate=100)
    until(lambda: len(steady.events()) > 50, "traffic")
    killed_at = time.monotonic()
    service.here.backends["b2"].web.stop(signal.SIGKILL)
    service.until_serving("b1", "b3")
    gone_at = time.monotonic()
    assert set(spread(service.requests(100))) == {"b1", "b3"}
    steady.stop()
    assert [e for e in failed(steady.events()) if e.end < killed_at or e.start > gone_at] == []


def test_an_agent_killed_in_mid_traffic_costs_no_request_and_the_next_one_adopts(service: Service) -> None:
    service.serve("b1", "b2")
    downloads = service.downloads(10)
    steady = service.traffic("steady", rate=100)
    until(lambda: len(steady.events()) > 50, "traffic")
    edge = service.here.edge
    program = edge.status()["program"]
    edge.kill(signal.SIGKILL)
    service.requests(100)
    edge.start()
    status = edge.status()
    assert status["adopted"]
    assert status["program"] == program
    service.until_serving("b1", "b2")
    service.requests(100)
    steady.stop()
    service.here.release()
    downloads.finish()
    assert failed(steady.events()) == []
    assert failed(downloads.events("end")) == []


def test_a_drain_survives_a_restart_of_the_agent(service: Service) -> None:
    service.serve("b1", "b2")
    service.drain("b1", reason="new disk")
    service.here.edge.kill(signal.SIGTERM)
    assert set(spread(service.requests(50))) == {"b2"}
    service.here.edge.start()
    backend = service.backend("b1")
    assert (backend["standing"], backend["reason"], backend["slots"]) == ("drained", "new disk", 0)


def test_maintenance_in_consul_drains(service: Service) -> None:
    service.serve("b1", "b2")
    service.settle()
    downloads = service.downloads(10)
    agent = service.here.backends["b1"].consul
    agent.maintenance(f"{service.name}-b1", enable=True)
    service.until_serving("b2")
    assert service.backend("b1")["standing"] == "maintenance"
    assert set(spread(service.requests(50))) == {"b2"}
    agent.maintenance(f"{service.name}-b1", enable=False)
    service.until_serving("b1", "b2")
    service.here.release()
    downloads.finish()
    assert failed(downloads.events("end")) == []


def test_weights_follow_consul(service: Service) -> None:
    service.serve("b1", weight=1)
    service.serve("b1", "b2", weight=1)
    service.register("b2", weight=3)
    until(
        lambda: service.backend("b2")["slots"] > 2.9 * service.backend("b1")["slots"],
        "b2 to weigh three times as much",
    )


def test_consul_gone_changes_nothing_and_its_return_is_noticed(service: Service) -> None:
    service.serve("b1", "b2")
    edge = service.here.edge
    edge.consul.proc.stop(signal.SIGKILL)
    try:
        before = edge.status()
        until(lambda: edge.status()["consul_errors"] > before["consul_errors"] + 2, "the agent to notice")
        service.requests(100)
        service.until_serving("b1", "b2")
        assert edge.status()["consul_answer_at"] == before["consul_answer_at"]
        assert edge.status()["ready"]
    finally:
        consul.restart(service.here.procs, edge.consul)
        consul.until_joined(edge.consul, service.here.server)
    service.register("b3")
    service.until_serving("b1", "b2", "b3")


def test_an_upload_learns_the_smaller_mtu_of_the_tunnel(service: Service) -> None:
    """The client's full-size packets do not fit once encapsulated: ICMP tells it so, with the DF bit set."""
    service.serve("b1")
    uploads = service.traffic("upload", "/upload", count=3, bytes=1 << 20)
    uploads.finish()
    assert failed(uploads.events("end")) == []
    assert uploads.events("end")[-1].mtu == 1480


def test_detach_takes_all_away_and_a_start_brings_it_back(here: Lab, service: Service) -> None:
    service.serve("b1")
    assert here.edge.detach() == 0
    assert here.net.programs(here.edge.host) == set()
    assert list(here.net.pins(here.edge.host).glob("*")) == []
    here.edge.start()
    assert not here.edge.status()["adopted"]
    service.until_serving("b1")
    service.requests(50)
