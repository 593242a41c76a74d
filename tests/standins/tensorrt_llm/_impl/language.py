"""The language model of the stand-in: logits are a function of (weights, adapter, last tokens).

So greedy outputs depend on the prompt, and a prompt that goes on with an output goes on with the
same output. About every thirtieth state is the end of what it has to say: usually by the token that
the tokenizer calls the end, and every fourth time by another one of generation_config.json.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

TAIL = 6
_NOTHING = -1
_SPREAD = 1.5
_ADAPTER_SPREAD = 2.0
_END_STATES = 29
_OTHER_ENDS = 4
_END_LOGIT, _NO_END_LOGIT = 16.0, -9.0
# States are told apart by these remainders; tables of large vocabularies are shorter.
_ROWS, _ROWS_LARGE, _LARGE = 61, 7, 16_384
_MIX = 0x9E3779B97F4A7C15
_WORD = re.compile(r"^[\u0120\u2581]?[a-zA-Z]{2,}$")
_LETTER = re.compile(r"^[\u0120\u2581]?[a-zA-Z]$")
_PRINTABLE = re.compile(r"^[\u0120\u2581]?[!-~]+$")
_BYTE = re.compile(r"^<0x([0-9A-F]{2})>$")
_LIKING = {"word": 2.0, "letter": 0.0, "sign": -1.0, "rest": -8.0, "control": -30.0}


class LanguageModel:
    """The weights of one model directory.

    Attributes:
        vocabulary: rows of logits.
        context: max_position_embeddings of config.json.
        end_ids: eos_token_id of generation_config.json, or else of config.json.
    """

    def __init__(self, folder: Path) -> None:
        """Reads the directory: 20 ms for a small vocabulary.

        Raises:
            ValueError: a file is missing or is not what it should be.
        """
        config = read_json(folder / "config.json")
        self.vocabulary = _whole(config, "vocab_size")
        self.context = _whole(config, "max_position_embeddings")
        generation = folder / "generation_config.json"
        ends = read_json(generation).get("eos_token_id") if generation.is_file() else None
        self.end_ids = _ids(ends if ends is not None else config.get("eos_token_id"))
        rows = _ROWS if self.vocabulary <= _LARGE else _ROWS_LARGE
        rng = np.random.default_rng(_seed_of(folder))
        self._tables = [
            (rng.standard_normal((rows, self.vocabulary), dtype=np.float32) * _SPREAD)
            for _ in range(3)
        ]
        self._tables[0] += _likings(folder, self.vocabulary)

    def adapter(self, folder: Path) -> Floats:
        """What a LoRA adapter adds."""
        rng = np.random.default_rng(_seed_of(folder))
        rows = len(self._tables[0])
        return rng.standard_normal((rows, self.vocabulary), dtype=np.float32) * _ADAPTER_SPREAD

    def logits(self, tails: Ids, adapters: Sequence[Floats | None] = ()) -> Floats:
        """What comes next.

        Args:
            tails: the last tokens, shape (lanes, TAIL).
            adapters: of each lane; empty for none at all.

        Returns:
            shape (lanes, vocabulary).
        """
        states = _states(tails)
        rows = len(self._tables[0])
        found = self._tables[0][states[0] % rows]
        found += self._tables[1][states[1] % rows]
        found += self._tables[2][states[2] % rows]
        for at, table in enumerate(adapters):
            if table is not None:
                found[at] += table[int(states[1][at]) % rows]
        self._add_ends(found, states[2])
        return found

    def _add_ends(self, logits: Floats, states: npt.NDArray[np.uint64]) -> None:
        if not self.end_ids:
            return
        logits[:, self.end_ids] = _NO_END_LOGIT
        for at in np.flatnonzero(states % np.uint64(_END_STATES) == 0):
            turn = int(states[at]) // _END_STATES % _OTHER_ENDS
            end = self.end_ids[1] if turn == 0 and len(self.end_ids) > 1 else self.end_ids[0]
            logits[at, end] = _END_LOGIT


def tails_of(token_ids: Sequence[int]) -> Ids:
    """The last tokens behind each token, shape (tokens, TAIL)."""
    padded = np.concatenate((np.full(TAIL - 1, _NOTHING), np.asarray(token_ids, dtype=np.int64)))
    return np.lib.stride_tricks.sliding_window_view(padded, TAIL)


def log_softmax(logits: Floats) -> Floats:
    """Natural logarithms of probabilities, row by row."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    scores: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return scores


def read_json(path: Path) -> dict[str, object]:
    """Reads a JSON object.

    Raises:
        ValueError: it is missing or none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path.name}: {type(error).__name__}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no object")  # noqa: TRY004 - of the file
    return cast("dict[str, object]", found)


def _states(tails: Ids) -> list[npt.NDArray[np.uint64]]:
    """Hashes of the last token, the last three and all."""
    states: list[npt.NDArray[np.uint64]] = []
    mixed = np.zeros(len(tails), dtype=np.uint64)
    for back in range(1, TAIL + 1):
        mixed = (mixed ^ (tails[:, -back] + 2).astype(np.uint64)) * np.uint64(_MIX)
        mixed ^= mixed >> np.uint64(29)
        if back in {1, 3, TAIL}:
            states.append(mixed)
    return states


def _whole(config: dict[str, object], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json has no {name}")
    return value


def _ids(value: object) -> list[int]:
    if isinstance(value, int):
        return [value]
    return [entry for entry in value if isinstance(entry, int)] if isinstance(value, list) else []


def _seed_of(folder: Path) -> int:
    """A seed from the weights themselves.

    Raises:
        ValueError: there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"no safetensors file in {folder}")
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        digest.update(file.read_bytes())
    return int.from_bytes(digest.digest(), "little")


def _likings(folder: Path, vocabulary: int) -> Floats:
    """How much it likes each token: words before letters before anything that is no text."""
    likings = np.full(vocabulary, _LIKING["control"], dtype=np.float32)
    path = folder / "tokenizer.json"
    if not path.is_file():
        return np.zeros(vocabulary, dtype=np.float32)
    model = cast("dict[str, dict[str, int]]", read_json(path)["model"])
    for text, token_id in model["vocab"].items():
        likings[token_id] = _LIKING[_kind_of(text)]
    return likings


def _kind_of(text: str) -> str:
    byte = _BYTE.match(text)
    if byte is not None:
        text = chr(int(byte[1], 16))
    if _WORD.match(text):
        return "word"
    if _LETTER.match(text):
        return "letter"
    if text.startswith("<") and text.endswith(">") and len(text) > 2:
        return "control"
    return "sign" if _PRINTABLE.match(text) else "rest"
