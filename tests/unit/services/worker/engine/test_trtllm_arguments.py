"""What LLM() is called with, for each section of the configuration and each version."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pydantic
import pytest

from services.worker.engine.base import EngineStartError
from services.worker.engine.trtllm_api import Make
from services.worker.engine.trtllm_arguments import check_launch, draws_in_graph, llm_arguments
from services.worker.engine.trtllm_settings import Values, read_settings
from services.worker.engine.trtllm_surface import Config, Surface
from tests.standins.tiny_hf_model import write_model
from tests.unit.services.worker.engine.trtllm_world import VERSIONS, installed, told

EAGLE = {"kind": "eagle", "tokens": 3, "model_path": "/models/eagle"}
EVERYTHING: dict[str, Any] = {
    "parallelism": {"tensor": 4, "moe_expert": 2, "moe_tensor": 2, "gpus_per_node": 8},
    "kv_cache": {
        "free_gpu_memory_fraction": 0.5,
        "max_tokens": 4096,
        "partial_reuse": False,
        "dtype": "fp8",
        "host_size": "1GiB",
        "tokens_per_block": 64,
        "event_buffer": 1000,
    },
    "batching": {
        "max_num_tokens": 2048,
        "capacity_policy": "max_utilization",
        "chunking_policy": "equal_progress",
        "stream_interval": 2,
    },
    "cuda_graphs": {"batch_sizes": [8, 1, 4, 1]},
    "quantization": {"dtype": "bfloat16"},
    "speculative": {"kind": "ngram", "tokens": 4, "max_ngram": 3, "max_concurrency": 8},
    "guided_decoding": {"backend": "xgrammar"},
    "lora": {"enabled": True, "max_rank": 8, "max_loras": 2, "max_cpu_loras": 4},
}


@pytest.fixture(scope="module", params=VERSIONS)
def surface(request: pytest.FixtureRequest) -> Iterator[Surface]:
    with installed(request.param) as found:
        yield found


@pytest.fixture(scope="module")
def oldest() -> Iterator[Surface]:
    with installed("1.2.1") as found:
        yield found


def fields(value: object) -> dict[str, Any]:
    """Of a part of the configuration, whatever kind of class it is in this version."""
    if isinstance(value, pydantic.BaseModel):
        return value.model_dump(mode="json")
    return dataclasses.asdict(value)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("section", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_every_version_takes_what_it_is_given(
    surface: Surface, section: dict[str, Any], tmp_path: Path
) -> None:
    model = write_model(tmp_path)
    settings = told(model_path=model.folder, context_length=256, **section)

    surface.llm(**llm_arguments(settings, surface)).shutdown()


def test_nothing_in_a_model_directory_is_run_and_nothing_is_turned_into_text(
    surface: Surface,
) -> None:
    found = llm_arguments(told(), surface)

    assert found["trust_remote_code"] is False
    assert found["num_postprocess_workers"] == 0
    assert found["return_perf_metrics"] is False
    assert found["backend"] == "pytorch"
    assert found.keys() <= surface.llm_arguments


def test_all_that_was_configured_arrives(surface: Surface) -> None:
    found = llm_arguments(told(**EVERYTHING), surface)

    sizes = ("max_batch_size", "max_num_tokens", "max_seq_len", "stream_interval")
    assert [found[name] for name in sizes] == [16, 2048, 4096, 2]
    spread = ("tensor_parallel_size", "moe_expert_parallel_size", "moe_tensor_parallel_size")
    assert [found[name] for name in spread] == [4, 2, 2]
    assert found["gpus_per_node"] == 8
    assert found["enable_chunked_prefill"] is True
    assert found["disable_overlap_scheduler"] is True
    assert found["enable_iter_perf_stats"] is True
    assert found["dtype"] == "bfloat16"
    assert found["guided_decoding_backend"] == "xgrammar"
    cache = fields(found["kv_cache_config"])
    assert (cache["free_gpu_memory_fraction"], cache["max_tokens"]) == (0.5, 4096)
    assert (cache["enable_block_reuse"], cache["enable_partial_reuse"]) == (True, False)
    assert (cache["dtype"], cache["host_cache_size"]) == ("fp8", 1 << 30)
    assert (cache["tokens_per_block"], cache["event_buffer_max_size"]) == (64, 1000)
    scheduler = fields(found["scheduler_config"])
    assert scheduler["capacity_scheduler_policy"] == "MAX_UTILIZATION"
    assert scheduler["context_chunking_policy"] == "EQUAL_PROGRESS"
    graphs = fields(found["cuda_graph_config"])
    assert (graphs["batch_sizes"], graphs["enable_padding"]) == ([1, 4, 8], True)
    lora = fields(found["lora_config"])
    assert (lora["max_lora_rank"], lora["max_loras"], lora["max_cpu_loras"]) == (8, 2, 4)
    # With a directory of its own, the engine would take its tokenizer from there.
    assert lora["lora_dir"] == []
    # q, k, v, o, gate, up, down.
    assert lora["lora_target_modules"] == [
        "attn_q", "attn_k", "attn_v", "attn_dense", "mlp_h_to_4h", "mlp_gate", "mlp_4h_to_h",
    ]  # fmt: skip


def test_what_is_off_is_said_where_the_default_is_on(surface: Surface) -> None:
    section: dict[str, Any] = {
        "kv_cache": {"reuse": False},
        "cuda_graphs": {"enabled": False},
        "statistics": {"iterations": False, "kv_events": False},
        "guided_decoding": {"backend": "none"},
    }
    found = llm_arguments(told(context_length=None, **section), surface)

    assert found["cuda_graph_config"] is None
    assert found["enable_iter_perf_stats"] is False
    assert fields(found["kv_cache_config"])["enable_block_reuse"] is False
    assert fields(found["kv_cache_config"])["event_buffer_max_size"] == 0
    absent = {"guided_decoding_backend", "lora_config", "speculative_config", "max_seq_len"}
    assert found.keys().isdisjoint(absent)


@pytest.mark.parametrize(
    ("kind", "wanted", "is_off"),
    [("none", None, False), ("none", False, True), ("mtp", None, False), ("ngram", None, True)],
)
def test_the_overlap_scheduler_runs_wherever_it_can(
    oldest: Surface, *, kind: str, wanted: bool | None, is_off: bool
) -> None:
    kinds = {"none": {}, "mtp": {"tokens": 2}, "ngram": {"tokens": 2, "max_ngram": 2}}
    section: dict[str, Any] = {
        "speculative": {"kind": kind, **kinds[kind]},
        "batching": {} if wanted is None else {"overlap_scheduler": wanted},
    }

    assert llm_arguments(told(**section), oldest)["disable_overlap_scheduler"] is is_off


def test_graphs_are_recorded_up_to_the_capacity(oldest: Surface) -> None:
    found = llm_arguments(told(capacity=48), oldest)

    assert fields(found["cuda_graph_config"])["max_batch_size"] == 48


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"quantization": {"dynamic_scales": True}}, "quantization.dynamic_scales"),
        ({"lora": {"enabled": True}}, "lora.enabled"),
        ({"speculative": {"kind": "mtp", "tokens": 1}}, "speculative.kind"),
        ({"kv_cache": {"host_size": 1024}}, "kv_cache.host_size"),
        ({"parallelism": {"tensor": 2, "moe_expert": 2}}, "parallelism.moe_expert"),
        ({"statistics": {"kv_events": False}}, "statistics.iterations"),
        ({"statistics": {"iterations": False}}, "statistics.kv_events"),
        ({"guided_decoding": {"backend": "xgrammar"}}, "guided_decoding.backend"),
    ],
)
def test_what_a_version_cannot_do_is_refused_by_name(
    oldest: Surface, section: dict[str, Any], key: str
) -> None:
    poor = dataclasses.replace(
        oldest,
        llm_arguments=oldest.llm_arguments - {"moe_expert_parallel_size"},
        methods=frozenset(),
        guided=None,
        configs={
            "KvCacheConfig": without(oldest.configs["KvCacheConfig"], "host_cache_size"),
            "SchedulerConfig": oldest.configs["SchedulerConfig"],
            "CudaGraphConfig": oldest.configs["CudaGraphConfig"],
        },
    )
    off: dict[str, Any] = {"statistics": {"iterations": False, "kv_events": False}}
    values = {**off, "guided_decoding": {"backend": "none"}, **section}

    with pytest.raises(EngineStartError, match=rf"1\.2\.1 cannot .*worker\.trtllm\.{key} "):
        llm_arguments(told(**values), poor)


def without(config: Config, name: str) -> Config:
    kept = {field: default for field, default in config.defaults.items() if field != name}
    return dataclasses.replace(config, defaults=kept)


def test_what_tensorrt_llm_refuses_is_said_with_its_section(oldest: Surface) -> None:
    class KvCacheConfig(pydantic.BaseModel):
        free_gpu_memory_fraction: float
        enable_block_reuse: bool
        tokens_per_block: Literal[32]
        event_buffer_max_size: int = 0

    strict = with_config(oldest, KvCacheConfig)
    section: dict[str, Any] = {"kv_cache": {"tokens_per_block": 64}}

    with pytest.raises(EngineStartError, match=r"refuses what worker\.trtllm\.kv_cache says: "):
        llm_arguments(told(**section), strict)


def with_config(surface: Surface, kind: type[pydantic.BaseModel], *gone: str) -> Surface:
    """Puts a class in its place, as another version has it."""
    made: Make[object] = kind
    defaults = {name: field.default for name, field in kind.model_fields.items()}
    configs = {**surface.configs, kind.__name__: Config(kind.__name__, made, defaults)}
    for name in gone:
        del configs[name]
    return dataclasses.replace(surface, configs=configs)


class Eagle3DecodingConfig(pydantic.BaseModel):
    """As it is since it has this name: it samples as it is told, once it may."""

    max_draft_len: int | None = None
    speculative_model: str | None = None
    eagle3_one_model: bool = True
    allow_advanced_sampling: bool = False


class MTPDecodingConfig(pydantic.BaseModel):
    """As it is where it samples by itself, and where the number of layers is the model's."""

    max_draft_len: int | None = None
    num_nextn_predict_layers: int | None = None
    mtp_eagle_one_model: bool = True
    use_rejection_sampling: bool = True


def speculation(surface: Surface, **section: object) -> dict[str, Any]:
    return fields(llm_arguments(told(speculative=section), surface)["speculative_config"])


def test_speculation_draws_as_requests_ask_with_a_slower_form_where_it_must(
    oldest: Surface,
) -> None:
    found = speculation(oldest, **EAGLE)

    assert (found["max_draft_len"], found["speculative_model_dir"]) == (3, "/models/eagle")
    assert found["eagle3_one_model"] is False
    assert speculation(oldest, kind="mtp", tokens=2)["mtp_eagle_one_model"] is False
    assert not draws_in_graph(read_settings(told(speculative=EAGLE)), oldest)


def test_speculation_draws_as_requests_ask_by_a_switch_where_there_is_one(oldest: Surface) -> None:
    newer = with_config(oldest, Eagle3DecodingConfig)
    found = speculation(newer, **EAGLE)

    assert found == {
        "max_draft_len": 3,
        "speculative_model": "/models/eagle",
        "eagle3_one_model": True,
        "allow_advanced_sampling": True,
    }
    # That sampler knows no penalties and gives no log-probabilities.
    assert draws_in_graph(read_settings(told(speculative=EAGLE)), newer)


def test_speculation_draws_as_requests_ask_by_itself_where_it_does(oldest: Surface) -> None:
    newest = with_config(oldest, MTPDecodingConfig)
    found = speculation(newest, kind="mtp", tokens=2)

    assert (found["max_draft_len"], found["num_nextn_predict_layers"]) == (2, None)
    assert found["mtp_eagle_one_model"] is True
    assert draws_in_graph(read_settings(told(speculative={"kind": "mtp", "tokens": 2})), newest)


def test_layers_that_guess_are_counted_where_they_are_a_setting(oldest: Surface) -> None:
    assert speculation(oldest, kind="mtp", tokens=2)["num_nextn_predict_layers"] == 2


def test_what_one_tenant_wrote_is_never_guessed_from_for_another(surface: Surface) -> None:
    found = speculation(surface, kind="ngram", tokens=4, max_ngram=3)

    assert found["is_public_pool"] is False
    assert (found["max_draft_len"], found["max_matching_ngram_size"]) == (4, 3)


def test_several_machines_need_the_launcher() -> None:
    spread: dict[str, Any] = {
        "parallelism": {"tensor": 8, "pipeline": 2, "gpus_per_node": 8},
        "multi_node": {"nodes": 2},
    }
    several, one = read_settings(told(**spread)), read_settings(told())

    check_launch(one, {})
    check_launch(several, {"TLLM_SPAWN_PROXY_PROCESS": "1"})
    with pytest.raises(EngineStartError, match=r"nodes = 2, but .* trtllm-llmapi-launch"):
        check_launch(several, {})


def test_settings_are_those_that_the_worker_has_checked() -> None:
    found = read_settings(told(context_length=None, statistics={"poll_interval": "250ms"}))

    assert (found.model_path, found.capacity) == (Path("/models/m"), 16)
    assert found.context_length is None
    assert found.values("statistics").number("poll_interval") == 0.25
    assert found.values("batching").flag_or_none("overlap_scheduler") is None


@pytest.mark.parametrize(
    ("settings", "key"),
    [({}, "trtllm"), ({"trtllm": {}}, "model_path"), (dict(told(), capacity=True), "capacity")],
)
def test_settings_of_another_version_are_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(EngineStartError, match=f"cannot read .*{key} .*restart it"):
        read_settings(settings)


def test_a_section_that_is_not_there_is_refused() -> None:
    with pytest.raises(EngineStartError, match=r"cannot read trtllm\.kv_cache\.reuse"):
        Values("kv_cache", {"reuse": 1}).flag("reuse")
