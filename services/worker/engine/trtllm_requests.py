"""Requests as TensorRT-LLM takes them: generate_async and the objects that it wants.

Keywords only, new objects for each request (the engine changes them), and nothing that the
installed version does not have: abilities say so before.

Cache. Executions with equal salts share the prefix cache. One that may not read it gets a salt that
nobody has: what it leaves behind is of no use to anybody and goes with time.

Adapters. The engine reads an adapter's directory when a request first names it, and again when it
has dropped it. It knows adapters by a number, which here is of one digest for ever.
"""

from __future__ import annotations

import importlib
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol, cast

from services.worker.engine.base import Adapter, AdapterUnusable, Constraint, EngineRequest
from services.worker.engine.hf_adapter import AdapterLimits, check_adapter
from services.worker.engine.hf_model import HfModel
from services.worker.engine.trtllm_api import Llm, RequestOutput
from services.worker.engine.trtllm_guided import (
    ConstraintUnusable,
    check_guided,
    find_validator,
    guided_keywords,
)
from services.worker.engine.trtllm_sampling import Ends, biases_of, sampling_keywords
from services.worker.engine.trtllm_surface import Surface

_CHECKED_MAX: Final = 256
_CHECKED_CHARACTERS_MAX: Final = 8 << 20
_SALT_BYTES: Final = 16


class Tensor(Protocol):
    """A column of numbers."""

    def __setitem__(self, at: list[int], value: Tensor) -> None:
        """Sets some of them."""
        ...


class Torch(Protocol):
    """What is used of torch.

    Attributes:
        float32: type of numbers.
    """

    float32: object

    def zeros(self, size: int, *, dtype: object) -> Tensor:
        """Makes a column of zeros."""
        ...

    def tensor(self, values: Sequence[float], *, dtype: object) -> Tensor:
        """Makes a column."""
        ...


def find_torch() -> Torch | None:
    """Returns torch, which TensorRT-LLM has loaded; None where there is none."""
    try:
        return cast("Torch", importlib.import_module("torch"))
    except ImportError:
        return None


class Guides:
    """Constraints, checked. `check` blocks and may run in another thread, one at a time.

    Args:
        surface: of the installed version.
        backend: who enforces them; None for nobody.
    """

    def __init__(self, surface: Surface, backend: str | None) -> None:
        self._make = None if surface.guided is None else surface.guided.make
        self._backend = backend
        self._validate = find_validator(backend)
        self._checked: OrderedDict[str, dict[str, object]] = OrderedDict()
        self._characters = 0

    def check(self, constraint: Constraint) -> dict[str, object]:
        """Returns the keywords of a constraint that compiles.

        Raises:
            ConstraintUnusable: it does not.
        """
        if self._backend is None:
            raise ConstraintUnusable("constraints are switched off in the engine")
        key = f"{constraint.kind.value} {constraint.grammar}"
        known = self._checked.pop(key, None)
        if known is not None:
            self._characters -= len(key)
        else:
            try:
                known = guided_keywords(constraint, self._backend)
                check_guided(known, self._validate)
            except (ValueError, TypeError) as error:
                raise ConstraintUnusable("the constraint is malformed") from error
        self._checked[key] = known
        self._characters += len(key)
        while len(self._checked) > _CHECKED_MAX or self._characters > _CHECKED_CHARACTERS_MAX:
            oldest, _ = self._checked.popitem(last=False)
            self._characters -= len(oldest)
        return known

    def make(self, keywords: Mapping[str, object]) -> object:
        """Makes what SamplingParams take.

        Raises:
            ConstraintUnusable: the version has no guided decoding.
        """
        if self._make is None:
            raise ConstraintUnusable("this version of the engine enforces no constraints")
        return self._make(**keywords)


class Shelf:
    """Adapters: those that may be used, their numbers, and which of them were used last.

    Args:
        surface: of the installed version.
        model: that they are for.
        limits: of them; None where there are none.
        most: that the engine keeps.
    """

    def __init__(
        self, surface: Surface, model: HfModel, limits: AdapterLimits | None, *, most: int
    ) -> None:
        self._make = surface.lora_request
        self._model = model
        self._limits = limits
        self._most = most
        self._numbers: dict[str, int] = {}
        self._used: OrderedDict[str, str] = OrderedDict()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters that the engine should still have, used last ones last."""
        return tuple(self._used.values())

    def check(self, adapter: Adapter) -> None:
        """Looks at an adapter's files: an engine may end by one that does not fit. Reads the disk.

        Raises:
            AdapterUnusable: it is no directory with an adapter, or there are no adapters here.
        """
        if self._make is None or self._limits is None:
            raise AdapterUnusable("adapters are switched off in the engine")
        if adapter.path is None:
            raise AdapterUnusable("this engine takes directories of adapters only")
        check_adapter(adapter.path, self._model, self._limits)

    def load(self, adapter: Adapter) -> None:
        """Takes note of an adapter that was checked; the engine reads it with the first request."""
        self._numbers.setdefault(adapter.digest, len(self._numbers) + 1)
        self._use(adapter)

    def request(self, adapter: Adapter) -> object:
        """Makes what generate_async takes.

        Raises:
            AdapterUnusable: nobody has loaded it.
        """
        if self._make is None or adapter.digest not in self._numbers:
            raise AdapterUnusable("the adapter has not been loaded")
        self._use(adapter)
        return self._make(
            lora_name=adapter.name,
            lora_int_id=self._numbers[adapter.digest],
            lora_path=str(adapter.path),
        )

    def _use(self, adapter: Adapter) -> None:
        self._used[adapter.digest] = adapter.name
        self._used.move_to_end(adapter.digest)
        while len(self._used) > self._most:
            self._used.popitem(last=False)


class Requests:
    """Starts requests. Belongs to the event loop.

    Args:
        llm: the engine.
        surface: of the installed version.
        ends: what ends an output of the model.
        vocabulary_size: of the model.
        guides: makes constraints.
        shelf: makes adapters.
        torch: makes biases; None where there are none.
    """

    def __init__(
        self,
        llm: Llm,
        surface: Surface,
        *,
        ends: Ends,
        vocabulary_size: int,
        guides: Guides,
        shelf: Shelf,
        torch: Torch | None,
    ) -> None:
        self._llm = llm
        self._surface = surface
        self._ends = ends
        self._vocabulary_size = vocabulary_size
        self._guides = guides
        self._shelf = shelf
        self._torch = torch
        self._tokenizer: object = getattr(llm, "tokenizer", None)

    def start(
        self, request: EngineRequest, room: int, guide: Mapping[str, object] | None
    ) -> RequestOutput:
        """Hands a request to the engine; does not wait.

        Args:
            request: of an execution.
            room: most tokens that the engine may draw; at least 1.
            guide: of its constraint; None without one.

        Raises:
            ConstraintUnusable: there is no guided decoding.
            AdapterUnusable: its adapter is gone.
            Exception: whatever the engine has against it.
        """
        prompt = [*request.prompt_ids, *request.continue_ids]
        texts = [text for text in request.stop_texts if self._is_safe(text, prompt)]
        sampling = sampling_keywords(
            request,
            room=room,
            ends=self._ends,
            vocabulary_size=self._vocabulary_size,
            stop_texts=texts,
        )
        if guide is not None:
            sampling["guided_decoding"] = self._guides.make(guide)
        biases = biases_of(request, self._ends)
        if biases and self._torch is not None:
            sampling["embedding_bias"] = self._bias(self._torch, biases)
        call: dict[str, object] = {
            "inputs": prompt,
            "sampling_params": self._surface.sampling.make(**sampling),
            "streaming": True,
        }
        if not request.reads_cache:
            call["cache_salt"] = secrets.token_hex(_SALT_BYTES)
        elif request.cache_salt:
            call["cache_salt"] = request.cache_salt.hex()
        if request.adapter is not None:
            call["lora_request"] = self._shelf.request(request.adapter)
        return self._llm.generate_async(**call)

    def _bias(self, torch: Torch, biases: Mapping[int, float]) -> Tensor:
        """One number for each token of the vocabulary: half a megabyte for a large one."""
        column = torch.zeros(self._vocabulary_size, dtype=torch.float32)
        column[list(biases)] = torch.tensor(list(biases.values()), dtype=torch.float32)
        return column

    def _is_safe(self, text: str, prompt: Sequence[int]) -> bool:
        """Whether the engine ends by a stop text only where the worker does, too.

        Its own tokens for the text have to be that text and nothing else: a control token would end
        the output at what is no text, and some tokenizers put a space in front. And since it looks
        at prompt and output as one, none of them may stand at the end of the prompt. The worker
        finds all other stops by itself.
        """
        encode: object = getattr(self._tokenizer, "encode", None)
        decode: object = getattr(self._tokenizer, "decode", None)
        if not callable(encode) or not callable(decode):
            return False
        try:
            token_ids = list(encode(text, add_special_tokens=False))
            is_spelled = bool(token_ids) and decode(token_ids, skip_special_tokens=True) == text
        except (ValueError, TypeError, OverflowError):
            return False
        return is_spelled and not any(
            list(prompt[-length:]) == token_ids[:length] for length in range(1, len(token_ids))
        )


def ends_of(ids: Iterable[int], known_id: int) -> Ends:
    """Returns what ends an output of a model."""
    return Ends(all_ids=frozenset(ids) | {known_id}, known_id=known_id)
