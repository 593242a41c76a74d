"""[worker.trtllm]: what is refused, with the key and what to do, before anything is loaded."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pydantic
import pytest

from libs import config as configuration
from libs import process
from services.worker.config import Config, WorkerSection
from services.worker.trtllm_config import TrtllmSection

EXAMPLES = Path(__file__).parents[4] / "deploy" / "config" / "example"
EXAMPLE = EXAMPLES / "worker-trtllm.toml"


def worker(**values: Any) -> WorkerSection:
    base = {
        "name": "w1",
        "endpoint": "h:1",
        "model_version": "models/m/versions/1",
        "engine": "trtllm",
        "model_path": "/models/m",
    }
    return WorkerSection.model_validate({**base, **values})


def section(**values: Any) -> TrtllmSection:
    return TrtllmSection.model_validate(values)


def run_check(path: Path, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    async def main(_: Config) -> None:
        raise AssertionError("only the file is checked")

    monkeypatch.setattr(sys, "argv", ["worker", "--config", str(path), "--check-config"])
    with pytest.raises(SystemExit) as ended:
        process.run(Config, main)
    return ended.value.code


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_an_example_is_good_without_tensorrt_llm_and_without_the_model(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_check(path, monkeypatch) == process.EXIT_OK


def test_the_example_has_a_key_of_every_section() -> None:
    values = tomllib.loads(EXAMPLE.read_text())["worker"]["trtllm"]

    assert values.keys() == TrtllmSection.model_fields.keys()


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ("tensor = 1", "tensor = 0", "worker.trtllm.parallelism.tensor: .*greater"),
        ('dtype = "fp8"', 'dtype = "int4"', "worker.trtllm.kv_cache.dtype: .*'auto' or 'fp8'"),
        ('"16GiB"', '"16 GB"', r'worker.trtllm.kv_cache.host_size: .*"16GiB"'),
        ("stream_interval = 1", "stream_interval = 9", "worker.trtllm.batching: .*_under_load"),
        ("max_batch_size = 256", "batch_sizes = [0]", "worker.trtllm.cuda_graphs.batch_sizes.0"),
        ('dtype = "auto"', 'dtype = "fp8"', "worker.trtllm.quantization.dtype: .*'bfloat16'"),
        ('kind = "none"', 'kind = "eagle"', "worker.trtllm.speculative: .*tokens must be set"),
        ('"llguidance"', '"outlines"', "worker.trtllm.guided_decoding.backend: .*'xgrammar'"),
        ("max_loras = 8", "max_loras = 65", "worker.trtllm.lora: .*max_cpu_loras = 64 must be"),
        ('"100ms"', "100", r'worker.trtllm.statistics.poll_interval: .*"250ms"'),
        ("nodes = 1", "nodes = 2", "worker.trtllm: .*parallelism.gpus_per_node must be set"),
        ("tensor = 1", "trust_remote_code = true", "parallelism.trust_remote_code: Extra inputs"),
        ("[worker.trtllm]", "[worker.trtllm]\ntrust_remote_code = true", "trtllm.trust_remote"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_wrong_value_ends_the_start_with_78_and_the_path_of_its_key(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    was: str,
    now: str,
    said: str,
) -> None:
    text = EXAMPLE.read_text()
    # The last one: comments of the example mention some values, too.
    head, _, tail = text.rpartition(was)
    path = tmp_path / "worker.toml"
    path.write_text(head + now + tail)

    assert run_check(path, monkeypatch) == process.EXIT_BAD_CONFIG
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"parallelism": {"tensor": 8, "moe_expert": 3}}, "moe_expert = 3 must divide tensor = 8"),
        (
            {"parallelism": {"tensor": 8, "moe_expert": 4, "moe_tensor": 4}},
            r"moe_expert \* moe_tensor = 16 must be tensor = 8",
        ),
        ({"parallelism": {"attention_data_parallel": True}}, "needs tensor = 2"),
        (
            {"parallelism": {"tensor": 16, "gpus_per_node": 8}},
            "set multi_node.nodes = 2, or take fewer",
        ),
        (
            {"parallelism": {"tensor": 8, "gpus_per_node": 8}, "multi_node": {"nodes": 2}},
            "= 16 must be parallelism.tensor",
        ),
        ({"kv_cache": {"tokens_per_block": 33}}, "one of 8, 16, 32, 64, 128"),
        ({"kv_cache": {"reuse": False}}, "statistics.kv_events .* set it to false, too"),
        (
            {
                "kv_cache": {"reuse": False, "host_size": "1GiB"},
                "statistics": {"kv_events": False},
            },
            "host_size keeps blocks for reuse",
        ),
        (
            {"batching": {"chunked_prefill": False, "chunking_policy": "equal_progress"}},
            "no meaning without chunked_prefill",
        ),
        ({"cuda_graphs": {"enabled": False, "batch_sizes": [1]}}, "need enabled = true"),
        ({"cuda_graphs": {"max_batch_size": 8, "batch_sizes": [1]}}, "not both"),
        ({"speculative": {"tokens": 3}}, 'tokens has no meaning for kind = "none"'),
        (
            {"speculative": {"kind": "mtp", "tokens": 2, "model_path": "/d"}},
            'model_path has no meaning for kind = "mtp"',
        ),
        (
            {"speculative": {"kind": "draft", "tokens": 2, "model_path": "org/name"}},
            "Hugging Face Hub",
        ),
        ({"speculative": {"kind": "ngram", "tokens": 2}}, "max_ngram must be set"),
        (
            {"speculative": {"kind": "mtp", "tokens": 2}, "parallelism": {"pipeline": 2}},
            "does not go with parallelism.pipeline",
        ),
        (
            {
                "speculative": {"kind": "ngram", "tokens": 2, "max_ngram": 2},
                "batching": {"overlap_scheduler": True},
            },
            "does not go with batching.overlap_scheduler",
        ),
        ({"lora": {"max_rank": 8}}, "need enabled = true"),
        ({"python": "python3"}, "absolute path of a Python"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=said):
        section(**values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_path": "meta-llama/Llama-3.1-8B"}, "nothing is downloaded"),
        ({"model_path": None}, "model_path must be set for the trtllm engine"),
        ({"digest": "sha256:12"}, "digest"),
        ({"threads": 4}, "threads has no meaning"),
        ({"adapters_dir": "/adapters"}, "go together"),
        ({"trtllm": {"lora": {"enabled": True}}}, "go together"),
        ({"trtllm": {"batching": {"max_num_tokens": 255}}}, "256 tokens of a step"),
        (
            {"trtllm": {"speculative": {"kind": "mtp", "tokens": 32}}},
            "8448 tokens of a step in which all requests decode",
        ),
        ({"trtllm": {"batching": {"chunked_prefill": False}}}, "context_length must be set"),
        (
            {"context_length": 8193, "trtllm": {"batching": {"chunked_prefill": False}}},
            "8192 is less than context_length = 8193, so long prompts would be refused",
        ),
        (
            {"context_length": 4096, "trtllm": {"kv_cache": {"max_tokens": 4095}}},
            "the longest requests would never fit",
        ),
        ({"trtllm": {"load_within": "0s"}}, "load_within"),
        ({"capacity": 8, "trtllm": {"cuda_graphs": {"batch_sizes": [1, 16]}}}, "capacity = 8"),
    ],
)
def test_what_contradicts_the_worker_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=said):
        worker(**values)


def test_sections_of_other_engines_are_refused() -> None:
    with pytest.raises(pydantic.ValidationError, match="trtllm has no meaning for the sim"):
        worker(engine="sim", model_path=None, trtllm={})
    with pytest.raises(pydantic.ValidationError, match="trtllm has no meaning for the llamacpp"):
        worker(engine="llamacpp", trtllm={})


def test_sizes_are_numbers_or_have_a_unit() -> None:
    found = [
        section(kv_cache={"host_size": size}).kv_cache.host_size for size in (7, "3KiB", "16GiB")
    ]

    assert found == [7, 3 * 1024, 16 * 1024**3]


def test_a_large_model_needs_few_words() -> None:
    config = configuration.load(Config, EXAMPLES / "worker-trtllm-multi-node.toml")

    assert config.worker.trtllm.parallelism.gpus == 16
    assert config.worker.places == 128


def test_all_of_a_mixture_is_spread_over_its_gpus() -> None:
    found = section(parallelism={"tensor": 8, "moe_expert": 4, "moe_tensor": 2, "gpus_per_node": 8})

    assert found.parallelism.gpus == 8


def test_whole_prompts_fit_where_the_context_does() -> None:
    found = worker(context_length=8192, trtllm={"batching": {"chunked_prefill": False}})

    assert found.places == 256
