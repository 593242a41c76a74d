"""A second worker behind a first one, through the service: from every place of the output."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from maas.inference.v1 import generation_pb2
from typing_extensions import override

from libs.clock import SystemClock
from services.worker.engine.sim_output import SimOutput, Tokens
from services.worker.stops import matcher_of
from services.worker.text import OutputText
from tests.integration.services.worker.harness import (
    PIECES,
    TOKENIZER,
    Gateway,
    Told,
    execution,
    make_engine,
    running_worker,
)

FOREIGN = "Ein Bär, 5 €; 熊 😀 né à l'été. STOP at last, and on it goes"


class Recited(SimOutput):
    """Says a text token by token, whatever the prompt; characters come in pieces."""

    def __init__(self, text: str) -> None:
        super().__init__(TOKENIZER)
        self.script = TOKENIZER.encode(text, parse_special=False)

    @override
    def tokens(self, base: int, start: int, end: int) -> Tokens:
        return np.array(self.script[start:end], dtype=np.int32)

    @override
    def steps(self, bases: Sequence[int], positions: Sequence[int], count: int) -> list[list[int]]:
        # What is drawn ahead of the end is never said.
        script = [*self.script, *[0] * count]
        return [[script[at + step] for at in positions] for step in range(count)]


def released(token_ids: Sequence[int], stops: Sequence[str]) -> tuple[list[int], str]:
    """What a worker has released when its engine has drawn some tokens."""
    text = OutputText(PIECES, matcher_of(tuple(stops)))
    releases = [text.push(token_id) for token_id in token_ids]
    return (
        [token_id for release in releases for token_id in release.token_ids],
        "".join(release.text for release in releases),
    )


async def check_every_cut(
    gateway: Gateway,
    drawn: Sequence[int],
    stops: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    seed: int = 7,
) -> Told:
    """Runs once from the beginning, and once from each place where the first worker may die."""
    tokens = len(drawn)
    whole = await gateway.run(
        execution(1, tokens=tokens, stops=stops, stop_ids=stop_ids, seed=seed)
    )
    for cut in range(tokens + 1):
        before_ids, before = released(drawn[:cut], stops)
        if len(before_ids) > len(whole.token_ids):
            # Behind a stop token: the first worker never drew that far.
            break

        rest = await gateway.run(
            execution(
                2,
                tokens=tokens,
                continues=before_ids,
                stops=stops,
                stop_ids=stop_ids,
                seed=seed,
                execution_id=f"cut-{cut}",
            )
        )

        assert before_ids + rest.token_ids == whole.token_ids
        assert before + rest.text == whole.text
        assert rest.input_tokens == whole.input_tokens
        assert rest.end == whole.end
    return whole


@pytest.mark.parametrize(
    ("stops", "end"),
    [
        ([], ""),
        (["STOP"], "STOP"),
        (["€; 熊", "never"], "€; 熊"),
        (["😀"], "😀"),
        (["r, ", "5 €!"], "r, "),
        (["et on", "goes!"], ""),
    ],
)
async def test_characters_and_stop_sequences_may_be_cut_anywhere(
    stops: list[str], end: str
) -> None:
    engine = make_engine(SystemClock())
    engine._output = output = Recited(FOREIGN)
    async with running_worker(engine=engine) as worker, worker.gateway() as gateway:
        whole = await check_every_cut(gateway, output.script, stops)

        assert whole.text == (FOREIGN[: FOREIGN.index(end)] if end else FOREIGN)
        assert whole.end.stop_sequence == end


def said(told: Told) -> tuple[list[int], str, generation_pb2.OutputEnd]:
    return told.token_ids, told.text, told.end


async def test_executions_that_run_together_say_what_each_would_alone() -> None:
    """Of two streams, some with whole tokens only, some with pieces of characters, some stopped."""
    engine = make_engine(SystemClock())
    engine._output = output = Recited("one two three four five six seven. " + FOREIGN)
    most = len(output.script)
    async with (
        running_worker(engine=engine) as worker,
        worker.gateway() as gateway,
        worker.gateway() as other,
    ):
        plain = await gateway.run(execution(9, tokens=most))
        stopped = await gateway.run(execution(8, tokens=most, stops=["seven"]))

        await gateway.send(
            execution(1, tokens=most, interval_s=0.01),
            execution(2, tokens=most, stops=["seven"], interval_s=0.02),
            execution(3, tokens=20, interval_s=0.03),
        )
        await other.send(execution(1, tokens=most, execution_id="other"))
        await other.until_ended(1)
        await gateway.until_ended(1, 2, 3)

        assert said(gateway.told[1]) == said(other.told[1]) == said(plain)
        assert said(gateway.told[2]) == said(stopped)
        assert gateway.told[3].token_ids == plain.token_ids[:20]


@pytest.mark.parametrize("seed", [7, 8])
@pytest.mark.parametrize("kind", ["max tokens", "stop sequence", "stop token"])
async def test_the_simulator_may_be_cut_anywhere(kind: str, seed: int) -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        plain = await gateway.run(execution(9, tokens=30, seed=seed))
        middle = len(plain.text) * 2 // 3
        stops = [plain.text[middle : middle + 9]] if kind == "stop sequence" else []
        stop_ids = [plain.token_ids[22]] if kind == "stop token" else []

        whole = await check_every_cut(gateway, plain.token_ids, stops, stop_ids, seed)

        assert whole.end.stop_sequence == "".join(stops)
