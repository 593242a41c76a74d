"""The tokenizer of a Hugging Face model directory, in the worker's process.

tokenizer.json is read by the library `tokenizers`, an extra of this project: it is imported when
the first one is made. Only files of the directory are read, and no code that may stand in it.

Beginning of sequence. encode() adds nothing. Some models were trained with their bos token before
every prompt: adds_bos says so, and whoever makes prompts puts bos_id in front of those that do not
begin with it already (many chat templates write it themselves).

What was typed. There are two of the library's tokenizers: in one the texts of control tokens are
those tokens; in the other no text is (see hf_vocabulary.py). Added tokens that are not control
tokens, as "<think>" is for many models, are found in both: they are text that anybody may write.
So are the names of single bytes where the vocabulary is Unigram: "<0x0A>" is a line end there.

The space at the beginning. Vocabularies after SentencePiece take a text for the beginning of a
word, and write a space before it: before every text between control tokens ("always", and the older
files), or before the first one only ("first"). encode() does as the file says, so a prompt or a
rendered conversation that is encoded as a whole, which is the rule, has the tokens that the model
was trained on. A conversation in which somebody typed a control token is encoded in pieces: each
piece then begins like a text, with one such space more than the whole would have had.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from libs.chat_rules import JsonObject, JsonValue
from services.worker.engine.base import EngineStartError
from services.worker.engine.hf_config import CONTROLS, named_tokens, read_config, rows_of
from services.worker.engine.hf_files import (
    CONFIG_BYTES_MAX,
    TOKENIZER_BYTES_MAX,
    HfFileError,
    object_in,
    objects_in,
    read_json,
    read_text,
    require_json,
    text_in,
)
from services.worker.engine.hf_vocabulary import HfVocabulary, read_vocabulary
from services.worker.engine.hf_weights import read_weights

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

TEXT_BYTES_MAX: Final = 1 << 20
"""Longest text that encode takes, in UTF-8: a second of work, and 200 MB of memory."""

TEMPLATE_BYTES_MAX: Final = 1 << 20

_TEMPLATE: Final = "chat_template"
_DEFAULT: Final = "default"
# Any text: what the library puts around it shows what it adds.
_SAMPLE: Final = "a"


class HfTokenizer:
    """A Tokenizer, as services.worker.engine.base says. Any thread may use it.

    Loading takes up to some seconds for large vocabularies: call it off the event loop.

    Args:
        directory: of the model; with config.json and tokenizer.json.

    Attributes:
        adds_bos: the model was trained with its bos token before every sequence.
        bos_id: that token; None when the vocabulary has none.
        eos_id: the token that tokenizer_config.json calls the end of a sequence; None for none.
        control_ids: of all control tokens.

    Raises:
        EngineStartError: the files are missing, contradict each other, or are of a kind that is
            not supported; or the library is not installed.
    """

    def __init__(self, directory: Path) -> None:
        try:
            files = _Files(directory)
            vocabulary = files.vocabulary()
            self._chat_template = _find_template(directory, files.settings)
        except HfFileError as error:
            raise EngineStartError(f"the tokenizer of {directory} is unusable: {error}") from None
        self._size = len(vocabulary.pieces)
        self._pieces = vocabulary.pieces
        self.control_ids = vocabulary.control_ids
        self._reading = _load(directory, vocabulary.source)
        self._typing = _load(directory, vocabulary.plain)
        self._typing.encode_special_tokens = True
        _check_ids(directory, self._reading, vocabulary.added_ids)
        _check_ids(directory, self._typing, vocabulary.plain_ids)
        self._special_tokens = {
            name: files.named.get(name, "") for name in ("bos_token", "eos_token")
        }
        self.bos_id, self.eos_id = (
            _require_id(directory, vocabulary, name, text)
            for name, text in self._special_tokens.items()
        )
        self.adds_bos = self.bos_id is not None and self._finds_bos(files.settings)
        unknown = vocabulary.ids.get(files.named.get("unk_token", ""))
        self._check_typing(directory, vocabulary, unknown)

    @property
    def vocabulary_size(self) -> int:
        """Of the model, which may have more rows than there are tokens; see base.Tokenizer."""
        return self._size

    @property
    def chat_template(self) -> str:
        """See base.Tokenizer."""
        return self._chat_template

    @property
    def special_tokens(self) -> dict[str, str]:
        """See base.Tokenizer."""
        return dict(self._special_tokens)

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Turns text into ids; see base.Tokenizer. Releases the GIL while it works.

        Raises:
            ValueError: the text has more than TEXT_BYTES_MAX bytes.
        """
        if not text.isascii():
            # A lone surrogate is no character and has no UTF-8.
            data = text.encode("utf-8", "replace")
            size, text = len(data), data.decode("utf-8")
        else:
            size = len(text)
        if size > TEXT_BYTES_MAX:
            raise ValueError(f"a text of more than {TEXT_BYTES_MAX} bytes is not tokenised")
        library = self._reading if parse_special else self._typing
        # The method for one text keeps the GIL: half a second for the longest texts.
        (encoding,) = library.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token; see base.Tokenizer. A table look-up."""
        if token_id < 0:
            raise IndexError("a token id is not negative")
        return self._pieces[token_id]

    def _check_typing(self, directory: Path, vocabulary: HfVocabulary, unknown: int | None) -> None:
        """Types every control token, by both of its names, and sees that it does not come.

        That it cannot come rests on how vocabularies of the known kinds are made; a file can be
        made otherwise. The unknown token comes of what has no other, and does nothing.
        """
        controls = self.control_ids - {unknown}
        for text in vocabulary.added_ids.keys() | vocabulary.plain_ids.keys():
            if not controls.isdisjoint(self.encode(text, parse_special=False)):
                raise EngineStartError(
                    f"in the tokenizer of {directory} the typed text {text!r} becomes a control "
                    "token: its kind of vocabulary is not supported"
                )

    def _finds_bos(self, settings: JsonObject) -> bool:
        """Tells whether prompts begin with the bos token.

        tokenizer_config.json says so, or what the tokenizer adds when it may add tokens. One that
        adds several, as those of GLM do, leaves that to the template here.
        """
        said = settings.get("add_bos_token")
        if isinstance(said, bool):
            return said
        bare = self._reading.encode(_SAMPLE, add_special_tokens=False).ids
        whole = self._reading.encode(_SAMPLE, add_special_tokens=True).ids
        return whole[: len(bare) + 1] == [self.bos_id, *bare]


class _Files:
    """The files about a vocabulary, read."""

    def __init__(self, directory: Path) -> None:
        self._rows = rows_of(read_config(directory), lambda: read_weights(directory))
        self._tokenizer = require_json(directory, "tokenizer.json", TOKENIZER_BYTES_MAX)
        self.settings = read_json(directory, "tokenizer_config.json") or {}
        self.named = named_tokens(directory, self.settings)

    def vocabulary(self) -> HfVocabulary:
        declared: dict[int, JsonObject] = {}
        for token_id, token in object_in(self.settings.get("added_tokens_decoder")).items():
            if not token_id.isdecimal() or not isinstance(token, dict):
                raise HfFileError("tokenizer_config.json has an added token without id")
            declared[int(token_id)] = token
        return read_vocabulary(
            self._tokenizer,
            rows=self._rows,
            declared=declared,
            controls=frozenset(self.named[name] for name in CONTROLS if name in self.named),
        )


def _find_template(directory: Path, settings: JsonObject) -> str:
    """Returns the chat template; a file of its own goes before tokenizer_config.json."""
    text = read_text(directory, f"{_TEMPLATE}.jinja", TEMPLATE_BYTES_MAX)
    if text is not None:
        return text
    file = read_json(directory, f"{_TEMPLATE}.json", CONFIG_BYTES_MAX)
    return _template_in((settings if file is None else file).get(_TEMPLATE))


def _template_in(value: JsonValue | None) -> str:
    """Returns a template, or the default one of several; empty where there is none."""
    named = {text_in(item.get("name")): text_in(item.get("template")) for item in objects_in(value)}
    if len(named) == 1:
        return next(iter(named.values()))
    return named.get(_DEFAULT, "") or text_in(value)


def _load(directory: Path, source: str) -> Library:
    try:
        from tokenizers import Tokenizer  # noqa: PLC0415 - an extra, for this engine only
    except ImportError:
        raise EngineStartError(
            "the library tokenizers is not installed: pip install 'maas[trtllm]'"
        ) from None
    try:
        return Tokenizer.from_str(source)
    except Exception as error:  # noqa: BLE001 - the library raises nothing more precise
        raise EngineStartError(
            f"the tokenizer.json of {directory} cannot be loaded: {error}"
        ) from None


def _check_ids(directory: Path, library: Library, expected: Mapping[str, int]) -> None:
    """The library counts added tokens itself, whatever ids stand in the file."""
    for text, token_id in expected.items():
        found = library.token_to_id(text)
        if found != token_id:
            raise EngineStartError(
                f"the added token {text!r} of {directory} has the id {token_id} in its files and "
                f"{found} where they are loaded: ids are missing between the vocabulary and it"
            )


def _require_id(directory: Path, vocabulary: HfVocabulary, name: str, text: str) -> int | None:
    if not text:
        return None
    token_id = vocabulary.ids.get(text)
    if token_id is None:
        raise EngineStartError(
            f"the {name} {text!r} of {directory} is not among the tokens that the model knows: "
            "correct it in tokenizer_config.json"
        )
    return token_id
