"""A backend node in a namespace: tunnelled packets reach servers on the VIP, and all of it can be undone."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path

import pytest

pytest.importorskip("bcc", reason="needs bcc, Debian's python3-bpfcc")
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.packet import Packet
from structlog.testing import capture_logs

from lbagent import links
from lbagent.backend import ADDRESSES, Backend, Settings, load, undo
from lbagent.config import load as load_config
from lbagent.core.dsr import Record
from lbagent.dataplane import program
from lbagent.errors import ConfigError, DataplaneError, LinkError
from tests.world.consul import start_server
from tests.world.net import Host, ip, net
from tests.world.procs import Proc, Procs, procs, until

VIP, VIP_2 = IPv4Address("203.0.113.1"), IPv4Address("203.0.113.2")
EDGE = "10.77.0.1"
PORT = 8080
SYSCTLS = ["all/arp_ignore", "all/arp_announce", "all/rp_filter", "eth0/rp_filter"]


@dataclass(frozen=True, slots=True)
class Lab:
    """edge stands in for the balancer: what it sends in a tunnel is from a client that is nowhere."""

    edge: Host
    node: Host
    settings: Settings

    def backend(self) -> Backend:
        return self.node.call(lambda: Backend(self.settings))

    def serve(self, backend: Backend, *vips: IPv4Address) -> None:
        self.node.call(lambda: backend.serve(frozenset(vips)))

    def undo(self, backend: Backend) -> None:
        self.node.call(backend.undo)

    def send(self, inner: Packet) -> None:
        raw = self.edge.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_IPIP))
        with raw:
            raw.sendto(bytes(inner), (self.node.address, 0))

    def sysctls(self) -> dict[str, str]:
        return {key: self.node.sysctl(f"ipv4/conf/{key}") for key in SYSCTLS}

    def state(self) -> tuple[object, ...]:
        """All that a backend could have changed."""
        return (
            self.sysctls(),
            self.node.call(lambda: links.addresses("lo")),
            self.node.call(lambda: links.attached("eth0")),
            self.settings.build.pin_root.exists(),
            self.settings.record.exists(),
        )


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with net() as made:
        edge, node = made.add_host("edge", 1), made.add_host("node", 2)
        ip(f"-n {node.namespace} route add default via {EDGE}")
        node.sysctl("ipv4/conf/eth0/rp_filter", "1")
        build = program.DecapSettings(ADDRESSES, made.pins(node))
        yield Lab(edge, node, Settings(frozenset({"eth0"}), "lo", "auto", tmp_path / "backend.json", build))


@pytest.fixture
def listener(lab: Lab) -> Iterator[socket.socket]:
    """A UDP server on any address of the node, told by IP_PKTINFO which one a packet was for."""
    with lab.node.socket(socket.SOCK_DGRAM) as server:
        server.bind(("", PORT))
        server.settimeout(10)
        server.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        yield server


IP_PKTINFO = 8  # linux/in.h


def received(server: socket.socket) -> tuple[bytes, IPv4Address]:
    content, extra, _, _ = server.recvmsg(2048, 64)
    return content, IPv4Address(extra[0][2][8:12])


def udp(vip: IPv4Address, content: bytes) -> Packet:
    return IP(src="198.51.100.7", dst=str(vip)) / UDP(sport=4000, dport=PORT) / content


def test_a_tunnelled_udp_packet_reaches_the_server_as_the_client_sent_it(
    lab: Lab, listener: socket.socket
) -> None:
    lab.serve(lab.backend(), VIP)
    lab.send(udp(VIP, b"hello"))
    assert received(listener) == (b"hello", VIP)
    assert lab.node.call(lambda: links.attached("eth0")) is not None


def test_a_tunnelled_tcp_connection_is_answered_directly(lab: Lab) -> None:
    lab.serve(lab.backend(), VIP)
    with lab.node.socket() as server:
        server.bind((str(VIP), PORT))
        server.listen()
        with lab.edge.call(
            lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
        ) as wire:
            wire.bind(("eth0", 0x0800))
            wire.settimeout(10)
            lab.send(IP(src="198.51.100.7", dst=str(VIP)) / TCP(sport=4000, dport=PORT, flags="S", seq=7))
            while True:
                answer = IP(wire.recv(2048)[14:])
                if TCP in answer and answer[TCP].sport == PORT:
                    break
    assert (answer.src, answer.dst, answer[TCP].flags, answer[TCP].ack) == (str(VIP), "198.51.100.7", "SA", 8)


def test_only_packets_for_its_vips_are_taken_out(lab: Lab, listener: socket.socket) -> None:
    lab.serve(lab.backend(), VIP)
    lab.send(udp(IPv4Address(lab.node.address), b"not for a VIP"))
    lab.send(udp(VIP_2, b"not for a VIP of this node"))
    lab.send(udp(VIP, b"for the VIP"))
    assert received(listener) == (b"for the VIP", VIP)


def test_the_node_answers_no_arp_for_a_vip(lab: Lab) -> None:
    ip(f"-n {lab.edge.namespace} route add {VIP}/32 dev eth0")
    lab.serve(lab.backend(), VIP)
    with lab.edge.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)) as raw:
        raw.settimeout(10)
        raw.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        raw.connect((str(VIP), 0))
        raw.send(bytes(ICMP()))
        with pytest.raises(OSError, match="No route to host"):  # the kernel asked thrice, nobody answered
            raw.recv(2048)


IP_RECVERR = 11  # linux/in.h


def test_each_change_of_a_setting_is_told_with_old_and_new_value(lab: Lab) -> None:
    with capture_logs() as logs:
        lab.serve(lab.backend(), VIP)
    told = {
        entry["key"]: (entry["old"], entry["new"]) for entry in logs if entry["event"] == "sysctl_changed"
    }
    assert told == {
        "net.ipv4.conf.all.arp_ignore": (0, 1),
        "net.ipv4.conf.all.arp_announce": (0, 2),
        "net.ipv4.conf.eth0.rp_filter": (1, 2),
    }
    assert [entry["vip"] for entry in logs if entry["event"] == "vip_added"] == [str(VIP)]


def test_undo_takes_everything_back(lab: Lab) -> None:
    before = lab.state()
    backend = lab.backend()
    lab.serve(backend, VIP, VIP_2)
    assert lab.state() != before
    lab.undo(backend)
    assert lab.state() == before


def test_undo_needs_no_process_that_knows(lab: Lab) -> None:
    before = lab.state()
    lab.serve(lab.backend(), VIP)
    lab.undo(lab.backend())
    assert lab.state() == before
    lab.undo(lab.backend())
    assert lab.state() == before


def test_undo_leaves_what_was_there_before(lab: Lab) -> None:
    lab.node.call(lambda: links.add_address("lo", VIP))
    lab.node.sysctl("ipv4/conf/all/arp_ignore", "2")
    before = lab.state()
    backend = lab.backend()
    lab.serve(backend, VIP)
    lab.undo(backend)
    assert lab.state() == before


def test_a_vip_that_goes_is_removed_and_the_others_stay(lab: Lab, listener: socket.socket) -> None:
    backend = lab.backend()
    lab.serve(backend, VIP, VIP_2)
    lab.serve(backend, VIP_2)
    assert backend.added == {VIP_2}
    lab.send(udp(VIP, b"gone"))
    lab.send(udp(VIP_2, b"still here"))
    assert received(listener) == (b"still here", VIP_2)


def test_a_new_start_adopts_program_and_vips(lab: Lab) -> None:
    lab.serve(lab.backend(), VIP)
    before = lab.state()
    with capture_logs() as logs:
        again = lab.backend()
        assert again.added == {VIP}
        lab.serve(again, VIP)
    assert lab.state() == before
    assert logs == []


def test_another_build_replaces_the_program_and_keeps_its_vips(lab: Lab, listener: socket.socket) -> None:
    before = lab.state()
    lab.serve(lab.backend(), VIP)
    bigger = program.DecapSettings(addresses=128, pin_root=lab.settings.build.pin_root)
    newer = Lab(lab.edge, lab.node, Settings(frozenset({"eth0"}), "lo", "auto", lab.settings.record, bigger))
    backend = newer.backend()
    newer.serve(backend, VIP)
    newer.send(udp(VIP, b"hello"))
    assert received(listener) == (b"hello", VIP)
    assert len(program.find(bigger)) == 1
    newer.undo(backend)
    assert lab.state() == before


def test_a_program_of_somebody_else_stays(lab: Lab) -> None:
    foreign = program.DecapSettings(addresses=8, pin_root=lab.settings.build.pin_root / "foreign")
    with program.ensure(foreign).opened() as fd:
        lab.node.call(lambda: links.attach("eth0", fd))
    there = lab.node.call(lambda: links.attached("eth0"))
    backend = lab.backend()
    with pytest.raises(LinkError, match="eth0 already has an XDP program"):
        lab.serve(backend, VIP)
    lab.undo(backend)
    assert lab.node.call(lambda: links.attached("eth0")) == there
    program.remove_all(foreign)


def test_a_missing_interface_is_named(lab: Lab) -> None:
    wrong = Settings(frozenset({"eth7"}), "lo", "auto", lab.settings.record, lab.settings.build)
    with pytest.raises(LinkError, match="no network device 'eth7'; there are: eth0, lo"):
        lab.node.call(lambda: Backend(wrong).serve(frozenset({VIP})))


def configure(lab: Lab, folder: Path, consul: str) -> Path:
    config = folder / "lbagent.toml"
    config.write_text(
        f"""
        consul.address = "{consul}"
        state.directory = "{lab.settings.record.parent}"
        backend.interfaces = ["eth0"]
        backend.pin_dir = "{lab.settings.build.pin_root}"
        """
    )
    return config


def start(lab: Lab, running: Procs, config: Path, notify: str = "") -> Proc:
    text = (
        "import asyncio, pathlib; from lbagent import backend, config; "
        f"asyncio.run(backend.run(config.load(pathlib.Path({str(config)!r}), {{}}, 'backend')))"
    )
    return running.start(lab.node, "backend", sys.executable, "-c", text, env={"NOTIFY_SOCKET": notify})


def test_with_consul_away_a_start_keeps_what_was_served_and_a_stop_leaves_it(
    lab: Lab, tmp_path: Path
) -> None:
    lab.serve(lab.backend(), VIP)
    served = lab.state()
    config = configure(lab, tmp_path, "http://127.0.0.1:1")
    notify = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, procs(lab.node.namespace) as running:
        manager.bind(notify)
        manager.settimeout(30)
        process = start(lab, running, config, notify)
        assert manager.recv(100) == b"READY=1"
        with pytest.raises(ConfigError, match="another lbagent backend"):
            lab.node.call(lambda: undo(load_config(config, {}, "backend")))
        assert process.stop() == 0
        assert manager.recv(100) == b"STOPPING=1"
    assert lab.state() == served
    lab.node.call(lambda: undo(load_config(config, {}, "backend")))
    assert lab.node.call(lambda: links.addresses("lo")) == {IPv4Interface("127.0.0.1/8")}


def test_the_vips_of_instances_in_consul_come_and_go(
    lab: Lab, listener: socket.socket, tmp_path: Path
) -> None:
    def has(vip: IPv4Address) -> bool:
        return IPv4Interface(vip) in lab.node.call(lambda: links.addresses("lo"))

    with procs(lab.node.namespace) as running:
        consul = start_server(running, lab.node)
        first = consul.register(
            "dns", PORT, id="a", meta={"lb-vip": str(VIP), "lb-proto": "udp", "lb-linger": "0s"}
        )
        consul.register("other", PORT, id="b", tags=(), meta={"lb-vip": "203.0.113.9"})
        process = start(lab, running, configure(lab, tmp_path, "http://127.0.0.1:8500"))
        until(lambda: has(VIP), "the VIP on lo")
        lab.send(udp(VIP, b"hello"))
        assert received(listener) == (b"hello", VIP)
        consul.register("dns", PORT, id="c", meta={"lb-vip": str(VIP_2), "lb-linger": "0s"})
        until(lambda: has(VIP_2), "the second VIP on lo")
        consul.deregister(first)
        until(lambda: not has(VIP), "the first VIP gone")
        assert has(VIP_2)
        assert not has(IPv4Address("203.0.113.9"))
        assert process.stop() == 0


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"boot": "x"'])
def test_a_record_that_cannot_be_read_stops_the_start(tmp_path: Path, content: str) -> None:
    file = tmp_path / "backend.json"
    file.write_text(content)
    with pytest.raises(DataplaneError, match=r"backend\.json"):
        load(file)


def test_a_record_of_an_earlier_boot_says_nothing(tmp_path: Path) -> None:
    file = tmp_path / "backend.json"
    file.write_text(json.dumps({"boot": "earlier", "addresses": [str(VIP)], "sysctls": {}, "devices": []}))
    assert load(file) == Record()
