"""What a scrape gets."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lbagent.core.status import Standing, Status
from lbagent.metrics import render
from tests.control import backend, service, status

NOW = 100.0
WEB1 = {"service": "web", "node": "node7", "id": "web-1", "address": "192.0.2.21"}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(report: Status) -> Samples:
    families = text_string_to_metric_families(render(report, NOW).decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(report: Status, name: str, **labels: str) -> float | None:
    return samples(report).get((name, frozenset(labels.items())))


@pytest.fixture
def report() -> Status:
    drained = backend("web-1", standing=Standing.DRAINED, slots=0, former_slots=12, records=5)
    return status(service("web", drained, backend("web-2", "node8", problems=("a", "b"))))


def test_the_agent(report: Status) -> None:
    assert value(report, "lbagent_ready") == 1
    assert value(report, "lbagent_consul_answer_age_seconds") == 5
    assert value(report, "lbagent_consul_errors_total") == 2
    assert value(report, "lbagent_applies_total") == 4
    assert value(report, "lbagent_apply_errors_total") == 1
    assert value(report, "lbagent_flow_records") == 3
    assert value(report, "lbagent_drops_total", reason="fragment") == 7
    assert value(report, "lbagent_device_info", device="eth0", mode="native") == 1
    assert value(report, "lbagent_build_info", version="1.2.3", program="abcdef012345") == 1


def test_services(report: Status) -> None:
    assert value(report, "lbagent_service_packets_total", service="web") == 9
    assert value(report, "lbagent_service_bytes_total", service="web") == 900
    assert value(report, "lbagent_service_serving", service="web") == 1
    assert value(report, "lbagent_service_problems", service="web") == 2
    assert value(report, "lbagent_service_consul_answer_age_seconds", service="web") == 5


def test_backends(report: Status) -> None:
    assert value(report, "lbagent_backend_packets_total", **WEB1) == 1000
    assert value(report, "lbagent_backend_bytes_total", **WEB1) == 64000
    assert value(report, "lbagent_backend_flow_records", **WEB1) == 5
    assert value(report, "lbagent_backend_slots", **WEB1) == 0
    assert value(report, "lbagent_backend_former_slots", **WEB1) == 12
    assert value(report, "lbagent_backend_empty", **WEB1) == 0
    assert value(report, "lbagent_backend_standing", standing="drained", **WEB1) == 1


def test_before_the_first_answer_there_is_no_age(report: Status) -> None:
    assert value(replace(report, consul_answer_at=0.0), "lbagent_consul_answer_age_seconds") is None


def test_an_age_is_never_negative(report: Status) -> None:
    assert value(replace(report, consul_answer_at=NOW + 9), "lbagent_consul_answer_age_seconds") == 0


def test_a_refused_instance_has_no_series() -> None:
    """It may have the address of one that is not."""
    text = render(status(service("web", backend("web-1", standing=Standing.REFUSED))), NOW).decode()
    assert "web-1" not in text


def test_labels_may_be_any_text() -> None:
    odd = 'a"b\\c\nd'
    report = status(service(odd, backend(odd)))
    assert value(report, "lbagent_service_serving", service=odd) == 1


def test_names_follow_the_conventions(report: Status) -> None:
    text = render(report, NOW).decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    assert all(name.startswith("lbagent_") for name in kinds)
    assert all(name.endswith("_total") == (kind == "counter") for name, kind in kinds.items())
    assert set(re.findall(r"^# HELP (\S+) .", text, re.MULTILINE)) == set(kinds)


def test_no_series_is_there_twice(report: Status) -> None:
    lines = [line.rpartition(" ")[0] for line in render(report, NOW).decode().splitlines() if line[0] != "#"]
    assert len(lines) == len(set(lines))
