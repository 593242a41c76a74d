"""The llamacpp engine: a GGUF model on the CPU, in a child process (llamacpp_child).

Exactness. A token is drawn from (logits, seed, output position). The default KV cache, keys in
q8_0 and values in f16, makes llama.cpp compute attention for each row alone; with weights whose
kernels do so, too (Q8_0 and Q4_0 do; F16, F32 and the K types do not), a lane's logits have the
same bits alone and in company, in one prefill or continued after a death. Whether the loaded model
is such is measured at start and told by EngineInfo.is_deterministic. Without it the last bits
differ with the company, and a lane takes another token only where two are nearly tied. The same
holds between kinds of CPU in any case, and for lanes with an adapter, since its matrices are F32 or
F16.

Prefix cache. What a lane computed stays in its slot until that is needed; see llamacpp_slots. It is
no load: kv_used_tokens counts what running lanes hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from services.worker.engine.child_engine import ChildEngine
from services.worker.engine.child_processes import ChildProgram
from services.worker.engine.wire_facts import Setting

_PROGRAM: Final = ChildProgram(module="services.worker.engine.llamacpp_child", name="llama.cpp")


class LlamaCppEngine(ChildEngine):
    """An Engine over a GGUF file, as services.worker.engine.base says.

    The KV cache is allocated whole at start: capacity * context_length * layers * KV heads * head
    size * about 3 bytes (1.06 for keys, 2 for values). The first embedding makes room for up to
    four more contexts. Eight adapters stay loaded, those of running lanes always; loading one
    delays the step in progress by about the time it takes to read its file.

    Args:
        model_path: GGUF file of a decoder-only model.
        capacity: executions in the batch, 1 to 256. More submits than that wait, first come first
            served; the caller bounds how many.
        context_length: prompt and output together, tokens. None takes the length the model was
            trained for, at most 8192, so that a 128k model does not ask for tens of gigabytes.
        threads: that compute. One for each core that nobody else wants: the threads wait for each
            other by spinning, so one that is kept from its core slows all down several times.
        kv_dtype_k: number type of the cached keys: "q8_0", "f16" or "f32".
        kv_dtype_v: number type of the cached values, likewise. The defaults are needed for
            exactness and are about as fast as f16; f16 for both prefills long prompts faster and
            takes head sizes that are no multiple of 32.
        prefill_tokens: most prompt tokens in one step, which is what a long prompt adds to the
            time until the other lanes' next token.
        start_timeout_s: most time that loading may take, hashing the file included.
        expected_digest: "sha256:<hex>" that the file has to have, compared before llama.cpp reads
            any of it; None for any.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        capacity: int,
        context_length: int | None = None,
        threads: int,
        kv_dtype_k: str = "q8_0",
        kv_dtype_v: str = "f16",
        prefill_tokens: int = 128,
        start_timeout_s: float = 600.0,
        expected_digest: str | None = None,
    ) -> None:
        settings: dict[str, Setting] = {
            "path": str(model_path.absolute()),
            "capacity": capacity,
            "context_length": context_length,
            "threads": threads,
            "kv_dtype_k": kv_dtype_k,
            "kv_dtype_v": kv_dtype_v,
            "prefill_tokens": prefill_tokens,
            "expected_digest": expected_digest,
        }
        super().__init__(_PROGRAM, settings, start_timeout_s=start_timeout_s)
