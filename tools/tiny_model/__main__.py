"""Command line: corpus, train, export, evaluate; each reads what the one before it wrote.

The folder of a run is scratch space and belongs outside the repository; only the exported file is
kept.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from tools.tiny_model.corpus import TRAIN_SEED, read_corpus, write_corpus

TOKENIZER_DOCUMENTS = 20_000
"""Documents that the tokenizer is trained on; more of them change no merge that matters."""


def main() -> None:
    """Run one command."""
    arguments = _parser().parse_args()
    command: str = arguments.command
    folder: Path = arguments.run
    if command == "corpus":
        _make_corpus(folder, arguments.documents)
    elif command == "train":
        _train(folder, arguments)
    elif command == "export":
        _export(folder, arguments.out, arguments.precision)
    else:
        _evaluate(arguments.model, arguments.topics)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_model", description=__doc__)
    parser.set_defaults(run=Path())
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus", help="write corpus.jsonl and tokenizer.json")
    corpus.add_argument("--run", type=Path, required=True)
    corpus.add_argument("--documents", type=int, default=60_000)
    train = commands.add_parser("train", help="write weights.pt")
    train.add_argument("--run", type=Path, required=True)
    train.add_argument("--steps", type=int, default=1600, help="length of the schedule of rates")
    train.add_argument("--until", type=int, help="stop after so many steps of it")
    train.add_argument("--resume", action="store_true", help="start from the weights of the run")
    train.add_argument("--flat", type=float, default=0.3, help="share before the rates fall")
    train.add_argument("--rate", type=float, default=1.0, help="share of the peak rates")
    train.add_argument("--longest", type=int, default=1024, help="tokens of a document")
    train.add_argument("--batch-tokens", type=int, default=2048)
    train.add_argument("--threads", type=int, default=2)
    train.add_argument("--seed", type=int, default=1)
    export = commands.add_parser("export", help="write a GGUF file")
    export.add_argument("--run", type=Path, required=True)
    export.add_argument("--out", type=Path, required=True)
    export.add_argument("--precision", choices=("f32", "q8_0"), default="q8_0")
    evaluate = commands.add_parser("evaluate", help="print the report on a GGUF file")
    evaluate.add_argument("--model", type=Path, required=True)
    evaluate.add_argument("--topics", type=int, default=40)
    return parser


# Each command imports its own libraries, so that making a corpus does not need torch.


def _make_corpus(folder: Path, documents: int) -> None:
    from tools.tiny_model.tokenizer import train_tokenizer  # noqa: PLC0415

    path = folder / "corpus.jsonl"
    write_corpus(path, TRAIN_SEED, documents)
    tokenizer = train_tokenizer(itertools.islice(read_corpus(path), TOKENIZER_DOCUMENTS))
    tokenizer.save(str(folder / "tokenizer.json"))


def _train(folder: Path, arguments: argparse.Namespace) -> None:
    from tools.tiny_model.network import Shape  # noqa: PLC0415
    from tools.tiny_model.train import Recipe, train  # noqa: PLC0415

    recipe = Recipe(
        steps=arguments.steps,
        until=arguments.until or arguments.steps,
        resume=arguments.resume,
        flat=arguments.flat,
        rate=arguments.rate,
        longest=arguments.longest,
        batch_tokens=arguments.batch_tokens,
        threads=arguments.threads,
        seed=arguments.seed,
    )
    train(folder, recipe, Shape())


def _export(folder: Path, out: Path, precision: str) -> None:
    from tools.tiny_model.gguf_file import Precision, write_model  # noqa: PLC0415
    from tools.tiny_model.tokenizer import load_tokenizer  # noqa: PLC0415
    from tools.tiny_model.train import load_network  # noqa: PLC0415

    tokenizer = load_tokenizer(folder / "tokenizer.json")
    write_model(out, load_network(folder), tokenizer, Precision(precision))


def _evaluate(model: Path, topics: int) -> None:
    from tools.tiny_model.evaluate import Plan, write_report  # noqa: PLC0415

    write_report(model, Plan(topics=topics))


if __name__ == "__main__":
    main()
