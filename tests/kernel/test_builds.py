"""Finding, building, replacing, removing the pinned program; what a new build takes over from an old one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from lbagent.core.model import Capacity, RealState
from lbagent.dataplane import abi, carry, libbpf, program, sources
from lbagent.errors import DataplaneError
from tests.kernel.frames import TCP_FLOW, UDP_FLOW, frame, real_of
from tests.loaded import CAPACITY, ENCAP_SOURCE, Loaded, private_pins, word
from tests.vectors import VECTORS


@pytest.fixture
def build() -> Iterator[program.Settings]:
    with private_pins() as root:
        yield program.Settings(CAPACITY, VECTORS.seed, ENCAP_SOURCE, root)


def opened(build: program.Settings, pinned: program.Pinned) -> Loaded:
    """Leaks descriptors until the process ends, which is soon."""
    maps = {name: libbpf.obj_get(pinned.directory / name) for name in abi.MAPS}
    return Loaded(build, pinned, libbpf.obj_get(pinned.directory / "lb"), maps)


def ids(balancer: Loaded) -> dict[str, int]:
    return {name: libbpf.map_info(fd).id for name, fd in balancer.maps.items()}


def in_use(build: program.Settings) -> Loaded:
    """A VIP with a tracked ring, two reals, a flow record and some packets counted."""
    balancer = opened(build, program.ensure(build))
    balancer.put_vip(3)
    balancer.put_real(1, vip=3)
    balancer.put_real(2, vip=3, generation=9)
    balancer.put_ring(word(1, 2, tracked=True), 3)
    for flags in ("S", "A"):
        assert real_of(balancer.run(frame(flags=flags)).frame) == 1
    return balancer


def forwards_as_before(balancer: Loaded) -> None:
    """The record decides for the old flow, the ring's elder for an unknown one; counting goes on."""
    assert real_of(balancer.run(frame()).frame) == 1
    assert real_of(balancer.run(frame(TCP_FLOW._replace(sport=1))).frame) == 2
    assert balancer.counter("vip_counters", 3)[0] == 4
    assert balancer.counter("real_counters", 1)[0] == 3


def test_a_start_finds_the_build_of_its_digest_and_changes_nothing(build: program.Settings) -> None:
    first = program.ensure(build)
    before = ids(opened(build, first)), first.info()
    second = program.ensure(build)
    assert not first.adopted
    assert second.adopted
    assert second == first
    assert (ids(opened(build, second)), second.info()) == before
    assert program.find(build) == [first]
    assert program.owns(build, first.info().id)


def test_a_build_with_new_values_shares_the_maps_whose_shape_is_the_same(build: program.Settings) -> None:
    old = in_use(build)
    changed = replace(build, encap_source=IPv4Network("10.253.0.0/24"))
    new = opened(changed, program.ensure(changed))
    assert new.pinned.digest != old.pinned.digest
    assert not new.pinned.adopted
    assert {name for name in abi.MAPS if ids(new)[name] != ids(old)[name]} == {"vip_index"}
    forwards_as_before(new)
    program.retire_others(changed, new.pinned)
    assert program.find(changed) == [new.pinned]
    assert not old.pinned.directory.exists()
    assert not program.owns(changed, libbpf.prog_info(old.fd).id)


def test_a_bigger_build_copies_what_it_cannot_share(build: program.Settings) -> None:
    old = in_use(build)
    changed = replace(build, capacity=Capacity(vips=32, reals=128, flows=4096))
    new = opened(changed, program.ensure(changed))
    apart = {name for name in abi.MAPS if ids(new)[name] != ids(old)[name]}
    assert apart == set(abi.MAPS) - {"drops"}
    assert libbpf.array_u32(new.maps["rings"]) == libbpf.array_u32(old.maps["rings"])  # the very same rings
    forwards_as_before(new)


def test_flow_records_written_meanwhile_follow(build: program.Settings) -> None:
    old = in_use(build)
    changed = replace(build, capacity=replace(CAPACITY, flows=4096))
    new = opened(changed, program.ensure(changed))
    old.run(frame(UDP_FLOW))
    new.run(frame(flags="R"))
    assert new.record(UDP_FLOW) is None
    program.retire_others(changed, new.pinned)
    late, kept = new.record(UDP_FLOW), new.record(TCP_FLOW)
    assert late is not None
    assert late.real == 1
    assert kept is not None
    assert kept.ending


@pytest.mark.parametrize(
    ("smaller", "table"),
    [({"reals": 2}, "reals"), ({"vips": 3}, "rings")],
)
def test_a_build_too_small_for_what_is_in_use_is_refused(
    build: program.Settings, smaller: dict[str, int], table: str
) -> None:
    old = in_use(build)
    changed = replace(build, capacity=replace(CAPACITY, **smaller))
    with pytest.raises(DataplaneError, match=f"{table}: entry .* is in use"):
        program.ensure(changed)
    assert program.find(build) == [old.pinned]
    assert os.listdir(build.pin_root) == [old.pinned.digest]  # noqa: PTH208
    forwards_as_before(old)


def test_a_smaller_build_forgets_numbers_that_are_free(build: program.Settings) -> None:
    old = in_use(build)
    old.put_real(60, state=RealState.FREE)
    changed = replace(build, capacity=replace(CAPACITY, reals=32))
    forwards_as_before(opened(changed, program.ensure(changed)))


def test_values_that_grew_get_zeros_at_their_end() -> None:
    with private_pins() as root:
        libbpf.ensure_bpffs(root)
        for folder, key_size, value_size in (("a", 20, 16), ("b", 24, 32)):
            (root / folder).mkdir()
            fd = libbpf.map_create(libbpf.MAP_HASH, "vips", key_size, value_size, 8)
            libbpf.obj_pin(fd, root / folder / "vips")
        old, new = (libbpf.obj_get(root / folder / "vips") for folder in "ab")
        libbpf.map_update(old, b"k" * 20, b"v" * 16)
        carry.take_over(root / "a", root / "b")
        assert libbpf.map_dump(new) == (b"k" * 20 + bytes(4), b"v" * 16 + bytes(16))


def test_per_cpu_values_that_grew_keep_each_cpus_part() -> None:
    with private_pins() as root:
        libbpf.ensure_bpffs(root)
        for folder, size in (("a", 16), ("b", 24)):
            (root / folder).mkdir()
            fd = libbpf.map_create(libbpf.MAP_PERCPU_ARRAY, "counters", 4, size, 4)
            libbpf.obj_pin(fd, root / folder / "counters")
        old, new = (libbpf.obj_get(root / folder / "counters") for folder in "ab")
        cpus = libbpf.cpus()
        libbpf.map_update(old, bytes(4), b"".join(n.to_bytes(8, "little") * 2 for n in range(1, cpus + 1)))
        carry.take_over(root / "a", root / "b")
        assert libbpf.percpu_u64(new, 0) == [word for n in range(1, cpus + 1) for word in (n, n, 0)]


@pytest.mark.parametrize("prefix", [program.BUILDING, program.REMOVING])
def test_what_a_dead_maker_left_unfinished_is_removed(build: program.Settings, prefix: str) -> None:
    libbpf.ensure_bpffs(build.pin_root)
    left = build.pin_root / f"{prefix}abc"
    left.mkdir()
    libbpf.obj_pin(libbpf.map_create(libbpf.MAP_ARRAY, "drops", 4, 8, 8), left / "drops")
    pinned = program.ensure(build)
    assert [path.name for path in build.pin_root.iterdir()] == [pinned.digest]


def test_the_compilers_own_words_are_in_the_error(
    build: program.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program.Settings, "defines", lambda self: {"LB_VIPS": "16"})
    with pytest.raises(DataplaneError, match=r"lb\.bpf\.c:\d+:\d+: error: .*LB_REALS"):
        program.ensure(build)
    assert list(build.pin_root.iterdir()) == []


def test_the_verifiers_own_words_are_in_the_error(
    build: program.Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "bpf"
    shutil.copytree(sources.folder(), broken)
    cursor = broken / "cursor.h"
    cursor.write_text(cursor.read_text().replace("if (taken + size > cursor->end)", "if (0)"))
    monkeypatch.setattr(sources, "folder", lambda: broken)
    with pytest.raises(DataplaneError, match="invalid access to packet"):
        program.ensure(build)
    assert list(build.pin_root.iterdir()) == []


def test_nothing_is_left_after_all_is_removed(build: program.Settings) -> None:
    program.ensure(build)
    program.ensure(replace(build, seed=1))
    (build.pin_root / f"{program.BUILDING}abc").mkdir()
    program.remove_all(build)
    assert not build.pin_root.exists()
    program.remove_all(build)


def test_the_digest_is_of_sources_and_values(build: program.Settings) -> None:
    assert program.digest(build) == program.digest(replace(build, pin_root=Path("/elsewhere")))
    others: list[program.Build] = [
        replace(build, seed=1),
        replace(build, capacity=Capacity(1, 2, 3)),
        program.DecapSettings(1, Path()),
    ]
    assert len({program.digest(other) for other in [build, *others]}) == 4
