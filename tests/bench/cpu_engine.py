"""The CPU engine through the suite against the same engine driven bare, with the same threads."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.bench import bare, random_model
from tests.bench.load import Load, Measured, Result, run
from tests.bench.measure import middle, quantile
from tests.bench.report import against, by_process, table
from tests.bench.targets import ROOT, suite

VOCABULARY = ROOT / "services" / "worker" / "models" / "maas-tiny-story.gguf"
CAPACITY = 32
AIM = 0.95
TOKENS = {1: 192, 8: 48, 32: 24}
"""Tokens of each stream, by the number of streams."""


def cpu_engine(repeats: int, *, is_quick: bool) -> None:
    """Tokens per second of a model of more than 100 million parameters, by number of streams."""
    shape = random_model.Shape()
    found: dict[int, list[tuple[Result, Measured]]] = {count: [] for count in TOKENS}
    with tempfile.TemporaryDirectory(prefix="maas-model-") as folder:
        path = Path(folder) / "random.gguf"
        random_model.write(path, VOCABULARY, shape)
        flags = ["--engine=llamacpp", f"--model={path}", f"--capacity={CAPACITY}"]
        with suite(flags) as whole:
            for _ in range(repeats):
                for count, runs in found.items():
                    tokens = 8 if is_quick else TOKENS[count]
                    load = Load(kind="streams", count=count, tokens=tokens)
                    spec = bare.Spec(model=str(path), capacity=CAPACITY, step_s=None, load=load)
                    runs.append((bare.measure(spec), run(whole, load)))
    rows = []
    for count, runs in found.items():
        alone = quantile([item.tokens / item.seconds for item, _ in runs], 0.5)
        through = quantile([item.result.tokens / item.result.seconds for _, item in runs], 0.5)
        ratio = through / alone
        aim = against(ratio, AIM, is_least=True)
        rows.append([str(count), f"{alone:.1f}", f"{through:.1f}", f"{ratio:.3f}", aim])
    table(
        f"CPU engine, {shape.parameters() / 1e6:.0f} million parameters, {bare.THREADS} thread(s)",
        ["streams", "bare tokens/s", "suite tokens/s", "ratio", "aim"],
        rows,
    )
    columns = {}
    for count, runs in found.items():
        measured = middle([item for _, item in runs], lambda item: item.total_s)
        columns[f"{count} streams"] = measured.us_per(measured.result.tokens)
    by_process("CPU us per token by process", columns)
