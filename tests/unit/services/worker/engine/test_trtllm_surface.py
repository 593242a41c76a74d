"""What is found of the installed TensorRT-LLM, and what is refused."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest

from services.worker.engine.base import EngineStartError
from services.worker.engine.trtllm_surface import REQUIRED, detect
from tests.unit.services.worker.engine.trtllm_world import STANDINS, VERSIONS, installed, package


@pytest.mark.parametrize("version", VERSIONS)
def test_every_supported_version_has_what_is_needed(version: str) -> None:
    with installed(version) as surface:
        assert surface.version == version
        # Behind **kwargs, where a signature does not show it.
        assert {"kv_cache_config", "enable_iter_perf_stats"} <= surface.llm_arguments
        assert "kwargs" not in surface.llm_arguments
        assert {"inputs", "cache_salt", "lora_request"} <= surface.generate_parameters
        assert surface.sampling.defaults["max_tokens"] == 32
        assert surface.configs["KvCacheConfig"].defaults["tokens_per_block"] == 32
        assert "LoraConfig" in surface.configs
        assert surface.guided is not None
        assert "json" in surface.guided.defaults
        assert surface.has_stats
        assert surface.has_kv_events
        assert issubclass(surface.request_error, RuntimeError)


def test_what_newer_versions_have_is_not_assumed_in_older_ones() -> None:
    with installed("1.2.1") as old:
        assert "priority" not in old.generate_parameters
        assert not old.has_health_check
        assert old.engine_dead_error is None
    with installed("1.4.0rc1") as new:
        assert "priority" in new.generate_parameters
        assert new.has_health_check
        assert new.engine_dead_error is not None


def test_nothing_calls_out_while_it_is_imported(tmp_path: Path) -> None:
    (tmp_path / "tensorrt_llm").mkdir()
    source = "import os\n__version__ = ','.join(os.environ[name] for name in %r)"
    names = ("TRTLLM_NO_USAGE_STATS", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    (tmp_path / "tensorrt_llm" / "__init__.py").write_text(source % (names,))

    with package(tmp_path), pytest.raises(EngineStartError, match="calls itself '1,1,1'"):
        detect()


def test_the_log_says_in_one_line_what_was_found() -> None:
    with installed("1.2.1") as surface:
        line = surface.describe()

    assert "\n" not in line
    assert line.startswith("TensorRT-LLM 1.2.1: ")
    assert "without trace_headers priority health_check" in line


def test_a_missing_package_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)

    with pytest.raises(EngineStartError, match="not installed: run the worker in NVIDIA's"):
        detect()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise OSError('libcuda.so.1: no such file')", r"OSError: libcuda\.so\.1.*check the GPU"),
        ("import a_library_of_cuda", "ModuleNotFoundError: .*a_library_of_cuda"),
        ("__version__ = '1.1.0'", r"TensorRT-LLM 1\.1\.0 is too old: install 1\.2"),
        ("__version__ = 'nightly'", "calls itself 'nightly'"),
        ("__version__ = '1.2.1'", "has no LLM"),
    ],
)
def test_a_package_that_cannot_be_used_is_said_with_what_to_do(
    tmp_path: Path, source: str, said: str
) -> None:
    (tmp_path / "tensorrt_llm").mkdir()
    (tmp_path / "tensorrt_llm" / "__init__.py").write_text(source)

    with package(tmp_path), pytest.raises(EngineStartError, match=said):
        detect()


def test_no_engine_starts_that_would_mix_the_caches_of_tenants() -> None:
    with package(STANDINS, version="1.2.1"):
        llm = _module().LLM
        signature = inspect.signature(llm.generate_async)
        kept = [value for name, value in signature.parameters.items() if name != "cache_salt"]
        llm.generate_async.__signature__ = signature.replace(parameters=kept)

        with pytest.raises(EngineStartError, match="has no cache_salt, without which tenants"):
            detect()


def test_no_engine_starts_that_cannot_tell_a_failed_request_from_its_end() -> None:
    with package(STANDINS, version="1.2.1"):
        _module()
        for place in ("tensorrt_llm.executor", "tensorrt_llm.executor.utils"):
            delattr(sys.modules[place], "RequestError")

        with pytest.raises(EngineStartError, match="has no RequestError"):
            detect()


def test_fields_without_a_default_are_known_as_such() -> None:
    with installed("1.2.1") as surface:
        assert surface.lora_request is not None
        names = surface.configs["LoraConfig"].defaults

    assert REQUIRED not in names.values()
    assert names["max_lora_rank"] == 64


def _module() -> Any:
    import tensorrt_llm  # noqa: PLC0415 - the one that the test has put there

    return tensorrt_llm
