"""The audit finds what must not be, and nothing else."""

from __future__ import annotations

import dataclasses

import pytest

from tools.chaos.audit import (
    BURST_S,
    OVER_MAX,
    TOKENS_PER_S,
    Attempt,
    End,
    Halt,
    Kind,
    Record,
    audit,
    quantile,
)

RECORD = Record(
    generation_id="gen_1",
    request_id="r1",
    input_tokens=10,
    output_tokens=100,
    charge_nanos=500,
    is_ours=False,
)


def attempt_of(
    end: End, *, received: int = 100, kind: Kind = Kind.STREAM, generation_id: str = "gen_1"
) -> Attempt:
    return Attempt(
        request_id="r1",
        kind=kind,
        generation_id=generation_id,
        received=received,
        input_tokens=10,
        charge_nanos=500,
        end=end,
    )


def big(count: int) -> tuple[list[Attempt], list[Record]]:
    """Clean generations that keep the share of what was charged too much small."""
    attempts = [
        Attempt(f"b{n}", Kind.STREAM, f"gen_b{n}", 100_000, 1, 1, End.CLEAN) for n in range(count)
    ]
    records = [
        Record(
            generation_id=f"gen_b{n}",
            request_id=f"b{n}",
            input_tokens=1,
            output_tokens=100_000,
            charge_nanos=1,
            is_ours=False,
        )
        for n in range(count)
    ]
    return attempts, records


def faults(attempts: list[Attempt], records: list[Record]) -> list[str]:
    more_attempts, more_records = big(1)
    return audit([*attempts, *more_attempts], [*records, *more_records]).faults


def test_clean_generation_with_its_record_is_right() -> None:
    assert faults([attempt_of(End.CLEAN)], [RECORD]) == []


@pytest.mark.parametrize(
    "record",
    [
        dataclasses.replace(RECORD, output_tokens=101),
        dataclasses.replace(RECORD, input_tokens=9),
        dataclasses.replace(RECORD, charge_nanos=1),
    ],
)
def test_clean_generation_has_to_be_exact(record: Record) -> None:
    (fault,) = faults([attempt_of(End.CLEAN)], [record])

    assert "gen_1 ended cleanly" in fault


@pytest.mark.parametrize("count", [0, 2])
def test_generation_has_exactly_one_record(count: int) -> None:
    found = faults([attempt_of(End.CUT)], [dataclasses.replace(RECORD, charge_nanos=0)] * count)

    assert found == [f"gen_1 has {count} usage records, not one"]


@pytest.mark.parametrize("end", [End.CUT, End.LEFT])
@pytest.mark.parametrize(("over", "is_right"), [(0, True), (OVER_MAX, True), (OVER_MAX + 1, False)])
def test_interrupted_stream_is_counted_a_little_too_much_at_most(
    end: End, over: int, *, is_right: bool
) -> None:
    found = faults([attempt_of(end, received=100 - over)], [RECORD])

    assert (found == []) == is_right


@pytest.mark.parametrize(
    ("halt", "shared_s"),
    [
        (Halt(18.0, 20.5), 2.0),
        (Halt(18.0, 20.5, "gateway-2"), 2.0),
        (Halt(18.0, 20.5, "gateway"), 0.0),
        (Halt(10.0, 20.0 - BURST_S), 9.0),
        (Halt(10.0, 19.9 - BURST_S), 0.0),
        (Halt(21.0, 22.0), 0.0),
    ],
)
@pytest.mark.parametrize("is_away", [False, True])
def test_only_who_was_kept_from_reading_may_miss_what_had_piled_up(
    halt: Halt, shared_s: float, *, is_away: bool
) -> None:
    halt = dataclasses.replace(halt, is_away=is_away)
    over_max = OVER_MAX + (int(TOKENS_PER_S * shared_s) if is_away else 0)
    for over, is_right in ((over_max, True), (over_max + 1, False)):
        attempt = attempt_of(End.LEFT, received=1000 - over)
        attempt.start_s, attempt.end_s, attempt.gateway = 10.0, 20.0, "gateway-2"
        attempts, records = big(9)
        counted = dataclasses.replace(RECORD, output_tokens=1000)

        found = audit([attempt, *attempts], [counted, *records], [halt])

        assert (found.faults == []) == is_right
        assert found.halted_over == ([over] if shared_s and not is_away else [])
        assert found.away_over == ([over] if shared_s and is_away else [])
        assert found.over == ([] if shared_s and is_away else [over])


def test_nobody_is_counted_less_than_was_received() -> None:
    (fault,) = faults([attempt_of(End.CUT, received=101)], [RECORD])

    assert "counts 100 tokens, its client received 101" in fault


def test_who_detached_may_have_received_nothing_of_what_was_made() -> None:
    assert faults([attempt_of(End.CUT, received=1, kind=Kind.DETACH)], [RECORD]) == []


def test_charge_is_refused_where_the_end_was_ours() -> None:
    (fault,) = faults([attempt_of(End.CUT)], [dataclasses.replace(RECORD, is_ours=True)])

    assert fault == "gen_1 was charged though its end was ours"


def test_request_is_charged_once() -> None:
    again = dataclasses.replace(RECORD, generation_id="gen_2")

    assert faults([attempt_of(End.CLEAN)], [RECORD, again]) == [
        "request r1 was charged more than once",
        "request r1 has 1 records that its client never heard of and 0 calls without an answer",
    ]


def test_no_more_generations_are_made_of_a_request_than_it_had_calls() -> None:
    """The first one was lost, and free: the second one is paid for and has nobody."""
    lost = dataclasses.replace(RECORD, output_tokens=5, charge_nanos=0, is_ours=True)
    secret = dataclasses.replace(RECORD, generation_id="gen_2", output_tokens=5)
    heard = attempt_of(End.CUT, received=5)
    unheard = attempt_of(End.REFUSED, received=0, generation_id="")

    (fault,) = faults([heard], [lost, secret])

    assert fault.endswith("1 records that its client never heard of and 0 calls without an answer")
    assert faults([heard, unheard], [lost, secret]) == []


def test_record_of_an_answer_that_never_came_is_found_by_its_request() -> None:
    attempt = attempt_of(End.REFUSED, received=0, kind=Kind.UNARY, generation_id="")

    (fault,) = faults([attempt], [RECORD])

    assert "its client received 0" in fault


def test_repeat_that_got_it_all_makes_up_for_the_call_that_was_cut() -> None:
    cut, again = attempt_of(End.CUT, received=1), attempt_of(End.CLEAN)
    refused = attempt_of(End.REFUSED, received=0, generation_id="")

    assert faults([cut, refused, again], [RECORD]) == []


def test_of_calls_that_were_all_cut_the_one_that_got_most_counts() -> None:
    cut, again = attempt_of(End.CUT, received=1), attempt_of(End.CUT, received=100 - OVER_MAX - 1)

    (fault,) = faults([again, cut], [RECORD])

    assert f"its client received {again.received}" in fault


def test_record_that_nobody_asked_for_is_found() -> None:
    assert faults([], [RECORD]) == ["request r1 has a record and was never made"]


def test_a_suite_that_serves_nobody_has_not_passed() -> None:
    refused = attempt_of(End.REFUSED, received=0, generation_id="")

    (fault,) = audit([refused], []).faults

    assert fault.startswith("nobody has read a generation to its end")


def test_charging_too_much_too_often_is_found() -> None:
    attempts, records = big(1)
    cut = [
        dataclasses.replace(
            attempts[0], request_id=f"c{n}", generation_id=f"gen_c{n}", received=40, end=End.CUT
        )
        for n in range(10)
    ]
    counted = [
        dataclasses.replace(
            records[0], request_id=f"c{n}", generation_id=f"gen_c{n}", output_tokens=100
        )
        for n in range(10)
    ]

    found = audit([*attempts, *cut], [*records, *counted])

    assert found.over_share == pytest.approx(600 / 101_000)
    assert found.faults == ["0.594% of all tokens were charged and not received"]


def test_share_of_a_few_tokens_is_not_judged() -> None:
    # One that cost nothing has no part in the share.
    free = Attempt("r2", Kind.STREAM, "gen_2", 1, 1, 0, End.CLEAN)
    gift = dataclasses.replace(
        RECORD,
        generation_id="gen_2",
        request_id="r2",
        input_tokens=1,
        output_tokens=1,
        charge_nanos=0,
    )

    found = audit([attempt_of(End.CUT, received=90), free], [RECORD, gift])

    assert found.over_share == pytest.approx(0.1)
    assert found.faults == []


def test_quantile_is_a_value_that_was_there() -> None:
    assert [quantile([3, 1, 2], share) for share in (0.0, 0.5, 0.99, 1.0)] == [1, 2, 3, 3]
    assert quantile([], 0.5) == 0
