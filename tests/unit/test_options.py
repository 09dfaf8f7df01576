"""Options of an instance: every mistake is named with its key, its value and what is allowed."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbagent.core.model import Proto
from lbagent.core.options import NAMES, OPTIONS, OnCritical, Options, duration_s, parse, unusable

VIP = {"lb-vip": "203.0.113.1"}


def errors(meta: dict[str, str], tags: tuple[str, ...] = (), port: int = 80) -> str:
    found = parse(meta, tags, port)
    assert isinstance(found, tuple)
    return "\n".join(found)


def test_a_vip_is_enough() -> None:
    assert parse(VIP, (), 80) == Options(IPv4Address("203.0.113.1"), 80)


def test_all_options() -> None:
    meta = {
        "lb-port": "53",
        "lb-proto": "both",
        "lb-settle": "90s",
        "lb-linger": "2h",
        "lb-on-critical": "keep",
        "lb-ring-size": "16384",
        "lb-udp": "stateless",
        "version": "7",
    }
    want = Options(
        IPv4Address("203.0.113.1"), 53, (Proto.TCP, Proto.UDP), 90, 7200, OnCritical.KEEP, 14, True
    )
    assert parse(VIP | meta, ("lb", "http"), 53) == want
    tags = tuple(f"{key.replace('lb-', 'lb.', 1)}={value}" for key, value in (VIP | meta).items())
    assert parse({}, tags, 53) == want


def test_meta_wins_over_tags() -> None:
    found = parse(VIP, ("lb.vip=nonsense", "lb.proto=udp"), 80)
    assert found == Options(IPv4Address("203.0.113.1"), 80, (Proto.UDP,))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vip", "203.0.113.300"),
        ("vip", "example.com"),
        ("vip", "127.0.0.1"),
        ("vip", "224.0.0.1"),
        ("vip", "169.254.1.1"),
        ("vip", "0.0.0.0"),
        ("vip", "0.1.2.3"),
        ("vip", "255.255.255.255"),
        ("vip", "203.0.113.1/32"),
        ("port", "0"),
        ("port", "65536"),
        ("port", "http"),
        ("port", "٨٠"),
        ("proto", "TCP"),
        ("settle", "0s"),
        ("settle", "5"),
        ("settle", "25h"),
        ("linger", "-1s"),
        ("linger", "5 m"),
        ("on-critical", "drop"),
        ("ring-size", "65537"),
        ("udp", "yes"),
    ],
)
def test_an_impossible_value_is_named_with_what_is_allowed(name: str, value: str) -> None:
    allowed = next(option.allowed for option in OPTIONS if option.name == name)
    for key, text in [
        (f"lb-{name}", errors({**VIP, f"lb-{name}": value})),
        (
            f"lb.{name}",
            errors(
                {}, ("lb.vip=203.0.113.1", f"lb.{name}={value}") if name != "vip" else (f"lb.vip={value}",)
            ),
        ),
    ]:
        assert f'{key} is "{value}"' in text
        assert allowed in text


def test_ipv6_is_refused_in_clear_words() -> None:
    assert "IPv6 is not supported" in errors({"lb-vip": "2001:db8::1"})


def test_an_unknown_option_is_named_with_the_nearest_and_all_allowed() -> None:
    text = errors({**VIP, "lb-ring-sise": "4096"})
    assert 'lb-ring-sise (="4096") is no option (did you mean lb-ring-size?)' in text
    assert all(f"lb-{name}" in text for name in NAMES)
    assert "lb.xyz" in errors(VIP, ("lb.xyz",))


def test_a_tag_without_value_and_one_given_twice_are_errors() -> None:
    assert "lb.vip has no value" in errors({}, ("lb.vip",))
    assert "given twice" in errors({}, ("lb.vip=203.0.113.1", "lb.vip=203.0.113.2"))
    assert isinstance(parse({}, ("lb.vip=203.0.113.1", "lb.vip=203.0.113.1"), 80), Options)


def test_all_errors_are_told_at_once() -> None:
    text = errors({"lb-proto": "sctp", "lb-x": "1"}, ("lb.y=2",), port=0)
    assert all(
        word in text for word in ("lb-proto", "lb-x", "lb.y", "lb-vip is missing", "registered with port 0")
    )


def test_the_port_of_the_vip_must_be_the_servers() -> None:
    assert "lb-port is 80, but the instance is registered with port 8080" in errors(
        {**VIP, "lb-port": "80"}, (), 8080
    )


def test_durations() -> None:
    assert [duration_s(text) for text in ("0s", "90s", "5m", "24h")] == [0, 90, 300, 86400]


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1).map(IPv4Address))
def test_a_usable_address_is_unicast_and_reachable(address: IPv4Address) -> None:
    if not unusable(address):
        assert 1 <= address.packed[0] <= 223
        assert address.packed[0] != 127


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from([f"lb-{n}" for n in NAMES] + ["lb-", "lb", "x"]), st.text(max_size=9)),
    st.lists(st.text(max_size=5).map(lambda t: f"lb.{t}") | st.sampled_from([f"lb.{n}=1" for n in NAMES])),
    st.integers(-1, 70000),
)
def test_nonsense_never_raises(meta: dict[str, str], tags: list[str], port: int) -> None:
    found = parse(meta, tags, port)
    assert isinstance(found, Options) or (found and all(found))
