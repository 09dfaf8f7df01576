"""Prometheus metrics, made afresh from one Status at each scrape: nothing is counted here.

All names begin with lbagent_ and carry their unit; counters end in _total and start again where the kernel's
do, which is when a real number or VIP number is given to somebody else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from lbagent.core.status import BackendStatus, ServiceStatus, Standing, Status

CONTENT_TYPE = CONTENT_TYPE_LATEST
SERVICE = ("service",)
BACKEND = ("service", "node", "id", "address")


def render(status: Status, now: float) -> bytes:
    """The text that a scrape gets. now: Unix time, for ages."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Report(status, now))
    return generate_latest(registry)


class _Report(Collector):
    def __init__(self, status: Status, now: float) -> None:
        self._status = status
        self._now = now

    def collect(self) -> Iterable[Metric]:
        yield from self._agent()
        yield from _services(self._status.services, self._now)
        yield from _backends(self._status.services)

    def _agent(self) -> Iterator[Metric]:
        status, now = self._status, self._now
        build = {"version": status.version, "program": status.program}
        yield InfoMetricFamily("lbagent_build", "Version of the agent, digest of the XDP program.", build)
        yield _gauge("ready", "1 when attached and Consul's first full answer is applied.", status.ready)
        yield _gauge("adopted", "1 when the program was found running at the start.", status.adopted)
        yield _gauge("start_time_seconds", "Unix time of the agent's start.", status.started_at)
        yield _gauge("apply_time_seconds", "Unix time of the latest change of the tables.", status.applied_at)
        yield _counter("applies", "Changes of the kernel's tables.", status.applies)
        yield _counter("apply_errors", "Changes that the kernel refused.", status.apply_errors)
        if status.consul_answer_at:  # before the first answer there is no age
            age = max(0.0, now - status.consul_answer_at)
            yield _gauge("consul_answer_age_seconds", "Since Consul's last good answer on all services.", age)
        yield _counter("consul_errors", "Answers that were missing or not believed.", status.consul_errors)
        yield _gauge("flow_records", "Connections with a record in the flow table.", status.flow_records)
        yield _gauge("problems", "Problems that are not of a single service.", len(status.problems))
        drops = CounterMetricFamily("lbagent_drops", "Packets dropped, by reason.", labels=["reason"])
        for reason, packets in sorted(status.drops.items()):
            drops.add_metric([reason], packets)
        yield drops
        device = GaugeMetricFamily(
            "lbagent_device_info", "How the program is attached.", labels=["device", "mode"]
        )
        for at in status.devices:
            device.add_metric([at.name, at.mode], 1)
        yield device


def _services(services: Iterable[ServiceStatus], now: float) -> Iterator[Metric]:
    serving = _labelled_gauge("service_serving", "1 when the kernel forwards for it.", SERVICE)
    problems = _labelled_gauge("service_problems", "Problems of it and of its backends.", SERVICE)
    ring = _labelled_gauge("service_ring_slots", "Size of its ring.", SERVICE)
    age = _labelled_gauge("service_consul_answer_age_seconds", "Since Consul's last answer on it.", SERVICE)
    packets = _labelled_counter("service_packets", "Packets forwarded for its VIP.", SERVICE)
    size = _labelled_counter("service_bytes", "Bytes forwarded for its VIP.", SERVICE)
    for service in services:
        labels = [service.name]
        serving.add_metric(labels, service.serving)
        problems.add_metric(labels, len(service.problems) + sum(len(b.problems) for b in service.backends))
        ring.add_metric(labels, service.ring_size)
        if service.answer_at:
            age.add_metric(labels, max(0.0, now - service.answer_at))
        packets.add_metric(labels, service.packets)
        size.add_metric(labels, service.bytes)
    yield from (serving, problems, ring, age, packets, size)


def _backends(services: Iterable[ServiceStatus]) -> Iterator[Metric]:
    packets = _labelled_counter("backend_packets", "Packets sent to it.", BACKEND)
    size = _labelled_counter("backend_bytes", "Bytes sent to it.", BACKEND)
    records = _labelled_gauge("backend_flow_records", "Connections with a record that names it.", BACKEND)
    slots = _labelled_gauge("backend_slots", "Ring slots that send it new connections.", BACKEND)
    former = _labelled_gauge("backend_former_slots", "Slots it owned, not settled yet.", BACKEND)
    weight = _labelled_gauge("backend_weight", "Its weight now.", BACKEND)
    empty = _labelled_gauge("backend_empty", "1 when no connection is left on it.", BACKEND)
    standing = _labelled_gauge("backend_standing", "1 for the standing that it has.", (*BACKEND, "standing"))
    for service in services:
        for b in service.backends:
            if b.standing is Standing.REFUSED:  # the kernel knows nothing of it
                continue
            labels = _labels(service, b)
            packets.add_metric(labels, b.packets)
            size.add_metric(labels, b.bytes)
            records.add_metric(labels, b.records)
            slots.add_metric(labels, b.slots)
            former.add_metric(labels, b.former_slots)
            weight.add_metric(labels, b.weight)
            empty.add_metric(labels, b.empty)
            standing.add_metric([*labels, b.standing.value], 1)
    yield from (packets, size, records, slots, former, weight, empty, standing)


def _labels(service: ServiceStatus, backend: BackendStatus) -> list[str]:
    return [service.name, backend.node, backend.id, backend.address]


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"lbagent_{name}", text, value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"lbagent_{name}", text, value)


def _labelled_gauge(name: str, text: str, labels: tuple[str, ...]) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"lbagent_{name}", text, labels=labels)


def _labelled_counter(name: str, text: str, labels: tuple[str, ...]) -> CounterMetricFamily:
    return CounterMetricFamily(f"lbagent_{name}", text, labels=labels)
