"""Which whole results are refused because they may not be one answer."""

from __future__ import annotations

import pytest
from maas.inference.v1 import generation_pb2

from libs.errors import FieldRule, InvalidArgument
from services.gateway import whole

Options = generation_pb2.OutputOptions
SCORED = Options(return_logprobs=True)
TOP = Options(return_logprobs=True, top_logprobs=20)
SPELT = Options(return_token_bytes=True)
IDS = Options(return_token_ids=True)
PROMPT = Options(return_prompt_logprobs=True)


def check(output: Options, *, count: int = 1, most: int, input_tokens: int = 0) -> None:
    whole.check(
        generation_pb2.GenerationSpec(output=output),
        count=count,
        max_output_tokens=most,
        input_tokens=input_tokens,
    )


@pytest.mark.parametrize(
    ("output", "field"),
    [
        (SCORED, "return_logprobs"),
        (TOP, "top_logprobs"),
        (SPELT, "return_token_bytes"),
        (IDS, "return_token_ids"),
    ],
)
def test_what_grows_with_the_output_is_named(output: Options, field: str) -> None:
    check(output, most=10_000)
    check(output, count=2, most=5_000)

    with pytest.raises(InvalidArgument) as caught:
        check(output, count=16, most=100_000)

    assert [(bad.field, bad.rule) for bad in caught.value.violations] == [
        (f"spec.output.{field}", FieldRule.OUT_OF_RANGE)
    ]


def test_scores_of_the_prompt_count_once_its_tokens_are_known() -> None:
    check(PROMPT, most=1)
    check(PROMPT, most=1, input_tokens=500_000)

    with pytest.raises(InvalidArgument, match=r"spec\.output\.return_prompt_logprobs"):
        check(PROMPT, most=1, input_tokens=700_000)


def test_text_alone_is_never_refused() -> None:
    check(Options(count=16), count=16, most=1_048_576, input_tokens=1_048_576)
    whole.check(generation_pb2.GenerationSpec(), count=1, max_output_tokens=1_048_576)


def test_the_default_of_tokens_fits_with_all_that_can_be_asked_for() -> None:
    everything = Options(
        return_token_ids=True, return_logprobs=True, top_logprobs=20, return_token_bytes=True
    )
    check(everything, count=16, most=512)
