"""What docs and examples say is so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest

from lbagent.admin import Api
from lbagent.config import NOT_IN_FILE, SECTIONS, VARIABLES, Config, load
from lbagent.core.options import Options, parse
from lbagent.core.status import BackendStatus, DeviceStatus, ServiceStatus, Standing, Status
from lbagent.metrics import render
from tests.control import FakeControl, backend, service, status

ROOT = Path(__file__).parents[2]
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text()
API = (ROOT / "docs" / "api.md").read_text()


@pytest.mark.parametrize("section", SECTIONS)
def test_each_key_of_the_configuration_is_told_with_its_default(section: str) -> None:
    text = CONFIGURATION.partition(f"## `[{section}]`")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?`) \| .* \| (.*?) \|$", text, re.MULTILINE)
    told = {key: default for keys, default in rows for key in re.findall(r"`(\w+)`", keys)}
    fields = [f for f in msgspec.structs.fields(SECTIONS[section]) if f.name not in NOT_IN_FILE]
    assert list(told) == [field.name for field in fields]
    for field in fields:
        if field.default not in (None, ()):
            assert told[field.name] == f"`{shown(field.default)}`"


def shown(default: object) -> str:
    if isinstance(default, int) and type(default).__name__ in ("Seconds", "Settle", "Wait"):
        return f'"{default // 60}m"'
    return json.dumps(default, default=str)


def test_each_of_consuls_variables_is_told() -> None:
    assert all(f"`{name}`" in CONFIGURATION for name in VARIABLES)


@pytest.mark.parametrize("index", [0, 1])
def test_the_examples_of_a_configuration_load(tmp_path: Path, index: int) -> None:
    path = tmp_path / "lbagent.toml"
    path.write_text(re.findall(r"```toml\n(.*?)```", CONFIGURATION, re.DOTALL)[index])
    config = load(path, {}, needs="edge" if index == 0 else "backend")
    assert isinstance(config, Config)


def test_each_path_of_the_api_is_told() -> None:
    told = re.findall(r"^\| `([A-Z]+) (/.*?)` \|", API, re.MULTILINE)
    routes = Api(FakeControl(status())).routes()
    assert told == [(route.method, route.path.replace("{id:.+}", "{id}")) for route in routes]


def test_each_field_of_the_api_is_told() -> None:
    for kind in (Status, ServiceStatus, BackendStatus, DeviceStatus):
        assert [name for name in kind.__dataclass_fields__ if f"`{name}`" not in API] == []
    assert [standing for standing in Standing if f"`{standing}`" not in API] == []


def test_each_metric_is_told_and_no_other() -> None:
    text = render(status(service("web", backend("web-1"))), 0.0).decode()
    told = re.findall(r"`(lbagent_\w+)`", API.partition("## Metrics")[2].partition("Worth")[0])
    assert told == list(dict.fromkeys(told))
    assert set(told) == set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))


@pytest.mark.parametrize("name", ["web.json", "dns-by-tags.json"])
def test_the_example_services_make_sense(name: str) -> None:
    example = json.loads((ROOT / "contrib" / "consul" / name).read_text())["service"]
    assert isinstance(parse(example.get("meta", {}), example["tags"], example["port"]), Options)
    assert "lb" in example["tags"]
