"""Frames between the llamacpp engine and its child."""

from __future__ import annotations

import array
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine.base import (
    Ended,
    EndReason,
    EngineRequest,
    Prefilled,
    Sampling,
    StepBatch,
)
from services.worker.engine.llamacpp_wire import (
    Counters,
    FrameReader,
    Kind,
    Report,
    pack_abort,
    pack_control,
    pack_step,
    pack_submit,
    unpack_abort,
    unpack_control,
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
)
REQUESTS = st.builds(
    EngineRequest,
    prompt_ids=st.lists(TOKEN_IDS, min_size=1, max_size=9).map(tuple),
    continue_ids=st.lists(TOKEN_IDS, max_size=4).map(tuple),
    max_output_tokens=st.integers(0, 2**31 - 1),
    stop_token_ids=st.frozensets(TOKEN_IDS, max_size=3),
    ignore_eos=st.booleans(),
    sampling=SAMPLINGS,
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


def test_columns_that_do_not_fit_their_counts_are_refused() -> None:
    request = EngineRequest(
        prompt_ids=(1, 2),
        max_output_tokens=1,
        sampling=Sampling(temperature=1, top_p=1, top_k=0, seed=0),
    )

    with pytest.raises(ValueError, match="do not fit"):
        unpack_submit(body_of(pack_submit(0, request))[:-4])
