"""The one contract that every engine fulfils, as tools.conformance.engine has it.

One engine of each kind serves all checks, one after the other: starting one is what takes time.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tools.conformance.engine.check import Check
from tools.conformance.engine.contract import CHECKS
from tools.conformance.engine.shared import Shared
from tools.conformance.engine.table import ROWS
from tools.conformance.verdict import CannotShow

NOT_SHOWN: dict[str, set[str]] = {
    "sim": {
        "an_engine_that_is_killed_is_dead",
        "an_engine_that_is_wedged_shows_it_and_can_be_stopped",
        "an_engine_whose_helper_is_killed_is_dead",
    },
    "llamacpp": {
        "an_engine_whose_helper_is_killed_is_dead",
        "blocks_that_are_told_are_read_by_who_has_the_salt",
        "blocks_that_are_told_to_be_gone_are_not_read",
    },
    # What TensorRT-LLM 1.2.1 cannot do, or takes and leaves out in silence.
    "trtllm": {
        "a_constrained_continuation_goes_on_where_the_other_stopped",
        "a_continuation_equals_the_uninterrupted_run",
        "a_continuation_from_every_place_equals_the_uninterrupted_run",
        "an_embedding_may_be_cancelled",
        "embedding_does_not_disturb_generation",
        "embeddings_have_length_1_and_depend_on_the_input_alone",
        "min_p_of_1_leaves_the_likeliest",
        "more_output_than_the_constraint_lets_be_does_not_come",
        "penalties_make_more_or_fewer_different_tokens",
        "prompts_have_log_probabilities_from_the_second_token_on",
        "repetition_penalty_keeps_off_what_was_there",
        "the_end_of_sequence_waits_for_the_least_tokens",
        "the_least_tokens_count_a_continuation_in",
        "what_cannot_be_embedded_is_an_error",
    },
}
"""Checks that an engine need not show; any other that it does not show is a failure."""

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=list(ROWS))
async def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Shared]:
    folder = tmp_path_factory.mktemp(request.param)
    found = Shared(ROWS[request.param](folder), folder)
    yield found
    await found.stop()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
async def test_an_engine_keeps_its_contract(shared: Shared, check: Check) -> None:
    missing = ""
    try:
        async with shared.lend(ends_engine=check.ends_engine) as harness:
            await check.perform(harness)
    except CannotShow as reason:
        missing = str(reason)
    if missing:
        assert check.name.partition("[")[0] in NOT_SHOWN[shared.name], missing
        pytest.skip(missing)
