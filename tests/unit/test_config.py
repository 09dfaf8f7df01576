"""The configuration is strict: every mistake is told with its key, the value and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Network
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from lbagent.config import SECTIONS, Config, load
from lbagent.errors import ConfigError

MINIMAL = '[edge]\ninterfaces = ["eth0"]\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lbagent.toml"


def read(path: Path, text: str, environ: Mapping[str, str] | None = None) -> Config:
    path.write_text(text)
    return load(path, environ or {})


def refused(
    path: Path,
    text: str,
    environ: Mapping[str, str] | None = None,
    needs: Literal["edge", "backend"] | None = None,
) -> str:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path, environ or {}, needs)
    assert all(line.startswith(f"{path}: ") for line in str(caught.value).splitlines())
    return str(caught.value)


def test_the_minimal_file_has_good_defaults(path: Path) -> None:
    config = read(path, MINIMAL)
    assert config.edge.interfaces == ("eth0",)
    assert config.consul.address == "http://127.0.0.1:8500"
    assert (config.consul.tag, config.consul.wait) == ("lb", 300)
    assert (config.timing.settle, config.timing.linger) == (300, 300)
    assert config.admin.socket == Path("/run/lbagent/admin.sock")
    assert config.edge.encap_source == IPv4Network("172.16.0.0/16")


def test_every_key_can_be_given(path: Path) -> None:
    text = """
[consul]
address = "https://[fd00::1]:8501/"
token_file = "/etc/lbagent/consul.token"
ca_file = "/etc/ca.pem"
cert_file = "/etc/cert.pem"
key_file = "/etc/key.pem"
verify = false
datacenter = "dc2"
tag = "edge"
wait = "10s"
connections = 4096
[edge]
interfaces = ["eth0", "eth1"]
mode = "generic"
encap_source = "100.64.0.0/10"
seed = 9223372036854775807
pin_dir = "/sys/fs/bpf/x"
vips = 1
reals = 1048576
flows = 1024
[admin]
socket = "/run/x.sock"
socket_group = "adm"
address = "[::1]:9600"
token_file = "/etc/lbagent/admin.token"
[state]
directory = "/srv/lbagent"
[timing]
settle = "90s"
linger = "0s"
[log]
level = "debug"
format = "json"
[backend]
interfaces = ["eth0"]
mode = "native"
pin_dir = "/sys/fs/bpf/y"
loopback = "lo2"
node = "b1"
"""
    config = read(path, text)
    assert config.consul.address == "https://[fd00::1]:8501"
    assert config.edge.seed == (1 << 63) - 1
    assert (config.timing.settle, config.timing.linger, config.consul.wait) == (90, 0, 10)
    for name, kind in SECTIONS.items():
        given, default = getattr(config, name), kind()
        for key in msgspec.structs.fields(kind):
            same = getattr(given, key.name) == getattr(default, key.name)
            assert same == (key.name in ("token", "auth")), f"{name}.{key.name}"


@pytest.mark.parametrize(
    ("section", "line", "allowed"),
    [
        ("consul", 'address = "127.0.0.1:8500"', "http://127.0.0.1:8500"),
        ("consul", 'address = "unix:///run/consul.sock"', "only http and https"),
        ("consul", 'address = "http://127.0.0.1"', "a host and a port are needed"),
        ("consul", 'address = "http://:8500"', "a host and a port are needed"),
        ("consul", 'address = "http://a:99999"', "0-65535"),
        ("consul", 'address = "http://a:8500/v1"', "more than a scheme"),
        ("consul", 'address = "http://me:pw@a:8500"', "more than a scheme"),
        ("consul", 'token_file = "consul.token"', "an absolute path"),
        ("consul", 'verify = "no"', "true or false"),
        ("consul", 'tag = ""', "not empty"),
        ("consul", 'wait = "11m"', '"10m"'),
        ("consul", 'wait = "0s"', '"1s"'),
        ("consul", "connections = 9", "from 10"),
        ("edge", 'interfaces = "eth0"', '["eth0"]'),
        ("edge", "interfaces = []", '["eth0"]'),
        ("edge", "interfaces = [1]", '["eth0"]'),
        ("edge", 'interfaces = ["a/b"]', '["eth0"]'),
        ("edge", 'interfaces = ["eth0", "eth0"]', "each device once"),
        ("edge", 'mode = "fast"', '"auto", "native" or "generic"'),
        ("edge", 'encap_source = "172.16.0.1/16"', "without host bits"),
        ("edge", 'encap_source = "fd00::/64"', "an IPv4 network"),
        ("edge", 'encap_source = "0.0.0.0/0"', "too big"),
        ("edge", "seed = -1", "from 0"),
        ("edge", 'seed = "1"', "a whole number"),
        ("edge", "vips = 0", "from 1 to 65536"),
        ("edge", "reals = 1048577", "from 2 to 1048576"),
        ("edge", "flows = 1e6", "a whole number"),
        ("admin", 'address = "9600"', "127.0.0.1:9600"),
        ("admin", 'address = "127.0.0.1:http"', "127.0.0.1:9600"),
        ("state", "directory = 1", "an absolute path"),
        ("timing", "settle = 300", '"5m"'),
        ("timing", 'settle = "5 min"', '"5m"'),
        ("timing", 'settle = "0s"', '"1s"'),
        ("timing", 'linger = "25h"', '"24h"'),
        ("log", 'level = "INFO"', '"info"'),
        ("backend", "node = true", "a text"),
    ],
)
def test_an_impossible_value_is_named_with_what_is_allowed(
    path: Path, section: str, line: str, allowed: str
) -> None:
    key, _, value = line.partition(" = ")
    text = refused(path, f"[{section}]\n{line}\n")
    name = section if "each device once" in allowed else f"{section}.{key}"
    assert f"{section}.{key} is " in text, name
    assert value.replace("1e6", "1000000.0") in text
    assert "allowed is" in text
    assert allowed in text


def test_an_unknown_key_is_named_with_the_nearest_and_all_that_are_allowed(path: Path) -> None:
    text = refused(path, '[edge]\ninterface = "eth0"\n[egde]\n')
    assert 'edge.interface (= "eth0") is not known (did you mean edge.interfaces?)' in text
    assert "edge.encap_source" in text
    assert "egde (= {}) is not known (did you mean edge?): allowed are consul, edge, admin" in text


def test_a_secret_is_never_shown(path: Path) -> None:
    assert "hunter2" not in refused(path, '[consul]\ntoken = "hunter2"\nauth = "hunter2"\n')
    config = read(path, MINIMAL, {"CONSUL_HTTP_TOKEN": "hunter2", "CONSUL_HTTP_AUTH": "me:hunter2"})
    assert (config.consul.token, config.consul.auth) == ("hunter2", "me:hunter2")
    assert "hunter2" not in repr(config)


def test_all_mistakes_are_told_at_once(path: Path) -> None:
    text = refused(path, "edge = 1\nx = 2\n[timing]\nsettle = 1\nlinger = 1\n", {"CONSUL_HTTP_ADDR": "x"})
    assert len(text.splitlines()) == 5


def test_what_is_no_toml_and_what_cannot_be_read(path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(path, {})
    assert "is not TOML" in refused(path, "[edge")
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is not TOML"):
        load(path, {})


def test_interfaces_are_needed_by_who_uses_them(path: Path) -> None:
    assert "edge.interfaces is missing" in refused(path, "", needs="edge")
    assert "backend.interfaces is missing" in refused(path, MINIMAL, needs="backend")
    assert load(path, {}, needs=None).backend.interfaces == ()


def test_a_tcp_address_needs_a_token_and_a_certificate_needs_a_key(path: Path) -> None:
    assert "admin.token_file is missing" in refused(path, '[admin]\naddress = "127.0.0.1:9600"\n')
    assert "both or none" in refused(path, '[consul]\ncert_file = "/c.pem"\n')


# ---- Consul's environment -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "address"),
    [
        ({"CONSUL_HTTP_ADDR": "10.0.0.1:8500"}, "http://10.0.0.1:8500"),
        ({"CONSUL_HTTP_ADDR": "10.0.0.1:8501", "CONSUL_HTTP_SSL": "true"}, "https://10.0.0.1:8501"),
        ({"CONSUL_HTTP_ADDR": "http://10.0.0.1:8500", "CONSUL_HTTP_SSL": "1"}, "http://10.0.0.1:8500"),
        ({"CONSUL_HTTP_ADDR": "https://10.0.0.1:8501", "CONSUL_HTTP_SSL": "F"}, "https://10.0.0.1:8501"),
        ({"CONSUL_HTTP_ADDR": ""}, "http://127.0.0.1:8500"),
    ],
)
def test_consuls_address_from_the_environment(path: Path, environ: Mapping[str, str], address: str) -> None:
    assert read(path, MINIMAL, environ).consul.address == address


def test_the_other_variables_of_consul(path: Path) -> None:
    environ = {
        "CONSUL_HTTP_TOKEN": "t",
        "CONSUL_HTTP_TOKEN_FILE": "/t",
        "CONSUL_CACERT": "/ca",
        "CONSUL_CLIENT_CERT": "/c",
        "CONSUL_CLIENT_KEY": "/k",
        "CONSUL_HTTP_SSL_VERIFY": "false",
    }
    consul = read(path, MINIMAL, environ).consul
    assert (consul.token_file, consul.token) == (Path("/t"), "")  # the file wins, as for Consul's tools
    assert (consul.ca_file, consul.cert_file, consul.key_file) == (Path("/ca"), Path("/c"), Path("/k"))
    assert consul.verify is False


def test_the_file_wins_over_the_environment(path: Path) -> None:
    text = MINIMAL + '[consul]\naddress = "http://10.0.0.2:8500"\ntoken_file = "/mine"\nverify = true\n'
    environ = {
        "CONSUL_HTTP_ADDR": "nonsense",
        "CONSUL_HTTP_TOKEN": "t",
        "CONSUL_HTTP_TOKEN_FILE": "/t",
        "CONSUL_HTTP_SSL_VERIFY": "0",
    }
    consul = read(path, text, environ).consul
    assert (consul.address, consul.token_file, consul.token) == ("http://10.0.0.2:8500", Path("/mine"), "")
    assert consul.verify is True


@pytest.mark.parametrize(
    "environ",
    [
        {"CONSUL_HTTP_ADDR": "unix:///run/consul.sock"},
        {"CONSUL_HTTP_ADDR": "10.0.0.1"},
        {"CONSUL_HTTP_SSL_VERIFY": "maybe"},
        {"CONSUL_NAMESPACE": "team"},
    ],
)
def test_a_variable_that_makes_no_sense_is_named(path: Path, environ: dict[str, str]) -> None:
    text = refused(path, MINIMAL, environ)
    assert all(f'{name} is "{value}"' in text for name, value in environ.items())
