from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from libs import config as configuration
from libs.clock import SystemClock
from libs.config import ConfigError
from services.worker.config import Config, WorkerSection
from services.worker.engines import make_equipment

FILE = """
[server]
listen = "127.0.0.1:7005"
metrics_listen = "127.0.0.1:8005"

[identity]
name = "worker"
token_file = "token"

[peers]
scheduler = "127.0.0.1:7004"

[worker]
name = "w1"
endpoint = "127.0.0.1:7005"
model_version = "models/sim/versions/1"
engine = "sim"
"""


def load(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "worker.toml"
    path.write_text(text)
    return configuration.load(Config, path)


def test_a_file_with_what_has_to_be_said(tmp_path: Path) -> None:
    config = load(tmp_path, FILE)

    assert config.worker.max_waiting == 64
    assert config.worker.sim.decode_base == 0.008


def test_costs_are_written_with_their_units(tmp_path: Path) -> None:
    config = load(tmp_path, FILE + '[worker.sim]\ndecode_base = "20ms"\nprefill_tokens_per_s = 0\n')

    assert config.worker.sim.decode_base == 0.02


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("surprise = 1", "surprise"),
        ("capacity = 0", "capacity"),
        ('model_path = "x.gguf"', "model_path"),
        ("context_length = 1", "context_length"),
        ('tool_parser = "xml"', "tool_parser"),
        ('reasoning_parser = "thought"', "reasoning_parser"),
    ],
)
def test_wrong_values_are_refused_by_name(tmp_path: Path, line: str, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        load(tmp_path, FILE + line)


@pytest.mark.parametrize(
    ("was", "now", "key"),
    [
        ('engine = "sim"', 'engine = "llamacpp"', "model_path"),
        ('engine = "sim"', 'engine = "other"', "engine"),
        ("models/sim/versions/1", "models/sim", "model_version"),
        ('name = "w1"', 'name = "w 1"', "name"),
    ],
)
def test_contradictions_are_refused_by_name(tmp_path: Path, was: str, now: str, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        load(tmp_path, FILE.replace(was, now))


async def test_the_sim_engine_is_made_as_configured() -> None:
    values: dict[str, Any] = {
        "name": "w1",
        "endpoint": "h:1",
        "model_version": "models/sim/versions/1",
        "engine": "sim",
        "capacity": 3,
        "context_length": 100,
    }
    equipment = make_equipment(WorkerSection.model_validate(values), SystemClock())

    info = await equipment.engine.start()

    assert (info.max_running, info.context_length) == (3, 100)
    assert equipment.engine.load().kv_total_tokens == 300
    assert equipment.bos_id is None
