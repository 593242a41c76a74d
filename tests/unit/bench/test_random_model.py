"""tests/bench/random_model.py: a file that llama.cpp takes, of the size that is claimed."""

from __future__ import annotations

from pathlib import Path

from services.worker.engine.llamacpp_tokenizer import LlamaCppTokenizer
from tests.bench.random_model import Shape, write

OWN_MODEL = (
    Path(__file__).resolve().parents[3] / "services" / "worker" / "models" / "maas-tiny-story.gguf"
)


def test_default_has_a_hundred_million_parameters() -> None:
    assert Shape().parameters() > 100_000_000


def test_file_has_the_vocabulary_of_its_example_and_its_own_size(tmp_path: Path) -> None:
    path = tmp_path / "random.gguf"
    shape = Shape(width=64, hidden=96, layers=1, heads=2, key_heads=1)

    write(path, OWN_MODEL, shape)

    text = "Once upon a time there was a fox."
    ours, theirs = LlamaCppTokenizer(path), LlamaCppTokenizer(OWN_MODEL)
    assert ours.vocabulary_size == shape.vocabulary
    assert ours.encode(text, parse_special=False) == theirs.encode(text, parse_special=False)
    # Q8_0 takes 34 bytes for 32 numbers; vectors and metadata are the little that is left.
    assert path.stat().st_size > shape.parameters() * 34 / 32
