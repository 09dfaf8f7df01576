"""Which real the program picks, and what it records: the rules of two generations, one packet at a time."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lbagent.core.model import RealState
from lbagent.dataplane import abi, libbpf
from lbagent.dataplane.libbpf import XDP_DROP, XDP_TX
from tests.kernel.frames import TCP_FLOW, UDP_FLOW, frame, real_of
from tests.loaded import Loaded, Record, flow_key, slot_of, word
from tests.vectors import Flow

OWNER, ELDER, OTHER = 1, 2, 3
GENERATION = {OWNER: 11, ELDER: 12, OTHER: 13}
CLOSING = ["F", "FA", "R", "RA"]


@pytest.fixture
def edge(balancer: Loaded) -> Loaded:
    """Every slot is tracked: it was the elder's and is the owner's now."""
    balancer.put_vip(0)
    for number, generation in GENERATION.items():
        balancer.put_real(number, generation=generation)
    balancer.put_ring(word(OWNER, ELDER, tracked=True))
    return balancer


def record(real: int, flow: Flow = TCP_FLOW, ending: bool = False) -> Record:
    return Record(real, 0, GENERATION[real], ending, VECTORS_HASH[flow])


VECTORS_HASH = {flow: slot_of(flow, 32) for flow in (TCP_FLOW, UDP_FLOW)}


def goes_to(edge: Loaded, flow: Flow = TCP_FLOW, flags: str = "A") -> int:
    """0: dropped, as nobody is there for it."""
    outcome = edge.run(frame(flow, flags))
    if outcome.verdict == XDP_DROP:
        assert outcome.drops == {"no_backend": 1}
        return 0
    assert outcome.verdict == XDP_TX
    return real_of(outcome.frame)


# ---- while nothing changes ----------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["S", "SA", "A", "PA", *CLOSING])
def test_in_a_settled_slot_tcp_goes_to_the_owner_and_nothing_is_recorded(edge: Loaded, flags: str) -> None:
    edge.put_ring(word(OWNER, ELDER))
    assert goes_to(edge, flags=flags) == OWNER
    assert edge.records() == 0


def test_in_a_settled_slot_records_are_neither_read_nor_written(edge: Loaded) -> None:
    edge.put_ring(word(OWNER, ELDER))
    edge.put_record(TCP_FLOW, record(OTHER))
    assert goes_to(edge, flags="F") == OWNER
    assert edge.record(TCP_FLOW) == record(OTHER)


def test_a_syn_flood_in_steady_state_records_nothing(edge: Loaded) -> None:
    edge.put_ring(word(OWNER))
    sent = bytearray(bytes(frame(flags="S")))
    for n in range(200_000):
        sent[28:30], sent[34:36] = (n >> 16).to_bytes(2, "big"), (n & 0xFFFF).to_bytes(2, "big")
        libbpf.prog_run(edge.fd, sent)
    assert edge.counter("vip_counters", 0)[0] == 200_000
    assert edge.records() == 0


# ---- in a tracked slot --------------------------------------------------------------------------


def test_a_new_connection_goes_to_the_owner_and_stays(edge: Loaded) -> None:
    assert goes_to(edge, flags="S") == OWNER
    assert edge.record(TCP_FLOW) == record(OWNER)
    edge.put_ring(word(OTHER, ELDER, tracked=True))
    assert goes_to(edge) == OWNER


def test_a_connection_older_than_the_change_stays_with_the_elder(edge: Loaded) -> None:
    assert goes_to(edge) == ELDER
    assert edge.record(TCP_FLOW) == record(ELDER)
    edge.put_ring(word(OTHER, OWNER, tracked=True))
    assert goes_to(edge) == ELDER


def test_an_answer_to_a_syn_does_not_begin_a_connection(edge: Loaded) -> None:
    assert goes_to(edge, flags="SA") == ELDER


def test_a_syn_sent_again_goes_to_the_same_owner(edge: Loaded) -> None:
    assert [goes_to(edge, flags="S") for _ in range(3)] == [OWNER] * 3
    assert edge.records() == 1


def test_a_new_connection_of_the_same_ports_does_not_inherit_the_record(edge: Loaded) -> None:
    edge.put_record(TCP_FLOW, record(OTHER, ending=True))
    assert goes_to(edge, flags="S") == OWNER
    assert edge.record(TCP_FLOW) == record(OWNER)


@pytest.mark.parametrize("flags", CLOSING)
def test_an_end_is_noted_and_not_forgotten(edge: Loaded, flags: str) -> None:
    goes_to(edge)
    assert goes_to(edge, flags=flags) == ELDER
    assert goes_to(edge) == ELDER
    assert edge.record(TCP_FLOW) == record(ELDER, ending=True)


def test_an_end_without_a_record_is_noted_too(edge: Loaded) -> None:
    assert goes_to(edge, flags="R") == ELDER
    assert edge.record(TCP_FLOW) == record(ELDER, ending=True)


def test_a_record_tells_when_its_flow_was_seen(edge: Loaded) -> None:
    edge.put_record(TCP_FLOW, record(OTHER))
    goes_to(edge)
    raw = libbpf.map_lookup(edge.maps["flows"], flow_key(TCP_FLOW), abi.sizeof("struct flow")) or b""
    assert int.from_bytes(raw[:8], "little") > 0


def test_connections_of_a_dead_real_move_to_the_owner(edge: Loaded) -> None:
    edge.put_record(TCP_FLOW, record(OTHER))
    edge.put_real(OTHER, generation=GENERATION[OTHER], state=RealState.DEAD)
    assert goes_to(edge) == OWNER
    assert edge.record(TCP_FLOW) == record(OWNER)


def test_connections_of_a_dead_elder_move_to_the_owner(edge: Loaded) -> None:
    edge.put_real(ELDER, generation=GENERATION[ELDER], state=RealState.DEAD)
    assert goes_to(edge) == OWNER


def test_a_record_of_a_numbers_former_use_does_not_count(edge: Loaded) -> None:
    edge.put_record(TCP_FLOW, record(OTHER)._replace(generation=GENERATION[OTHER] - 1))
    assert goes_to(edge) == ELDER


def test_a_record_of_another_vip_does_not_count(edge: Loaded) -> None:
    edge.put_record(TCP_FLOW, record(OTHER)._replace(vip=7))
    assert goes_to(edge) == ELDER
    assert edge.record(TCP_FLOW) == record(ELDER)


def test_without_an_owner_connections_stay_and_new_ones_are_dropped(edge: Loaded) -> None:
    edge.put_ring(word(0, ELDER, tracked=True))
    assert goes_to(edge) == ELDER
    assert goes_to(edge, TCP_FLOW._replace(sport=40001), "S") == 0


# ---- UDP ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tracked", [False, True])
def test_a_udp_flow_stays_where_it_began(edge: Loaded, tracked: bool) -> None:
    edge.put_ring(word(OWNER, ELDER, tracked=tracked))
    assert goes_to(edge, UDP_FLOW) == OWNER
    assert edge.record(UDP_FLOW) == record(OWNER, UDP_FLOW)
    edge.put_ring(word(OTHER, ELDER, tracked=tracked))
    assert goes_to(edge, UDP_FLOW) == OWNER


def test_a_udp_flow_of_a_dead_real_moves_to_the_owner(edge: Loaded) -> None:
    goes_to(edge, UDP_FLOW)
    edge.put_ring(word(OTHER, ELDER, tracked=True))
    edge.put_real(OWNER, generation=GENERATION[OWNER], state=RealState.DEAD)
    assert goes_to(edge, UDP_FLOW) == OTHER


def test_stateless_udp_follows_the_ring_and_is_not_recorded(edge: Loaded) -> None:
    edge.put_vip(0, flags=abi.VIP_UDP_STATELESS)
    assert goes_to(edge, UDP_FLOW) == OWNER
    edge.put_ring(word(OTHER, ELDER, tracked=True))
    assert goes_to(edge, UDP_FLOW) == OTHER
    assert edge.records() == 0


def test_stateless_udp_does_not_make_tcp_stateless(edge: Loaded) -> None:
    edge.put_vip(0, flags=abi.VIP_UDP_STATELESS)
    assert goes_to(edge) == ELDER


# ---- any state of a slot, a record and the reals ------------------------------------------------


class Scene(NamedTuple):
    owner: int
    elder: int
    tracked: bool
    record: int  # 0: none
    fresh: bool  # the record's generation is the real's
    states: tuple[RealState, RealState, RealState]
    flags: str  # "": UDP


SCENES = st.builds(
    Scene,
    st.integers(0, 3),
    st.integers(0, 3),
    st.booleans(),
    st.integers(0, 3),
    st.booleans(),
    st.tuples(*[st.sampled_from(RealState)] * 3),
    st.sampled_from(["", "S", "SA", "A", *CLOSING]),
)


def expected(scene: Scene) -> int:
    """As slot_model's `forward`, told of one packet."""
    is_tcp, opens = bool(scene.flags), scene.flags == "S"
    has_record = scene.record != 0 and scene.fresh

    def serves(real: int) -> bool:
        return real != 0 and scene.states[real - 1] is RealState.SERVING

    if is_tcp and not scene.tracked:
        return scene.owner
    if has_record and serves(scene.record) and not opens:
        return scene.record
    if is_tcp and not opens and not has_record and serves(scene.elder):
        return scene.elder
    return scene.owner


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SCENES)
def test_the_choice_is_the_models(edge: Loaded, scene: Scene) -> None:
    flow = TCP_FLOW if scene.flags else UDP_FLOW
    libbpf.map_delete(edge.maps["flows"], flow_key(flow))
    for number, state in enumerate(scene.states, 1):
        edge.put_real(number, generation=GENERATION[number], state=state)
    edge.put_slot(slot_of(flow), word(scene.owner, scene.elder, tracked=scene.tracked))
    if scene.record:
        stale = 0 if scene.fresh else 1
        there = record(scene.record, flow)
        edge.put_record(flow, there._replace(generation=there.generation - stale))
    choice = expected(scene)
    before = edge.record(flow)
    assert goes_to(edge, flow, scene.flags) == choice
    if (scene.flags and not scene.tracked) or choice == 0:
        assert edge.record(flow) == before
    else:
        assert edge.record(flow) == record(choice, flow, scene.flags in CLOSING)
