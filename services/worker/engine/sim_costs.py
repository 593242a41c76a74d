"""How long the simulated GPU takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SimCosts:
    """What the simulated GPU can do. The defaults are about one H100 with an 8B model.

    Attributes:
        prefill_tokens_per_s: prompt tokens; 0 means at no cost.
        prefill_chunk_tokens: most prompt tokens in one step.
        decode_base_s: of a step, whatever runs.
        decode_per_lane_s: more for each execution that decodes.
        adapter_load_s: of loading a LoRA adapter.
        adapters: LoRA adapters that are loaded at the same time.
        mean_output_tokens: mean length at which the model ends by itself; 0 means never.
    """

    prefill_tokens_per_s: float = 20_000.0
    prefill_chunk_tokens: int = 2048
    decode_base_s: float = 0.008
    decode_per_lane_s: float = 0.000_05
    mean_output_tokens: int = 0
    adapter_load_s: float = 0.05
    adapters: int = 8

    def step_s(self, prefilled: int, decoding: int) -> float:
        """Returns the seconds that a step takes."""
        prefill_s = prefilled / self.prefill_tokens_per_s if self.prefill_tokens_per_s else 0.0
        return prefill_s + self.decode_base_s + self.decode_per_lane_s * decoding


FLAT_OUT = SimCosts(
    prefill_tokens_per_s=0,
    prefill_chunk_tokens=1 << 30,
    decode_base_s=0,
    decode_per_lane_s=0,
    adapter_load_s=0,
)
"""No cost at all: for benchmarks of everything else."""
