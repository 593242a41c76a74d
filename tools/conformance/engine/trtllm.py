"""The row of the trtllm engine: on TensorRT-LLM, or on the stand-in of a checkout's tests."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Protocol, cast

from libs.clock import SystemClock
from services.worker.config import WorkerSection
from services.worker.engine.base import Adapter
from services.worker.engines import Equipment, make_equipment
from tools.conformance.engine.rows import CAPACITY, CONTEXT_LENGTH, Row, digest_of
from tools.conformance.hf_lora import write_adapter
from tools.conformance.verdict import CannotShow
from tools.local.place import ROOT

STAND_IN = ROOT / "tests" / "standins"
_MODEL_WRITER = STAND_IN / "tiny_hf_model.py"
_KEPT = (
    "python",
    "load_within",
    "parallelism",
    "quantization",
    "speculative",
    "guided_decoding",
    "multi_node",
)
_SETTINGS = "MAAS_STANDIN_TRTLLM"
_BLOCK_TOKENS = 16
_CACHE_TOKENS = 1024
_STEP_S = 0.0005
"""As fast as it can, it has said all before an abort arrives."""


class ModelWriter(Protocol):
    """What is used of the module that writes the stand-in's model."""

    def write_model(self, folder: Path, *, context: int) -> object:
        """Writes a model directory."""
        ...


def trtllm(folder: Path) -> Row:
    """The engine on the stand-in, which is no TensorRT-LLM and proves nothing about one.

    Raises:
        CannotShow: this is no checkout, or a package is missing.
    """
    require_stand_in()
    model = folder / "model"
    write_tiny_model(model)
    return trtllm_row(
        model,
        folder,
        environment=stand_in_environment({"step_s": _STEP_S}),
        is_repeatable=True,
        remark="on the stand-in of tests/standins: the adapter is looked at, not TensorRT-LLM",
    )


def require_stand_in() -> None:
    """Makes sure that the stand-in can take TensorRT-LLM's place.

    Raises:
        CannotShow: TensorRT-LLM itself is there, this is no checkout, or a package is missing.
    """
    if importlib.util.find_spec("tensorrt_llm") is not None:
        raise CannotShow("TensorRT-LLM is installed here: make gpu-check MODEL=<directory>")
    if not (STAND_IN / "tensorrt_llm").is_dir():
        raise CannotShow("needs TensorRT-LLM, or a checkout with the stand-in in tests/standins")
    if importlib.util.find_spec("tokenizers") is None:
        raise CannotShow("needs the package tokenizers: make setup-dev")


def stand_in_environment(settings: Mapping[str, object]) -> dict[str, str]:
    """Variables for processes that find the stand-in where they look for TensorRT-LLM.

    Args:
        settings: of the stand-in, where its variable does not say otherwise already.

    Raises:
        CannotShow: the variable cannot be read.
    """
    given = os.environ.get(_SETTINGS) or "{}"  # noqa: TID251 - the stand-in's, not the suite's
    try:
        told = json.dumps({**settings, **json.loads(given)})
    except (TypeError, ValueError):
        raise CannotShow(f"{_SETTINGS} is no JSON object") from None
    return {"PYTHONPATH": str(STAND_IN), _SETTINGS: told}


def write_tiny_model(folder: Path, *, context: int = 512) -> None:
    """Writes the model directory that the stand-in runs.

    Args:
        folder: made here.
        context: prompt and output together, tokens.

    Raises:
        CannotShow: this is no checkout.
    """
    spec = importlib.util.spec_from_file_location("maas_tiny_hf_model", _MODEL_WRITER)
    if spec is None or spec.loader is None:
        raise CannotShow(f"{_MODEL_WRITER} cannot be read")
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their own module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    cast("ModelWriter", module).write_model(folder, context=context)


def trtllm_row(
    model: Path,
    folder: Path,
    *,
    section: Mapping[str, object] | None = None,
    environment: Mapping[str, str],
    is_repeatable: bool,
    remark: str,
) -> Row:
    """A row for a Hugging Face model.

    Args:
        model: its directory.
        folder: for adapters.
        section: [worker.trtllm] of a configuration; None for the defaults. Of it the contract keeps
            how the model is loaded; cache, batches, adapters and statistics are its own.
        environment: variables that the engine's process needs.
        is_repeatable: the model draws the same again, whatever else runs.
        remark: what a reader has to know.
    """
    adapters = folder / "adapters"
    adapters.mkdir(exist_ok=True)
    make = partial(_equipment, model, adapters, section or {})
    return Row(
        name="trtllm",
        make=lambda: make().engine,
        tokenizer=lambda: make().tokenizer,
        bos_id=make().bos_id,
        adapter=partial(_adapter, model),
        unusable=_unusable,
        check_adapter=make().check_adapter,
        is_deterministic=False,
        is_repeatable=is_repeatable,
        continues_constraints=False,
        child_module="services.worker.engine.trtllm_child",
        has_helper=True,
        environment=environment,
        remark=remark,
    )


def _equipment(model: Path, adapters: Path, section: Mapping[str, object]) -> Equipment:
    return make_equipment(worker_section(model, adapters, section), SystemClock())


def worker_section(model: Path, adapters: Path, section: Mapping[str, object]) -> WorkerSection:
    """The configuration of the contract's engine.

    Args:
        model: its directory.
        adapters: directory of adapters.
        section: [worker.trtllm] that says how the model is loaded.
    """
    worker: dict[str, object] = {
        "name": "w1",
        "endpoint": "127.0.0.1:1",
        "model_version": "models/conformance/versions/1",
        "engine": "trtllm",
        "model_path": model,
        "adapters_dir": adapters,
        "capacity": CAPACITY,
        "context_length": CONTEXT_LENGTH,
        "trtllm": {
            **{name: section[name] for name in _KEPT if name in section},
            "kv_cache": {"tokens_per_block": _BLOCK_TOKENS, "max_tokens": _CACHE_TOKENS},
            "lora": {"enabled": True, "target_modules": ["q_proj", "v_proj"]},
            "statistics": {"poll_interval": "10ms"},
        },
    }
    return WorkerSection.model_validate(worker)


def _adapter(model: Path, folder: Path, number: int) -> Adapter:
    path = folder / f"a{number}"
    digest = write_adapter(path, model, seed=number)
    return Adapter(name=f"adapters/a{number}", path=path, digest=digest)


def _unusable(folder: Path) -> Adapter:
    path = folder / "bad"
    path.mkdir()
    (path / "adapter_config.json").write_text("{}", encoding="utf-8")
    return Adapter(name="adapters/bad", path=path, digest=digest_of(b""))
