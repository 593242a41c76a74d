"""Frames between the llamacpp engine and its child."""

from __future__ import annotations

import array
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine.base import (
    Adapter,
    Constraint,
    ConstraintKind,
    Ended,
    EndReason,
    EngineRequest,
    Prefilled,
    Sampling,
    StepBatch,
)
from services.worker.engine.llamacpp_scores import RawRows
from services.worker.engine.score_blocks import ScoreBlock, to_scores
from services.worker.engine.wire import (
    Counters,
    FrameReader,
    Kind,
    Report,
    pack_abort,
    pack_control,
    pack_drop_embed,
    pack_embed,
    pack_embedded,
    pack_residents,
    pack_step,
    pack_submit,
    unpack_abort,
    unpack_control,
    unpack_drop_embed,
    unpack_embed,
    unpack_embedded,
    unpack_residents,
    unpack_step,
    unpack_submit,
)

LANES = st.integers(-(2**63), 2**63 - 1)
TOKEN_IDS = st.integers(0, 2**31 - 1)

SAMPLINGS = st.builds(
    Sampling,
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1),
    top_k=st.integers(0, 2**31 - 1),
    seed=st.integers(0, 2**64 - 1),
    min_p=st.just(0.0) | st.floats(0, 1),
    frequency_penalty=st.just(0.0) | st.floats(-2, 2),
    presence_penalty=st.just(0.0) | st.floats(-2, 2),
    repetition_penalty=st.just(1.0) | st.floats(0.01, 10),
    logit_bias=st.dictionaries(TOKEN_IDS, st.floats(-100, 100), max_size=3).map(
        lambda biases: tuple(sorted(biases.items()))
    ),
)
TEXTS = st.text(max_size=9)
CONSTRAINTS = st.builds(
    Constraint, kind=st.sampled_from(ConstraintKind), source=TEXTS, grammar=TEXTS
)
ADAPTERS = st.builds(
    Adapter, name=TEXTS, path=st.none() | st.just(Path("/some/ä.gguf")), digest=TEXTS
)
REQUESTS = st.builds(
    EngineRequest,
    prompt_ids=st.lists(TOKEN_IDS, min_size=1, max_size=9).map(tuple),
    continue_ids=st.lists(TOKEN_IDS, max_size=4).map(tuple),
    max_output_tokens=st.integers(0, 2**31 - 1),
    stop_token_ids=st.frozensets(TOKEN_IDS, max_size=3),
    ignore_eos=st.booleans(),
    sampling=SAMPLINGS,
    min_output_tokens=st.sampled_from([0, 7]),
    stop_texts=st.lists(TEXTS, max_size=2).map(tuple),
    constraint=st.none() | CONSTRAINTS,
    top_logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.booleans(),
    adapter=st.none() | ADAPTERS,
    cache_salt=st.binary(max_size=40),
    reads_cache=st.booleans(),
    is_background=st.booleans(),
)
PLAIN = EngineRequest(
    prompt_ids=(1, 2),
    max_output_tokens=1,
    cache_salt=b"salt",
    sampling=Sampling(temperature=1, top_p=1, top_k=0, seed=0),
)
ENDS = st.builds(
    Ended,
    LANES,
    st.sampled_from(EndReason),
    st.none() | TOKEN_IDS,
    st.sampled_from(["", "no memory", "ungültig"]),
)


def body_of(frame: bytes) -> bytes:
    ((_, body),) = FrameReader().feed(frame)
    return body


@given(lane=LANES, request=REQUESTS)
def test_a_submit_arrives_as_it_was_sent(lane: int, request: EngineRequest) -> None:
    assert unpack_submit(body_of(pack_submit(lane, request))) == (lane, request)


@given(lane=LANES)
def test_an_abort_arrives_as_it_was_sent(lane: int) -> None:
    assert unpack_abort(body_of(pack_abort(lane))) == lane


@given(
    rows=st.lists(st.tuples(LANES, TOKEN_IDS), max_size=9),
    prefilled=st.lists(st.builds(Prefilled, LANES, TOKEN_IDS), max_size=3),
    ended=st.lists(ENDS, max_size=3),
)
def test_a_step_arrives_behind_what_was_in_the_batch(
    rows: list[tuple[int, int]], prefilled: list[Prefilled], ended: list[Ended]
) -> None:
    counters = Counters(running=3, waiting=4, waiting_tokens=2**40, kv_used_tokens=2**41, taken=5)
    report = Report(
        lanes=array.array("q", [lane for lane, _ in rows]).tobytes(),
        token_ids=array.array("i", [token_id for _, token_id in rows]).tobytes(),
        prefilled=prefilled,
        ended=ended,
    )
    before = Ended(9, EndReason.ABORTED)
    batch = StepBatch(lanes=[9], token_ids=[8], ended=[before])

    got = unpack_step(body_of(pack_step(counters, report)), batch)

    assert got == counters
    assert batch == StepBatch(
        lanes=[9, *(lane for lane, _ in rows)],
        token_ids=[8, *(token_id for _, token_id in rows)],
        ended=[before, *ended],
        prefilled=prefilled,
    )


@given(cuts=st.lists(st.integers(0, 200), max_size=6))
def test_frames_are_the_same_however_the_stream_is_cut(cuts: list[int]) -> None:
    sent = [pack_abort(lane) for lane in range(8)] + [
        pack_control(Kind.REFUSED, {"message": "a file that is not there", "code": None})
    ]
    stream = b"".join(sent)
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    reader = FrameReader()

    got = [
        frame
        for start, end in itertools.pairwise(places)
        for frame in reader.feed(stream[start:end])
    ]

    assert got == [(Kind.ABORT, body_of(frame)) for frame in sent[:-1]] + [
        (Kind.REFUSED, body_of(sent[-1]))
    ]
    assert unpack_control(got[-1][1]) == {"message": "a file that is not there", "code": None}


def test_numbers_beyond_their_columns_become_what_means_the_same() -> None:
    request = EngineRequest(
        prompt_ids=(1,),
        max_output_tokens=2**40,
        sampling=Sampling(temperature=1, top_p=1, top_k=2**40, seed=-1),
    )

    _, got = unpack_submit(body_of(pack_submit(0, request)))

    assert got.max_output_tokens == got.sampling.top_k == 2**31 - 1
    assert got.sampling.seed == 2**64 - 1


@pytest.mark.parametrize("missing", [1, 4, 9])
def test_columns_that_do_not_fit_their_counts_are_refused(missing: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        unpack_submit(body_of(pack_submit(0, PLAIN))[:-missing])


def test_a_plain_request_carries_no_text_behind_its_salt() -> None:
    assert body_of(pack_submit(0, PLAIN)).endswith(b"salt")


def test_broken_extras_are_refused_without_showing_them() -> None:
    body = body_of(pack_submit(0, PLAIN)) + b'{"constraint": ["regex", "what a tenant wrote'

    with pytest.raises(ValueError, match="malformed") as failure:
        unpack_submit(body)

    assert "tenant" not in str(failure.value)
    assert failure.value.__suppress_context__


def block_of(rows: int, top: int) -> ScoreBlock:
    logits = np.random.default_rng(rows).normal(size=(rows, 30)).astype(np.float32)
    return RawRows(logits, [top] * rows).score(np.arange(rows), np.arange(rows))


def test_scores_arrive_beside_their_rows_and_prompts_in_parts() -> None:
    first, second, prompt = block_of(2, 3), block_of(1, 1), block_of(4, 2)
    report = Report(
        lanes=array.array("q", [5, 6]).tobytes(),
        token_ids=array.array("i", [1, 2]).tobytes(),
        ended=[Ended(5, EndReason.FAILED, None, "why")],
        scores=[first],
        prompt_scores=[(6, 0, prompt), (6, 4, second)],
    )
    batch = StepBatch(lanes=[9], token_ids=[8])

    unpack_step(body_of(pack_step(Counters(), report)), batch)

    assert batch.scores is not None
    assert np.isnan(batch.scores.logprobs[0])
    assert batch.scores.logprobs[1:] == first.logprobs.tolist()
    assert batch.scores.top_token_ids[3:] == first.top_token_ids.ravel().tolist()
    assert [(part.lane, part.offset) for part in batch.prompt_scores] == [(6, 0), (6, 4)]
    assert [part.scores for part in batch.prompt_scores] == [to_scores(prompt), to_scores(second)]
    assert batch.ended[0].message == "why"


@given(
    job=st.integers(0, 2**32 - 1),
    inputs=st.lists(st.lists(TOKEN_IDS, max_size=5).map(tuple), max_size=4),
)
def test_what_is_to_be_embedded_arrives_as_it_was_sent(
    job: int, inputs: list[tuple[int, ...]]
) -> None:
    assert unpack_embed(body_of(pack_embed(job, inputs))) == (job, inputs)
    assert unpack_drop_embed(body_of(pack_drop_embed(job))) == job


def test_vectors_arrive_as_they_were_sent_and_so_does_a_refusal() -> None:
    vectors = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)

    job, got = unpack_embedded(body_of(pack_embedded(7, vectors)))

    assert job == 7
    assert isinstance(got, np.ndarray)
    assert got.tobytes() == vectors.tobytes()
    assert got.shape == (3, 5)
    assert unpack_embedded(body_of(pack_embedded(8, "zu groß"))) == (8, "zu groß")


@pytest.mark.parametrize("names", [(), ("adapters/a",), ("adapters/a", "adapters/b")])
def test_names_of_adapters_arrive_as_they_were_sent(names: tuple[str, ...]) -> None:
    assert unpack_residents(body_of(pack_residents(names))) == names
