"""How a line looks, for people and for machines, whoever wrote it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest
import structlog

from lbagent import logs


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    structlog.reset_defaults()


def written(form: logs.Form, level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    logs.setup(level, form, stream)
    return stream


def test_json_lines_have_event_level_time_and_fields() -> None:
    stream = written("json")
    structlog.get_logger().info("rings_swapped", vips=3, address=IPv4Address("192.0.2.1"))
    line = json.loads(stream.getvalue())
    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "rings_swapped", "level": "info", "vips": 3, "address": "192.0.2.1"}


def test_text_has_no_colours_off_a_terminal() -> None:
    stream = written("text")
    structlog.get_logger().warning("device_skipped", device="eth0")
    assert "device_skipped" in stream.getvalue()
    assert "device=eth0" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("form", ["text", "json"])
def test_lines_of_libraries_look_the_same(form: logs.Form) -> None:
    stream = written(form)
    logging.getLogger("aiohttp.server").error("bad thing: %s", "x")
    assert "bad thing: x" in stream.getvalue()
    if form == "json":
        assert json.loads(stream.getvalue())["level"] == "error"


@pytest.mark.parametrize(("level", "lines"), [("debug", 2), ("info", 1), ("error", 0)])
def test_the_level_counts_for_all(level: str, lines: int) -> None:
    stream = written("json", level)
    structlog.get_logger().debug("step_done")
    structlog.get_logger().info("applied")
    assert len(stream.getvalue().splitlines()) == lines


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_traceback_shows_no_variables(form: logs.Form) -> None:
    stream = written(form)
    password = "hunter2"
    try:
        raise ValueError(len(password))
    except ValueError:
        structlog.get_logger().exception("request_failed")
    assert "ValueError: 7" in stream.getvalue()
    assert "hunter2" not in stream.getvalue()
    if form == "json":
        assert len(stream.getvalue().splitlines()) == 1
