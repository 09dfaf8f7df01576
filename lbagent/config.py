"""The configuration: one TOML file, strict, with Consul's own environment variables underneath.

Every mistake that can be found is told at once, each with its key, the value and what is allowed. What comes
out makes sense in itself; whether its files and devices exist is for those who use them.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from ipaddress import IPv4Network
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from lbagent.core.options import LONGEST_S, duration_s, nearest
from lbagent.errors import ConfigError

T = TypeVar("T", bound="Section")


# ---- values: each type says what it may be ------------------------------------------------------


class Seconds(int):
    """In the file: a text such as "90s", "5m" or "2h"."""

    least: ClassVar[int] = 0
    most: ClassVar[int] = LONGEST_S


class Settle(Seconds):
    least = 1


class Wait(Seconds):
    """Consul answers a blocking query after 10 minutes at the latest."""

    least = 1
    most = 600


class Url(str):
    """http://host:port or https://host:port, an IPv6 address in brackets."""

    __slots__ = ()


class Endpoint(str):
    """host:port to listen on, an IPv6 address in brackets."""

    __slots__ = ()


class Secret(str):
    """Shown in no log and no message."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


def _says(allowed: str, **limits: Any) -> Meta:
    return Meta(description=allowed, **limits)


Text = Annotated[str, _says("a text that is not empty", min_length=1)]
Flag = Annotated[bool, _says("true or false")]
File = Annotated[Path, _says("an absolute path")]
Device = Annotated[str, _says("the name of a network device", pattern=r"^[^\s/:]{1,15}$")]
Devices = Annotated[tuple[Device, ...], _says('a list of network devices, such as ["eth0"]', min_length=1)]
Duration_ = Annotated[Seconds, _says('a text from "0s" to "24h", such as "5m"')]
Settle_ = Annotated[Settle, _says('a text from "1s" to "24h", such as "5m"')]
Wait_ = Annotated[Wait, _says('a text from "1s" to "10m", such as "5m"')]
Mode = Annotated[Literal["auto", "native", "generic"], _says('"auto", "native" or "generic"')]
Level = Annotated[
    Literal["debug", "info", "warning", "error"], _says('"debug", "info", "warning" or "error"')
]
Format = Annotated[Literal["text", "json"], _says('"text" or "json"')]
Address = Annotated[Url, _says('an address such as "http://127.0.0.1:8500" or "https://consul.example:8501"')]
Listen = Annotated[Endpoint, _says('an address with a port, such as "127.0.0.1:9600"')]
Network = Annotated[
    IPv4Network, _says('an IPv4 network from /8 to /32 without host bits, such as "172.16.0.0/16"')
]
Connections = Annotated[int, _says("a whole number from 10 to 65535", ge=10, le=65535)]
Seed = Annotated[int, _says("a whole number from 0 to 2^63 - 1", ge=0, le=(1 << 63) - 1)]
Vips = Annotated[int, _says("a whole number from 1 to 65536", ge=1, le=1 << 16)]
Reals = Annotated[int, _says("a whole number from 2 to 1048576", ge=2, le=1 << 20)]  # SLOT_REAL_BITS of abi.h
Flows = Annotated[int, _says("a whole number from 1024 to 67108864", ge=1 << 10, le=1 << 26)]


# ---- sections -----------------------------------------------------------------------------------


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One table of the file."""


class Consul(Section, frozen=True, kw_only=True):
    """How Consul is reached, and which services are ours. token and auth come from the environment only.

    connections: Consul takes 200 from one address unless its limits.http_max_conns_per_client says otherwise.
    """

    address: Address = Url("http://127.0.0.1:8500")
    token_file: File | None = None
    ca_file: File | None = None
    cert_file: File | None = None
    key_file: File | None = None
    verify: Flag = True
    datacenter: Text | None = None
    tag: Text = "lb"
    wait: Wait_ = Wait(300)
    connections: Connections = 150
    token: Secret = Secret()
    auth: Secret = Secret()


class Edge(Section, frozen=True, kw_only=True):
    """The node that balances. reals, vips, flows: entries of the kernel's tables."""

    interfaces: Devices = ()
    mode: Mode = "auto"
    encap_source: Network = IPv4Network("172.16.0.0/16")
    seed: Seed = 0x1BA6E47
    pin_dir: File = Path("/sys/fs/bpf/lbagent")
    vips: Vips = 512
    reals: Reals = 16384
    flows: Flows = 262144


class Admin(Section, frozen=True, kw_only=True):
    """The HTTP API. address: TCP, off by default; needs a token."""

    socket: File = Path("/run/lbagent/admin.sock")
    socket_group: Text | None = None
    address: Listen | None = None
    token_file: File | None = None


class State(Section, frozen=True, kw_only=True):
    directory: File = Path("/var/lib/lbagent")


class Timing(Section, frozen=True, kw_only=True):
    """For services that do not say."""

    settle: Settle_ = Settle(300)
    linger: Duration_ = Seconds(300)


class Log(Section, frozen=True, kw_only=True):
    level: Level = "info"
    format: Format = "text"


class Backend(Section, frozen=True, kw_only=True):
    """The node that serves. interfaces: where encapsulated packets come in. node: its name in Consul, None:
    that of the agent that is asked."""

    interfaces: Devices = ()
    mode: Mode = "auto"
    pin_dir: File = Path("/sys/fs/bpf/lbagent-backend")
    loopback: Device = "lo"
    node: Text | None = None


class Config(Section, frozen=True, kw_only=True):
    consul: Consul = Consul()
    edge: Edge = Edge()
    admin: Admin = Admin()
    state: State = State()
    timing: Timing = Timing()
    log: Log = Log()
    backend: Backend = Backend()


# ---- reading ------------------------------------------------------------------------------------

SECTIONS: Mapping[str, type[Section]] = {f.name: type(f.default) for f in msgspec.structs.fields(Config)}
NOT_IN_FILE = ("token", "auth")  # a secret stands in a file of its own, or in the environment
SECRETS = re.compile("(token|auth|secret|password)$", re.IGNORECASE)


def load(path: Path, environ: Mapping[str, str], needs: Literal["edge", "backend"] | None = "edge") -> Config:
    """The configuration in the file, over that of the environment.

    needs: the section without whose interfaces there is nothing to do. Raises ConfigError with all mistakes.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error
    errors = [_unknown(name, value, SECTIONS) for name, value in content.items() if name not in SECTIONS]
    sections = {name: _section(kind, name, content.get(name, {}), errors) for name, kind in SECTIONS.items()}
    config = msgspec.convert(sections, Config)
    config = msgspec.structs.replace(config, consul=_environment(config.consul, content, environ, errors))
    errors += _contradictions(config)
    if needs and not getattr(config, needs).interfaces and not any("interfaces" in error for error in errors):
        errors.append(f"{needs}.interfaces is missing: allowed is {_allowed(Devices)}")
    if errors:
        raise ConfigError("\n".join(f"{path}: {error}" for error in errors))
    return config


def _section(kind: type[T], name: str, given: object, errors: list[str]) -> T:
    if not isinstance(given, dict):
        errors.append(f"{name} is {_show(name, given)}: allowed is a section, [{name}]")
        return kind()
    types = {f.name: f.type for f in msgspec.structs.fields(kind) if f.name not in NOT_IN_FILE}
    values: dict[str, Any] = {}
    for key, value in given.items():
        where = f"{name}.{key}"
        if key not in types:
            errors.append(_unknown(where, value, [f"{name}.{known}" for known in types]))
            continue
        try:
            values[key] = msgspec.convert(value, types[key], dec_hook=_parse)
        except msgspec.ValidationError as error:
            why = f" ({error})" if str(error) else ""
            errors.append(f"{where} is {_show(where, value)}: allowed is {_allowed(types[key])}{why}")
    return kind(**values)


def _parse(kind: type, value: object) -> object:
    """A value of one of our own types. Raises ValueError, its text is for the operator."""
    if not isinstance(value, str):
        raise ValueError(f"not a {type(value).__name__}")
    if issubclass(kind, Seconds):
        return kind(duration_s(value, kind.least, kind.most))
    if kind is Url:
        return _url(value)
    if kind is Endpoint:
        _port(f"//{value}")
        return Endpoint(value)
    if kind is IPv4Network:
        network = IPv4Network(value)
        if network.prefixlen < 8:
            raise ValueError("it is too big")
        return network
    if not Path(value).is_absolute():
        raise ValueError
    return Path(value)


def _url(text: str) -> Url:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https"):
        raise ValueError("only http and https are supported")
    if parts.path.strip("/") or parts.query or parts.fragment or parts.username is not None:
        raise ValueError("it has more than a scheme, a host and a port")
    _port(text)
    return Url(f"{parts.scheme}://{parts.netloc}")


def _port(url: str) -> int:
    parts = urlsplit(url)
    if not parts.hostname or not parts.port:
        raise ValueError("a host and a port are needed")
    return parts.port


# ---- Consul's environment -----------------------------------------------------------------------

VARIABLES: Mapping[str, tuple[str, Callable[[str], object]]] = {
    "CONSUL_HTTP_TOKEN_FILE": ("token_file", Path),
    "CONSUL_HTTP_TOKEN": ("token", Secret),
    "CONSUL_HTTP_AUTH": ("auth", Secret),
    "CONSUL_CACERT": ("ca_file", Path),
    "CONSUL_CLIENT_CERT": ("cert_file", Path),
    "CONSUL_CLIENT_KEY": ("key_file", Path),
}
UNSUPPORTED = ("CONSUL_CAPATH", "CONSUL_TLS_SERVER_NAME", "CONSUL_NAMESPACE", "CONSUL_PARTITION")
FLAGS = {"1": True, "t": True, "true": True, "0": False, "f": False, "false": False}  # as Consul reads them


def _environment(
    consul: Consul, content: Mapping[str, Any], environ: Mapping[str, str], errors: list[str]
) -> Consul:
    """What the file does not say is taken from the variables, as Consul's own tools do."""
    section = content.get("consul")
    given = section if isinstance(section, dict) else {}
    found: dict[str, Any] = {}
    for name, (key, parse) in VARIABLES.items():
        if environ.get(name) and key not in given:
            found[key] = parse(environ[name])
    if "token_file" in {*given, *found}:  # a token file wins over a token
        found.pop("token", None)
    if "address" not in given and (address := environ.get("CONSUL_HTTP_ADDR")):
        scheme = "https" if _flag("CONSUL_HTTP_SSL", environ, False, errors) else "http"
        try:
            found["address"] = _url(address if "://" in address else f"{scheme}://{address}")
        except ValueError as error:
            errors.append(f'CONSUL_HTTP_ADDR is "{address}": allowed is {_allowed(Address)} ({error})')
    if "verify" not in given:
        found["verify"] = _flag("CONSUL_HTTP_SSL_VERIFY", environ, True, errors)
    errors += [f'{n} is "{environ[n]}": it is not supported, unset it' for n in UNSUPPORTED if environ.get(n)]
    return msgspec.structs.replace(consul, **found)


def _flag(name: str, environ: Mapping[str, str], default: bool, errors: list[str]) -> bool:
    text = environ.get(name, "")
    if text and text.lower() not in FLAGS:
        errors.append(f'{name} is "{text}": allowed are {", ".join(FLAGS)}')
    return FLAGS.get(text.lower(), default)


# ---- errors -------------------------------------------------------------------------------------


def _contradictions(config: Config) -> Iterator[str]:
    for name, section in (("edge", config.edge), ("backend", config.backend)):
        if len(set(section.interfaces)) < len(section.interfaces):
            yield f"{name}.interfaces is {_show(name, section.interfaces)}: allowed is each device once"
    if config.admin.address and not config.admin.token_file:
        yield "admin.token_file is missing: allowed is " + _allowed(File) + ", as admin.address is set"
    if (config.consul.cert_file is None) != (config.consul.key_file is None):
        yield "consul.cert_file and consul.key_file: allowed are both or none"


def _unknown(key: str, value: object, known: Iterable[str]) -> str:
    return f"{key} (= {_show(key, value)}) is not known{nearest(key, known)}: allowed are {', '.join(known)}"


def _show(key: str, value: object) -> str:
    return "***" if SECRETS.search(key) else json.dumps(value, default=str, ensure_ascii=False)


def _allowed(kind: Any) -> str:
    """What the type says of itself."""
    for part in (kind, *get_args(kind)):
        for meta in getattr(part, "__metadata__", ()):
            return str(meta.description)
    raise AssertionError(f"{kind} does not say what it may be")
