"""The process on the edge: reading its configuration again, upgrading its program, stopping."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.conftest import Service
from tests.world.lab import LBAGENT, Lab
from tests.world.net import ip
from tests.world.procs import until
from tests.world.traffic import failed


@pytest.fixture
def configured(here: Lab) -> Iterator[Lab]:
    """The configuration may be changed: it is put back, and read again."""
    before = here.edge.config.read_text()
    try:
        yield here
    finally:
        here.edge.config.write_text(before)
        reload(here)
        until(here.edge.is_ready, "the agent to be ready")


def reload(here: Lab) -> None:
    assert here.edge.agent is not None
    here.edge.agent.popen.send_signal(signal.SIGHUP)


def change(here: Lab, section: str, line: str) -> None:
    text = here.edge.config.read_text()
    assert f"[{section}]\n" in text
    here.edge.config.write_text(text.replace(f"[{section}]\n", f"[{section}]\n{line}\n"))


def status(here: Lab) -> Any:
    """None while the API is between two runs."""
    try:
        return here.edge.status()
    except OSError:
        return None


def log(here: Lab) -> str:
    assert here.edge.agent is not None
    return here.edge.agent.log.read_text() + here.edge.agent.out.read_text()


def test_sighup_reads_the_configuration_again(configured: Lab, service: Service) -> None:
    service.serve("b1", "b2")
    before = configured.edge.status()
    steady = service.traffic("steady", rate=50)
    until(lambda: len(steady.events()) > 20, "traffic")
    configured.edge.config.write_text(configured.edge.config.read_text() + '\n[timing]\nlinger = "1s"\n')
    reload(configured)
    until(lambda: (now := status(configured)) and now["started_at"] > before["started_at"], "a new run")
    until(configured.edge.is_ready, "the agent to be ready")
    after = configured.edge.status()
    assert after["adopted"]
    assert after["program"] == before["program"]
    steady.stop()
    assert not failed(steady.events())


def test_a_configuration_that_makes_no_sense_is_told_and_the_one_before_stays(
    configured: Lab, service: Service
) -> None:
    service.serve("b1")
    change(configured, "edge", 'interface = "eth0"')
    reload(configured)
    until(lambda: "configuration_refused" in log(configured), "the refusal in the log")
    assert "edge.interface" in log(configured)
    until(configured.edge.is_ready, "the agent to be ready")
    service.requests(50)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('["eth0"]', '["eth0", "nope0"]', "nope0"),
        ("[admin]\n", '[admin]\naddress = "127.0.0.1:9600"\ntoken_file = "/nonexistent"\n', "/nonexistent"),
    ],
)
def test_a_configuration_that_cannot_be_served_is_told_and_the_one_before_serves_again(
    configured: Lab, service: Service, old: str, new: str, told: str
) -> None:
    service.serve("b1", "b2")
    before = configured.edge.config.read_text()
    assert old in before
    configured.edge.config.write_text(before.replace(old, new))
    reload(configured)
    until(lambda: told in log(configured), "the refusal in the log")
    until(configured.edge.is_ready, "the agent to be ready")
    service.requests(50)


def test_another_program_takes_over_without_a_lost_request(configured: Lab, service: Service) -> None:
    """Other outer addresses make another program: it is built beside the one that runs, and replaces it."""
    service.serve("b1", "b2", "b3")
    before = configured.edge.status()["program"]
    downloads = service.downloads(20)
    steady = service.traffic("steady", rate=50)
    until(lambda: len(steady.events()) > 20, "traffic")
    change(configured, "edge", 'encap_source = "10.254.0.0/16"')
    reload(configured)
    until(
        lambda: (now := status(configured)) and now["ready"] and now["program"] != before, "the new program"
    )
    assert len([path for path in configured.net.pins(configured.edge.host).iterdir() if path.is_dir()]) == 1
    service.requests(100)
    configured.release()
    downloads.finish()
    steady.stop()
    assert not failed(downloads.events("end"))
    assert not failed(steady.events())


def test_sigterm_leaves_packets_flowing(here: Lab, service: Service) -> None:
    service.serve("b1", "b2")
    here.edge.kill(signal.SIGTERM)
    assert here.edge.agent is not None
    assert here.edge.agent.popen.returncode == 0
    service.requests(100)


def test_a_second_agent_is_refused_and_the_first_goes_on(here: Lab, service: Service) -> None:
    service.serve("b1")
    second = here.procs.start(here.edge.host, "second", LBAGENT, "run", f"--config={here.edge.config}")
    assert second.wait() == 1
    assert "another lbagent edge uses it" in second.log.read_text()
    service.requests(50)


def test_an_option_that_makes_no_sense_leaves_the_service_as_it_was(here: Lab, service: Service) -> None:
    service.serve("b1", "b2")
    vips = here.edge.service(service.name)["vips"]
    service.register("b1", "b2", meta={"lb-vip": "127.0.0.1", "lb-settle": "3s"})
    until(lambda: here.edge.service(service.name)["problems"], "the problem to be told")
    shown = here.edge.service(service.name)
    assert shown["vips"] == vips
    assert any("127.0.0.1" in problem for b in shown["backends"] for problem in b["problems"])
    service.requests(100)
    metrics = here.edge.api("GET", "/metrics")
    assert f'lbagent_service_problems{{service="{service.name}"}}' in metrics


def test_who_had_a_vip_keeps_it(here: Lab, service: Service) -> None:
    service.serve("b1")
    name = f"a-{service.name}"  # first by name, second to come
    try:
        here.register(name, service.vip, "b2")
        until(lambda: here.edge.service(name), "the other service to be known")
        until(lambda: here.edge.service(name)["problems"], "the conflict to be told")
        assert not here.edge.service(name)["serving"]
        answered = {event.server for event in service.requests(50)}
        assert answered == {"b1"}
    finally:
        here.backends["b2"].consul.deregister(f"{name}-b2")


def test_a_device_that_is_configured_no_more_is_left(configured: Lab, service: Service) -> None:
    """A second device gets the program, and loses it when it leaves the configuration."""
    namespace = configured.edge.host.namespace
    ip(f"-n {namespace} link add eth1 type veth peer name eth1p")
    try:
        before = configured.edge.config.read_text()
        configured.edge.config.write_text(before.replace('["eth0"]', '["eth0", "eth1"]'))
        reload(configured)
        until(lambda: attached(configured) == {"eth0", "eth1"}, "the program on both devices")
        configured.edge.config.write_text(before)
        reload(configured)
        until(lambda: attached(configured) == {"eth0"}, "the program on one device")
        service.serve("b1")
    finally:
        ip(f"-n {namespace} link del eth1")


def attached(here: Lab) -> set[str]:
    devices = json.loads(ip(f"-n {here.edge.host.namespace} -json link show"))
    return {device["ifname"] for device in devices if "xdp" in device}
