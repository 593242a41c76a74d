"""Requests as generate_async gets them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import pytest

from services.worker.engine import trtllm_requests
from services.worker.engine.base import (
    Adapter,
    AdapterUnusable,
    Constraint,
    ConstraintKind,
    EngineRequest,
    Sampling,
)
from services.worker.engine.hf_adapter import AdapterLimits
from services.worker.engine.hf_model import read_model
from services.worker.engine.trtllm_api import Llm
from services.worker.engine.trtllm_guided import ConstraintUnusable
from services.worker.engine.trtllm_requests import (
    Guides,
    Requests,
    Shelf,
    ends_of,
    find_torch,
)
from services.worker.engine.trtllm_surface import Surface
from tests.standins.tiny_hf_model import write_adapter, write_model
from tests.unit.services.worker.engine.trtllm_world import installed

PLAIN = EngineRequest(
    prompt_ids=(72, 105),
    max_output_tokens=8,
    sampling=Sampling(temperature=1, top_p=1, top_k=0, seed=5),
)
LIMITS = AdapterLimits(max_rank=8)
SALT = b"one tenant's"
REGEX = Constraint(kind=ConstraintKind.REGEX, source="a", grammar="start: /a/")


class Tokenizer:
    """One letter is one token; some texts are not what they seem."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        if text == "broken":
            raise ValueError(text)
        return [2] if text == "<end>" else [ord(letter) for letter in text]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(one) for one in token_ids if one > 2)


@dataclass
class Engine:
    """Keeps what it was called with."""

    calls: list[dict[str, object]] = field(default_factory=list)
    tokenizer: object = field(default_factory=Tokenizer)

    def generate_async(self, **keywords: object) -> None:
        self.calls.append(keywords)


@dataclass
class World:
    engine: Engine
    requests: Requests
    guides: Guides
    shelf: Shelf

    def start(self, request: EngineRequest, room: int = 8) -> dict[str, object]:
        self.requests.start(request, room, None)
        return self.engine.calls[-1]

    def sampling(self, request: EngineRequest) -> object:
        return self.start(request)["sampling_params"]


@pytest.fixture(scope="module")
def surface() -> Iterator[Surface]:
    with installed("1.2.1") as found:
        yield found


@pytest.fixture
def world(surface: Surface, tmp_path: Path) -> World:
    tiny = write_model(tmp_path / "model")
    engine, guides = Engine(), Guides(surface, "llguidance")
    shelf = Shelf(surface, read_model(tiny.folder), LIMITS, most=2)
    requests = Requests(
        cast("Llm", engine),
        surface,
        ends=ends_of((3,), 2),
        vocabulary_size=300,
        guides=guides,
        shelf=shelf,
        torch=find_torch(),
    )
    return World(engine, requests, guides, shelf)


def test_a_plain_request_has_ids_and_new_params_and_nothing_that_may_not_be_there(
    world: World,
) -> None:
    first = world.start(replace(PLAIN, continue_ids=(33,)))
    second = world.start(PLAIN)

    assert set(first) == {"inputs", "sampling_params", "streaming"}
    assert first["inputs"] == [72, 105, 33]
    assert first["streaming"] is True
    assert first["sampling_params"] is not second["sampling_params"]


def test_salts_are_told_as_text_and_who_may_not_read_gets_one_of_its_own(world: World) -> None:
    salted = world.start(replace(PLAIN, cache_salt=SALT))["cache_salt"]
    unread = [
        world.start(replace(PLAIN, cache_salt=SALT, reads_cache=False))["cache_salt"]
        for _ in range(2)
    ]

    assert salted == SALT.hex()
    assert len({salted, *unread}) == 3
    assert all(unread)


def test_biases_are_a_tensor_as_long_as_the_vocabulary(world: World) -> None:
    sampling = replace(PLAIN.sampling, logit_bias=((7, -1.5), (9, 2.0)))

    bias = getattr(world.sampling(replace(PLAIN, sampling=sampling)), "embedding_bias", None)

    assert bias is not None
    assert len(bias) == 300
    assert {at: value for at, value in enumerate(bias.tolist()) if value} == {7: -1.5, 9: 2.0}


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("stop", ["stop"]),
        ("<end>", None),
        ("broken", None),
        # The engine looks at prompt and output as one, and the prompt ends with an i.
        ("is", None),
        ("i", ["i"]),
        ("Hi there", None),
    ],
)
def test_stop_texts_go_to_the_engine_only_where_it_ends_as_the_worker_does(
    world: World, text: str, given: list[str] | None
) -> None:
    stop = getattr(world.sampling(replace(PLAIN, stop_texts=(text,))), "stop", None)

    assert stop == given


def test_without_a_tokenizer_there_are_no_stop_texts(world: World, surface: Surface) -> None:
    engine = Engine(tokenizer=None)
    requests = Requests(
        cast("Llm", engine),
        surface,
        ends=ends_of((3,), 2),
        vocabulary_size=300,
        guides=world.guides,
        shelf=world.shelf,
        torch=None,
    )
    requests.start(replace(PLAIN, stop_texts=("stop",)), 8, None)

    assert getattr(engine.calls[0]["sampling_params"], "stop", None) is None


def test_a_guide_becomes_what_params_take(world: World) -> None:
    guide = world.guides.check(REGEX)
    world.requests.start(replace(PLAIN, constraint=REGEX), 9, guide)

    guided = getattr(world.engine.calls[0]["sampling_params"], "guided_decoding", None)
    assert getattr(guided, "grammar", None) == "start: /a/"


def test_constraints_are_refused_where_they_are_switched_off(surface: Surface) -> None:
    with pytest.raises(ConstraintUnusable):
        Guides(surface, None).check(REGEX)


def test_xgrammar_gets_grammars_that_only_it_reads(surface: Surface) -> None:
    choices = Constraint(kind=ConstraintKind.CHOICES, source='["a", "b"]', grammar='start: "a"|"b"')

    assert Guides(surface, "xgrammar").check(choices) == {"grammar": 'root ::= "a" | "b"'}


def test_constraints_that_were_checked_are_kept_within_bounds(
    surface: Surface, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many characters as two of them have; of those the first is looked at again."""
    looked_at: list[str] = []
    monkeypatch.setattr(trtllm_requests, "_CHECKED_CHARACTERS_MAX", 50)
    monkeypatch.setattr(
        trtllm_requests, "check_guided", lambda keywords, _: looked_at.append(keywords["grammar"])
    )
    guides = Guides(surface, "llguidance")
    for letter in "aababcca":
        grammar = f"start: /{letter * 8}/"
        guides.check(replace(REGEX, grammar=grammar))

    assert [text[8] for text in looked_at] == list("abca")


def adapter(folder: Path, number: int) -> Adapter:
    path = write_adapter(folder / f"a{number}", seed=number)
    return Adapter(name=f"adapters/a{number}", path=path, digest=f"sha256:{number}")


def test_an_adapter_has_one_number_for_ever(world: World, tmp_path: Path) -> None:
    first, second, third = (adapter(tmp_path, number) for number in (1, 2, 3))
    for one in (first, second, third):
        world.shelf.check(one)
        world.shelf.load(one)
    names = world.shelf.names

    calls = [world.start(replace(PLAIN, adapter=one))["lora_request"] for one in (first, second)]
    again = world.start(replace(PLAIN, adapter=first))["lora_request"]

    numbers = [getattr(call, "lora_int_id", None) for call in (*calls, again)]
    assert numbers == [1, 2, 1]
    assert getattr(again, "lora_path", None) == str(first.path)
    # The engine keeps two: the one unused for longest is gone, until it is used.
    assert names == ("adapters/a2", "adapters/a3")
    assert world.shelf.names == ("adapters/a2", "adapters/a1")


def test_an_adapter_that_nobody_loaded_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(AdapterUnusable, match="not been loaded"):
        world.start(replace(PLAIN, adapter=adapter(tmp_path, 1)))


def test_what_is_no_adapter_is_refused_before_the_engine_sees_it(
    world: World, surface: Surface, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(AdapterUnusable):
        world.shelf.check(Adapter(name="adapters/a", path=empty, digest="sha256:1"))
    with pytest.raises(AdapterUnusable, match="director"):
        world.shelf.check(Adapter(name="adapters/a", path=None, digest="sha256:1"))
    closed = Shelf(surface, read_model(tmp_path / "model"), None, most=2)
    with pytest.raises(AdapterUnusable, match="switched off"):
        closed.check(adapter(tmp_path, 1))
