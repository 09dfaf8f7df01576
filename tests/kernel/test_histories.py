"""Random histories: the real program and the agent's bookkeeping against the rules of two generations.

`Model` says the rules anew, by addresses and without maps, words or numbers. Every packet goes through the
loaded program and through the model: both must choose the same backend, every time.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lbagent.core import ring, slots
from lbagent.core.model import Backend, Duty, Live, Proto, Snapshot, Vip, VipKey
from lbagent.core.plan import members, plan, sweep
from lbagent.core.steps import advance
from lbagent.dataplane import abi, libbpf
from lbagent.dataplane.kernel import Kernel
from tests.loaded import VIP, Loaded, flow_key, hop_to, real_address, slot_of
from tests.vectors import Flow

pytestmark = pytest.mark.kernel

SEED = 7
SETTLE_S = 50
ENDING_S = 10
SYN, ACK, FIN, RST = 0x02, 0x10, 0x11, 0x04


@dataclass
class Slot:
    owner: IPv4Address | None = None
    elder: IPv4Address | None = None
    tracked: bool = False
    changed_s: int = 0


@dataclass
class Record:
    real: IPv4Address
    seen_s: int
    ending: bool = False


@dataclass
class Model:
    slots: list[Slot] = field(default_factory=lambda: [Slot() for _ in range(4096)])
    flows: dict[Flow, Record] = field(default_factory=dict)
    dead: set[IPv4Address] = field(default_factory=set)

    def forward(self, flow: Flow, flags: int, now_s: int) -> IPv4Address | None:
        slot = self.slots[slot_of(flow)]
        if not slot.tracked:
            return slot.owner
        syn, ends = flags & SYN, bool(flags & (FIN & ~ACK | RST))
        record = self.flows.get(flow)
        if syn or record is None or record.real in self.dead:
            elder_serves = not syn and record is None and slot.elder and slot.elder not in self.dead
            real = slot.elder if elder_serves else slot.owner
            if real is not None:
                self.flows[flow] = Record(real, now_s, ends)
            return real
        record.seen_s = now_s
        record.ending |= ends
        return record.real

    def install(self, owners: list[IPv4Address | None], dead: set[IPv4Address], now_s: int) -> None:
        self.dead = dead
        for slot, want in zip(self.slots, owners, strict=True):
            if want == slot.owner:
                continue
            if not slot.tracked:
                slot.tracked = slot.owner is not None and slot.owner not in dead
                slot.elder = slot.owner if slot.tracked else want
            slot.owner, slot.changed_s = want, now_s

    def sweep(self, now_s: int) -> None:
        exceptions = set()
        for flow, record in list(self.flows.items()):
            silent_s = now_s - record.seen_s
            if silent_s > (ENDING_S if record.ending else SETTLE_S) or record.real in self.dead:
                del self.flows[flow]
            elif record.real != self.slots[slot_of(flow)].owner:
                exceptions.add(slot_of(flow))
        for number, slot in enumerate(self.slots):
            if slot.tracked and now_s - slot.changed_s > SETTLE_S and number not in exceptions:
                slot.tracked, slot.elder = False, slot.owner
        self.flows = {flow: r for flow, r in self.flows.items() if self.slots[slot_of(flow)].tracked}


class World:
    """The program, the agent's own picture of it, and the model, side by side."""

    def __init__(self, balancer: Loaded, kernel: Kernel) -> None:
        self.balancer, self.kernel = balancer, kernel
        self.live: Live = kernel.read()
        self.model = Model()
        self.stamps: dict[Flow, bytes] = {}
        self.now_s = 1000
        self.start_ns = kernel.now_ns() - self.now_s * 10**9

    def want(self, duties: dict[int, Duty]) -> None:
        backends = tuple(
            Backend(real_address(n), 80, 1 + n % 2, duty, hop_to(n)) for n, duty in sorted(duties.items())
        )
        vip = Vip("web", (VipKey(VIP, 80, Proto.TCP),), backends, 12, SETTLE_S)
        for step in plan(self.live, Snapshot((vip,)), SEED, self.clock_s()):
            self.kernel.apply(step)
            self.live = advance(self.live, step)
        shares = members(backends)
        named = [None, *(member.address for member in shares)]
        table = memoryview(ring.build(shares, 12, SEED)).cast("I")
        dead = {real_address(n) for n, duty in duties.items() if duty is Duty.DEAD}
        dead |= self.model.dead - {real_address(n) for n in duties}  # who is wanted no more stays dead
        self.model.install([named[index] for index in table], dead, self.now_s)

    def packet(self, flow: Flow, flags: int) -> tuple[IPv4Address | None, IPv4Address | None]:
        """(where the program sends it, where the model does)"""
        outcome = self.balancer.run(frame(flow, flags))
        if outcome.verdict == libbpf.XDP_TX:
            sent = IPv4Address(outcome.frame[30:34])
        else:
            assert outcome.drops == {"no_backend": 1}
            sent = None
        self._stamp(flow)
        return sent, self.model.forward(flow, flags, self.now_s)

    def pass_time(self, seconds: int) -> None:
        self.now_s += seconds
        table = self.kernel.records()
        numbers = {v.number: SETTLE_S for v in self.live.vips.values()}
        found = sweep(self.live, table.keys, table.values, table.count, numbers, self.clock_s() * 10**9)
        for step in found.steps:
            self.kernel.apply(step)
            self.live = advance(self.live, step)
        self.live = replace(self.live, records=found.records)
        self.model.sweep(self.now_s)

    def clock_s(self) -> int:
        return self.start_ns // 10**9 + self.now_s

    def _stamp(self, flow: Flow) -> None:
        """Put the history's time in the place of the kernel's into the record that was just written."""
        fd = self.balancer.maps["flows"]
        raw = libbpf.map_lookup(fd, flow_key(flow), abi.sizeof("struct flow"))
        if raw is not None and raw[:8] != self.stamps.get(flow):
            self.stamps[flow] = struct.pack("<Q", self.clock_s() * 10**9)
            libbpf.map_update(fd, flow_key(flow), self.stamps[flow] + raw[8:])


def frame(flow: Flow, flags: int) -> bytes:
    """A TCP segment without data; checksums are nobody's business here."""
    tcp = struct.pack("!HHIIBBHHH", flow.sport, flow.dport, 1, 1, 0x50, flags, 65535, 0, 0)
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, 1, 0, 64, 6, 0, flow.src.packed, flow.dst.packed)
    return bytes(12) + b"\x08\x00" + ip + tcp


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32))
def test_the_program_chooses_as_the_rules_say(balancer: Loaded, seed: int) -> None:
    balancer.clear()
    rng = random.Random(seed)
    with Kernel(balancer.pinned.directory) as kernel:
        world = World(balancer, kernel)
        duties = dict.fromkeys(range(1, rng.randint(2, 7)), Duty.ACTIVE)
        world.want(duties)
        flows: list[Flow] = []
        for _ in range(150):
            deed = rng.random()
            if deed < 0.08:
                duties[rng.randint(1, 8)] = rng.choice(list(Duty))
                if rng.random() < 0.2:
                    duties.pop(rng.choice(list(duties)))
                world.want(duties)
            elif deed < 0.15:
                world.pass_time(rng.randint(1, 30))
                world.want(duties)  # clears what nobody names
            elif deed < 0.4 or not flows:
                src = IPv4Address("10.64.0.0") + rng.randint(0, 0xFFFF)
                flows.append(Flow(src, VIP, rng.randint(1024, 65535), 80, Proto.TCP))
                sent, expected = world.packet(flows[-1], SYN)
                assert sent == expected
            else:
                flow, flags = rng.choice(flows), rng.choice([ACK] * 8 + [SYN, FIN, RST])
                sent, expected = world.packet(flow, flags)
                assert sent == expected, f"{flow} with flags {flags:#x}"
        front, content = balancer.ring()
        assert front == slots.heads(content), "heads and slots say the same"


def test_a_syn_flood_in_quiet_times_leaves_no_record(balancer: Loaded) -> None:
    with Kernel(balancer.pinned.directory) as kernel:
        World(balancer, kernel).want(dict.fromkeys((1, 2, 3), Duty.ACTIVE))
        before = sum(balancer.counter("vip_counters", 0)[:1])
        buffer = bytearray(frame(Flow(IPv4Address("10.64.0.0"), VIP, 1024, 80, Proto.TCP), SYN))
        for n in range(200_000):
            struct.pack_into("!I", buffer, 26, 0x0A400000 + n)
            libbpf.prog_run(balancer.fd, buffer)
        assert balancer.counter("vip_counters", 0)[0] - before == 200_000
        assert kernel.records().count == 0


def test_a_syn_flood_while_slots_are_tracked_is_recorded(balancer: Loaded) -> None:
    """The other half of the promise, so that the test above can fail."""
    with Kernel(balancer.pinned.directory) as kernel:
        world = World(balancer, kernel)
        world.want({1: Duty.ACTIVE, 2: Duty.ACTIVE})
        world.want({1: Duty.ACTIVE, 2: Duty.DRAINING})
        for n in range(200):
            balancer.run(frame(Flow(IPv4Address("10.64.0.0") + n, VIP, 1024, 80, Proto.TCP), SYN))
        assert kernel.records().count > 50
