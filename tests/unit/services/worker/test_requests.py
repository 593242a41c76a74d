from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2

from services.worker.requests import engine_requests, seed_of

seeds = st.integers(0, 2**64 - 1)


@given(seed=seeds)
def test_output_0_has_the_seed_of_the_request(seed: int) -> None:
    assert seed_of(seed, 0) == seed


@given(seed=seeds)
def test_the_outputs_of_a_request_have_different_seeds(seed: int) -> None:
    found = [seed_of(seed, output) for output in range(1, 16)]

    assert len(set(found)) == 15
    assert all(0 <= value < 2**64 for value in found)


def test_seeds_are_those_of_splitmix64() -> None:
    """The first two numbers that the generator draws from 1234567, as published with it."""
    assert [seed_of(1234567, output) for output in (1, 2)] == [
        6457827717110365317,
        3203168211198807973,
    ]


def test_neighbouring_requests_share_no_seed() -> None:
    found = {seed_of(seed, output) for seed in range(100) for output in range(1, 16)}

    assert len(found) == 1500


def test_engines_are_told_each_stop_sequence_once() -> None:
    stop = generation_pb2.StopOptions(stop_sequences=["END", "\n\n", "END"])
    execution = engine_pb2.Execution(
        stop=stop, output=generation_pb2.OutputOptions(count=2), cache_salt=b"salt"
    )

    found = engine_requests(execution, [1, 2], max_output_tokens=8, constraint=None, has_cache=True)

    assert [request.stop_texts for request in found] == [("END", "\n\n")] * 2
