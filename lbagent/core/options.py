"""What an instance asks for: its Meta and tags become `Options`, or errors that say what is allowed.

All options stand in one table, `OPTIONS`: parser, error texts and documentation are made from it.
"""

from __future__ import annotations

import difflib
import enum
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address

from lbagent.core.model import RING_BITS, Proto

META_PREFIX = "lb-"  # Consul allows no dots in the keys of Meta
TAG_PREFIX = "lb."
LONGEST_S = 24 * 3600  # of settle and linger times; abi.h's clock of slots wraps after 97 days

UNITS_S = {"s": 1, "m": 60, "h": 3600}
PROTOS = {"tcp": (Proto.TCP,), "udp": (Proto.UDP,), "both": (Proto.TCP, Proto.UDP)}
RING_SIZES = {str(1 << bits): bits for bits in RING_BITS}


class OnCritical(enum.StrEnum):
    """What becomes of connections to a backend that turns critical."""

    MOVE = "move"
    KEEP = "keep"


@dataclass(frozen=True, slots=True)
class Options:
    """What one service wants. None: the agent's default; ring_bits: what suits the number of instances."""

    vip: IPv4Address
    port: int
    protos: tuple[Proto, ...] = (Proto.TCP,)
    settle_s: int | None = None
    linger_s: int | None = None
    on_critical: OnCritical = OnCritical.MOVE
    ring_bits: int | None = None
    udp_stateless: bool = False


@dataclass(frozen=True, slots=True)
class Option:
    """`take` puts a value given as text into the options, or raises ValueError or KeyError."""

    name: str
    take: Callable[[Options, str], Options]
    allowed: str
    default: str


def duration_s(text: str, least_s: int = 0, most_s: int = LONGEST_S) -> int:
    """Seconds of "90s", "5m" or "2h". Raises ValueError without a text."""
    found = re.fullmatch(r"(\d{1,9})([smh])", text, re.ASCII)
    seconds = int(found[1]) * UNITS_S[found[2]] if found else -1
    if not least_s <= seconds <= most_s:
        raise ValueError
    return seconds


def unusable(address: IPv4Address) -> str:
    """Why no packet can be sent to the address from elsewhere; "" when it can."""
    if address.is_loopback:
        return "is a loopback address"
    if address.is_multicast:
        return "is a multicast address"
    if address.is_link_local:
        return "is a link-local address"
    if (
        address.is_reserved or address.packed[0] == 0
    ):  # 240/4 with the broadcast address, 0/8: RFC 6890, 2.2.2
        return "is a reserved address"
    return ""


def nearest(word: str, words: Iterable[str]) -> str:
    """` (did you mean ...?)` for a word that was probably meant, else ""."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _vip(text: str) -> IPv4Address:
    try:
        IPv6Address(text)
    except ValueError:
        address = IPv4Address(text)
    else:
        raise ValueError("IPv6 is not supported")
    if why := unusable(address):
        raise ValueError(f"it {why}")
    return address


def _port(text: str) -> int:
    if not re.fullmatch(r"\d{1,5}", text, re.ASCII) or not 0 < int(text) < 1 << 16:
        raise ValueError
    return int(text)


OPTIONS = (
    Option(
        "vip",
        lambda o, t: replace(o, vip=_vip(t)),
        "an IPv4 address that others can reach",
        "none, it must be given",
    ),
    Option(
        "port",
        lambda o, t: replace(o, port=_port(t)),
        "1 to 65535",
        "the port the instance is registered with",
    ),
    Option("proto", lambda o, t: replace(o, protos=PROTOS[t]), "tcp, udp or both", "tcp"),
    Option(
        "settle",
        lambda o, t: replace(o, settle_s=duration_s(t, 1)),
        "1s to 24h, such as 90s or 5m",
        "timing.settle",
    ),
    Option(
        "linger",
        lambda o, t: replace(o, linger_s=duration_s(t)),
        "0s to 24h, such as 90s or 5m",
        "timing.linger",
    ),
    Option("on-critical", lambda o, t: replace(o, on_critical=OnCritical(t)), "move or keep", "move"),
    Option(
        "ring-size",
        lambda o, t: replace(o, ring_bits=RING_SIZES[t]),
        "4096, 16384, 65536 or 262144",
        "the smallest with 100 slots for each instance",
    ),
    Option(
        "udp",
        lambda o, t: replace(o, udp_stateless={"tracked": False, "stateless": True}[t]),
        "tracked or stateless",
        "tracked",
    ),
)
NAMES = tuple(option.name for option in OPTIONS)


def is_option(tag: str) -> bool:
    """Whether a tag is meant for us, right or wrong."""
    return tag.startswith(TAG_PREFIX)


def parse(meta: Mapping[str, str], tags: Sequence[str], port: int) -> Options | tuple[str, ...]:
    """The options of one instance that is registered with `port`, or all errors.

    Meta wins over tags. Other keys of Meta and other tags are none of our business.
    """
    given, errors = _from_tags(tags)
    for key, value in sorted(meta.items()):
        if key.startswith(META_PREFIX):
            name = key.removeprefix(META_PREFIX)
            if name in NAMES:
                given[name] = (key, value)
            else:
                errors.append(_unknown(key, value, META_PREFIX))
    options = Options(IPv4Address(0), port)
    for option in OPTIONS:
        if option.name in given:
            key, value = given[option.name]
            try:
                options = option.take(options, value)
            except (ValueError, KeyError) as why:
                reason = f"{why}; " if isinstance(why, ValueError) and option.name == "vip" else ""
                errors.append(f'{key} is "{value}": {reason}allowed is {option.allowed}')
    if "vip" not in given:
        errors.append(f"{META_PREFIX}vip is missing: allowed is {OPTIONS[0].allowed}")
    if not 0 < port < 1 << 16:
        errors.append(f"the instance is registered with port {port}: allowed is 1 to 65535")
    elif options.port != port:
        errors.append(
            f"{given['port'][0]} is {options.port}, but the instance is registered with port {port}: "
            "the server gets packets as clients sent them, so both must be the same"
        )
    return tuple(errors) or options


def _from_tags(tags: Sequence[str]) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """name -> (key as written, value), and errors."""
    given: dict[str, tuple[str, str]] = {}
    errors: list[str] = []
    for tag in sorted(set(filter(is_option, tags))):
        key, equals, value = tag.partition("=")
        name = key.removeprefix(TAG_PREFIX)
        if name not in NAMES:
            errors.append(_unknown(key, value, TAG_PREFIX))
        elif not equals:
            errors.append(f"tag {tag} has no value: write it as {key}=<value>")
        elif name in given:
            errors.append(f'tag {key} is given twice, as "{given[name][1]}" and "{value}": give it once')
        else:
            given[name] = (key, value)
    return given, errors


def _unknown(key: str, value: str, prefix: str) -> str:
    known = [prefix + name for name in NAMES]
    return f'{key} (="{value}") is no option{nearest(key, known)}: allowed are {", ".join(known)}'
