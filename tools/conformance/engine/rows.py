"""Where the engines of the contract come from: what is particular to each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from libs.clock import SystemClock
from services.worker.engine.base import Adapter, Engine, Tokenizer
from services.worker.engine.sim import FLAT_OUT, SimEngine
from services.worker.engine.sim_tokenizer import SimTokenizer
from tools.conformance.lora import write_adapter
from tools.local.place import OWN_MODEL

CAPACITY = 3
CONTEXT_LENGTH = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One engine in the contract, with CAPACITY places of CONTEXT_LENGTH tokens.

    Attributes:
        name: "sim", ...
        make: an engine that has not started.
        tokenizer: of its model; blocks.
        bos_id: token that every prompt of its model begins with; None for none.
        adapter: a usable adapter; other numbers are other adapters. Takes a folder for its files.
        unusable: an adapter that is none. Takes a folder, too.
        check_adapter: looks at an adapter's files before the engine does, as the worker has it;
            None for an engine that looks itself. Raises AdapterUnusable.
        is_deterministic: what the engine has to say of itself.
        is_repeatable: its model draws the same tokens for the same request, whatever else runs,
            even where the engine promises nothing: then a difference is the engine's fault.
        continues_constraints: it goes on in the middle of a constraint.
        child_module: that its child process runs; None for an engine without one.
        has_helper: its child process has a child process of its own, without which it is dead.
        environment: variables that its child process needs.
        remark: what a reader has to know of it.
    """

    name: str
    make: Callable[[], Engine]
    tokenizer: Callable[[], Tokenizer]
    bos_id: int | None = None
    adapter: Callable[[Path, int], Adapter]
    unusable: Callable[[Path], Adapter]
    check_adapter: Callable[[Path], object] | None = None
    is_deterministic: bool
    is_repeatable: bool = True
    continues_constraints: bool = True
    child_module: str | None = None
    has_helper: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    remark: str = ""


def sim(_folder: Path) -> Row:
    """The simulated GPU, at no cost."""
    return Row(
        name="sim",
        make=_make_sim,
        tokenizer=SimTokenizer,
        adapter=_adapter_for_sim,
        unusable=lambda _folder: Adapter(name="adapters/bad", path=None, digest=""),
        is_deterministic=True,
    )


def _make_sim() -> Engine:
    return SimEngine(
        SystemClock(),
        SimTokenizer(),
        capacity=CAPACITY,
        context_length=CONTEXT_LENGTH,
        kv_tokens=CAPACITY * CONTEXT_LENGTH,
        # Its model ends by itself; most checks ignore it.
        costs=replace(FLAT_OUT, mean_output_tokens=20),
    )


def _adapter_for_sim(_folder: Path, number: int) -> Adapter:
    return Adapter(name=f"adapters/a{number}", path=None, digest=digest_of(b"%d" % number))


def llamacpp(_folder: Path) -> Row:
    """The CPU engine with our own small model."""
    # Here, so that the other engines' checks run where its library does not.
    from services.worker.engine.llamacpp import LlamaCppEngine  # noqa: PLC0415
    from services.worker.engine.llamacpp_tokenizer import LlamaCppTokenizer  # noqa: PLC0415

    return Row(
        name="llamacpp",
        make=lambda: LlamaCppEngine(
            OWN_MODEL, capacity=CAPACITY, context_length=CONTEXT_LENGTH, threads=1
        ),
        tokenizer=lambda: LlamaCppTokenizer(OWN_MODEL),
        adapter=_adapter_for_llamacpp,
        unusable=_unusable_for_llamacpp,
        is_deterministic=True,
        child_module="services.worker.engine.llamacpp_child",
    )


def _adapter_for_llamacpp(folder: Path, number: int) -> Adapter:
    path = folder / f"a{number}.gguf"
    digest = write_adapter(path, OWN_MODEL, seed=number)
    return Adapter(name=f"adapters/a{number}", path=path, digest=digest)


def _unusable_for_llamacpp(folder: Path) -> Adapter:
    path = folder / "bad.gguf"
    path.write_bytes(b"GGUF, or so it says")
    return Adapter(name="adapters/bad", path=path, digest=digest_of(path.read_bytes()))


def digest_of(data: bytes) -> str:
    """How digests are written."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
