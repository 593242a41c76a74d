"""The usage journal: what a later process finds, whatever happened to this one."""

from __future__ import annotations

import dataclasses
import os
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from libs.errors import Unavailable
from services.gateway import journal as journal_module
from services.gateway.domain import Closing, EndCause, Opening
from services.gateway.journal import Journal, JournalBusy
from services.gateway.segments import HEADER, _next_whole, read_segment

NOW = datetime(2026, 1, 1, 12, 0, 0, 123456, tzinfo=UTC)
LATER = datetime(2026, 1, 2, tzinfo=UTC)


def opening(number: int, slice_id: str = "s1") -> Opening:
    return Opening(
        generation_id=f"gen_g1_{number}",
        slice_id=slice_id,
        account="accounts/dev",
        project="projects/dev",
        api_key="apiKeys/k",
        offering="offerings/x",
        model_version="models/x/versions/1",
        price="prices/p",
        input_tokens=7,
        start_time=NOW,
    )


def closing(count: int, cause: EndCause = EndCause.COMPLETED) -> Closing:
    return Closing(output_tokens=count, cause=cause, end_time=NOW)


def abandon(journal: Journal) -> None:
    """Ends a journal as SIGKILL would: descriptors go, files stay."""
    os.close(journal._descriptor)
    os.close(journal._lock)


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(bytes(data))


@contextmanager
def limited(kind: int, most: int) -> Iterator[None]:
    """Has the system itself refuse this process what is above a limit of setrlimit(2)."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def test_a_running_generation_is_recovered_at_its_last_count(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    first.slice_wanted("s1")
    ordinal = first.opened(opening(1))
    first.progress([(ordinal, 3)])
    first.progress([(ordinal, 9)])
    abandon(first)

    recovered = Journal(tmp_path).recover(LATER)

    want = Closing(output_tokens=9, cause=EndCause.GATEWAY_LOST, end_time=LATER)
    assert recovered.settlements == [(opening(1), want)]
    assert recovered.slice_ids == ["s1"]


def test_an_ended_generation_is_recovered_with_its_own_end(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    ordinal = first.opened(opening(1))
    first.closed(ordinal, closing(5, EndCause.CLIENT_CANCELLED))
    abandon(first)

    recovered = Journal(tmp_path).recover(LATER)

    assert recovered.settlements == [(opening(1), closing(5, EndCause.CLIENT_CANCELLED))]


def test_what_is_settled_and_closed_is_not_recovered(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    first.slice_wanted("s1")
    ordinal = first.opened(opening(1))
    first.closed(ordinal, closing(5))
    first.settled([ordinal])
    first.slices_closed(["s1"])
    abandon(first)

    recovered = Journal(tmp_path).recover(LATER)

    assert recovered.settlements == []
    assert recovered.slice_ids == []


def write_a_life(folder: Path) -> tuple[Path, list[int]]:
    """Leaves a segment with a record of each kind; returns it and where each record ends."""
    process = Journal(folder)
    # Ordinals count from 1.
    steps: list[Callable[[], object]] = [
        lambda: process.slice_wanted("s1"),
        lambda: process.slice_wanted("s2"),
        *(partial(process.opened, opening(number)) for number in range(3)),
        lambda: process.prefilled([(1, 4)]),
        lambda: process.progress([(1, 9)]),
        lambda: process.progress([(2, 5)]),
        lambda: process.closed(1, closing(9)),
        lambda: process.settled([1]),
        lambda: process.slices_closed(["s2"]),
        lambda: process.closed(2, closing(7)),
        lambda: process.progress([(3, 11)]),
    ]
    ends = []
    for step in steps:
        step()
        ends.append(process._size)
    abandon(process)
    return process._path(1), ends


def recovered_from(path: Path, data: bytes) -> tuple[dict[str, int], list[str], bool]:
    """Counts by generation, slices, and whether the segment is kept, of a folder with this only."""
    path.write_bytes(data)
    process = Journal(path.parent)
    recovered = process.recover(LATER)
    process.close()
    counts = {item.generation_id: end.output_tokens for item, end in recovered.settlements}
    return counts, recovered.slice_ids, bool(recovered.damaged)


def test_a_journal_cut_at_any_byte_is_that_of_its_whole_records(tmp_path: Path) -> None:
    """Death in the middle of a write, and power that fails: nothing behind the cut was released."""
    path, ends = write_a_life(tmp_path)
    whole = path.read_bytes()
    assert ends[-1] == len(whole)
    of_whole = {end: recovered_from(path, whole[:end]) for end in [0, *ends]}
    assert of_whole[len(whole)] == ({"gen_g1_1": 7, "gen_g1_2": 11}, ["s1"], False)

    for size in range(len(whole)):
        last = max(end for end in [0, *ends] if end <= size)
        assert recovered_from(path, whole[:size]) == of_whole[last], size


def test_any_flipped_bit_costs_its_own_record_only_and_the_segment_is_kept(tmp_path: Path) -> None:
    """What lies behind the damage counts: dropping it would give away what was delivered."""
    path, ends = write_a_life(tmp_path)
    whole = path.read_bytes()
    starts = [0, *ends[:-1]]
    for start, end in zip(starts, ends, strict=True):
        without = recovered_from(path, whole[:start] + whole[end:])
        is_last = end == len(whole)
        for offset in range(start, end):
            data = bytearray(whole)
            data[offset] ^= 1 << (offset % 8)
            counts, slice_ids, is_kept = recovered_from(path, bytes(data))
            assert (counts, slice_ids) == without[:2], offset
            assert is_kept is not is_last, offset


def test_a_damaged_segment_is_set_aside_and_never_replayed_or_overwritten(tmp_path: Path) -> None:
    for life in (1, 2):
        path, ends = write_a_life(tmp_path / "journal")
        flip(path, ends[0] + 3)
        process = Journal(tmp_path / "journal")
        recovered = process.recover(LATER)
        assert recovered.damaged == {path}

        process.forget(recovered)

        process.close()
        assert list((tmp_path / "journal").glob("*.journal")) == []
        kept = list((tmp_path / "journal").glob("*.damaged"))
        assert len(kept) == life


def test_what_people_leave_beside_damaged_segments_is_no_matter(tmp_path: Path) -> None:
    for name in ("looked-at.damaged", "copy of 00000007-00000001.damaged"):
        (tmp_path / name).touch()
    (tmp_path / "00000004-00000001.damaged").touch()

    process = Journal(tmp_path)

    assert process._path(1).name == "00000005-00000001.journal"
    process.close()


def test_a_length_beyond_all_reason_reads_no_further_than_the_next_record(tmp_path: Path) -> None:
    path, ends = write_a_life(tmp_path)
    data = bytearray(path.read_bytes())
    data[ends[2] : ends[2] + HEADER.size] = HEADER.pack(2**32 - 1, 0)

    _, _, is_kept = recovered_from(path, bytes(data))

    assert is_kept


def test_what_lies_behind_the_damage_is_not_copied_for_each_record_that_it_may_be() -> None:
    """A start of minutes with a segment of chance would be as good as none."""

    class Counted(bytes):
        copied = 0

        @override
        def __getitem__(self, key: Any) -> Any:
            part = super().__getitem__(key)
            self.copied += len(part) if isinstance(key, slice) else 1
            return part

    data = Counted(random.Random(1).randbytes(256 * 1024))  # noqa: S311 - no secret

    assert _next_whole(data, 0) is None

    assert data.copied < len(data)


def test_zeros_behind_the_last_record_are_a_torn_end(tmp_path: Path) -> None:
    """What a file system leaves of an append that power failed in."""
    path, _ = write_a_life(tmp_path)
    whole = path.read_bytes()

    assert recovered_from(path, whole + bytes(5000)) == recovered_from(path, whole)


def test_a_record_of_a_later_version_is_kept_for_it(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    first._write_json(b"X", 1)
    first.slice_wanted("s1")
    abandon(first)

    recovered = Journal(tmp_path).recover(LATER)

    assert recovered.slice_ids == ["s1"]
    assert recovered.damaged == {first._path(1)}


def test_a_flipped_bit_in_the_last_record_is_a_torn_end(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    ordinal = first.opened(opening(1))
    first.progress([(ordinal, 3)])
    path = first._path(first._number)
    abandon(first)
    flip(path, path.stat().st_size - 1)

    segment = read_segment(path)

    assert [body[:1] for body in segment.bodies] == [b"O"]
    assert segment.damaged_bytes == 0


def test_ordinals_of_two_processes_do_not_meet(tmp_path: Path) -> None:
    for number in (1, 2):
        process = Journal(tmp_path)
        ordinal = process.opened(opening(number))
        process.progress([(ordinal, 10 * number)])
        abandon(process)

    recovered = Journal(tmp_path).recover(LATER)

    counts = {item.generation_id: end.output_tokens for item, end in recovered.settlements}
    assert counts == {"gen_g1_1": 10, "gen_g1_2": 20}


def test_forgotten_segments_are_gone_and_the_own_one_stays(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    first.opened(opening(1))
    abandon(first)
    second = Journal(tmp_path)

    second.forget(second.recover(LATER))
    second.opened(opening(2))
    abandon(second)

    recovered = Journal(tmp_path).recover(LATER)
    assert [item.generation_id for item, _ in recovered.settlements] == ["gen_g1_2"]


def test_finished_segments_are_deleted_and_live_slices_go_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES_MAX", 2000)
    process = Journal(tmp_path)
    process.slice_wanted("s1")
    for number in range(100):
        ordinal = process.opened(opening(number))
        process.closed(ordinal, closing(number))
        process.settled([ordinal])

    assert len(list(tmp_path.glob("*.journal"))) <= 2
    abandon(process)
    recovered = Journal(tmp_path).recover(LATER)
    assert recovered.settlements == []
    assert recovered.slice_ids == ["s1"]


def test_progress_in_a_later_segment_still_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES_MAX", 500)
    process = Journal(tmp_path)
    slow = process.opened(opening(0))
    for number in range(1, 20):
        process.settled([process.opened(opening(number))])
    process.progress([(slow, 77)])
    abandon(process)

    recovered = Journal(tmp_path).recover(LATER)

    assert [(item.generation_id, end.output_tokens) for item, end in recovered.settlements] == [
        ("gen_g1_0", 77)
    ]


def test_two_gateways_cannot_share_a_folder(tmp_path: Path) -> None:
    first = Journal(tmp_path)

    with pytest.raises(JournalBusy):
        Journal(tmp_path)
    first.close()


def test_a_clean_end_leaves_nothing(tmp_path: Path) -> None:
    process = Journal(tmp_path)
    process.slice_wanted("s1")
    process.settled([process.opened(opening(1))])
    process.slices_closed(["s1"])

    process.close()

    assert list(tmp_path.glob("*.journal")) == []


def test_a_full_disk_is_a_typed_refusal(tmp_path: Path) -> None:
    process = Journal(tmp_path)
    os.close(process._descriptor)
    process._descriptor = os.open("/dev/full", os.O_WRONLY)

    with pytest.raises(Unavailable) as caught:
        process.progress([(1, 1)])
    assert caught.value.metadata == {"dependency": "journal"}
    abandon(process)


def test_idempotency_keys_survive(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    keyed = dataclasses.replace(opening(1), request_id="r-1", request_sha256="ab" * 32)
    first.opened(keyed)
    first.opened(opening(2))
    abandon(first)

    recovered = Journal(tmp_path).recover(LATER)

    assert [found for found, _ in recovered.settlements] == [keyed, opening(2)]


def test_openings_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    """They know nothing of idempotency keys, and had no discount for what may wait."""
    first = Journal(tmp_path)
    fields = journal_module._opening_to_json(opening(1))
    del fields["request_id"], fields["request_sha256"], fields["background"]
    first._write_json(b"O", [1, fields])
    abandon(first)

    recovered = Journal(tmp_path).recover(LATER)

    assert [found for found, _ in recovered.settlements] == [opening(1)]


def test_labels_end_user_and_discount_survive(tmp_path: Path) -> None:
    labelled = dataclasses.replace(
        opening(1), labels={"team": "a", "b": ""}, end_user="u-1", background=True
    )
    first = Journal(tmp_path)
    first.opened(labelled)
    abandon(first)

    ((found, _),) = Journal(tmp_path).recover(LATER).settlements

    assert found == labelled


def test_a_cached_count_is_recovered_with_what_was_released(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    ordinals = [first.opened(opening(number)) for number in (1, 2)]
    first.prefilled([(ordinals[0], 4)])
    first.progress([(ordinal, 9) for ordinal in ordinals])
    abandon(first)

    recovered = Journal(tmp_path).recover(LATER)

    cached = [end.cached_input_tokens for _, end in recovered.settlements]
    assert cached == [4, 0]


def test_an_end_keeps_all_of_its_counts(tmp_path: Path) -> None:
    whole = dataclasses.replace(
        closing(5),
        cached_input_tokens=3,
        reasoning_tokens=2,
        engine_time_ns=10**15 + 1,
        receipt=bytes(range(256)),
    )
    first = Journal(tmp_path)
    ordinal = first.opened(opening(1))
    first.closed(ordinal, whole)
    abandon(first)

    assert Journal(tmp_path).recover(LATER).settlements == [(opening(1), whole)]


def test_ends_of_an_earlier_version_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {"output_tokens": 5, "cause": "COMPLETED", "end_time": NOW.timestamp()}
    monkeypatch.setattr(journal_module, "_closing_to_json", lambda _: old)
    first = Journal(tmp_path)
    first.closed(first.opened(opening(1)), closing(5))
    abandon(first)

    assert Journal(tmp_path).recover(LATER).settlements == [(opening(1), closing(5))]


def test_counts_of_several_generations_are_one_write_and_each_is_found(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    ordinals = [first.opened(opening(number)) for number in range(3)]
    size = first._size
    first.progress([(ordinal, 10 + ordinal) for ordinal in ordinals])
    assert first._size == size + 3 * 17
    first.progress([(ordinals[1], 99)])
    abandon(first)

    recovered = Journal(tmp_path).recover(LATER)

    counts = [found.output_tokens for _, found in recovered.settlements]
    assert counts == [11, 99, 13]


@pytest.mark.parametrize("torn_bytes", [1, 17, 18, 34])
def test_of_a_torn_batch_the_whole_records_count(tmp_path: Path, torn_bytes: int) -> None:
    """None of them was released, so each of both answers is right; nothing else may be lost."""
    first = Journal(tmp_path)
    ordinals = [first.opened(opening(number)) for number in range(2)]
    first.progress([(ordinal, 1) for ordinal in ordinals])
    first.progress([(ordinal, 2) for ordinal in ordinals])
    path = first._path(first._number)
    abandon(first)
    path.write_bytes(path.read_bytes()[:-torn_bytes])

    recovered = Journal(tmp_path).recover(LATER)

    counts = [found.output_tokens for _, found in recovered.settlements]
    assert counts == ([2, 1] if torn_bytes <= 17 else [1, 1])


def test_a_segment_stays_while_the_generation_that_filled_it_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES_MAX", 100)
    process = Journal(tmp_path)
    process.opened(opening(0))
    for number in range(1, 5):
        process.settled([process.opened(opening(number))])
    abandon(process)

    recovered = Journal(tmp_path).recover(LATER)

    assert [found.generation_id for found, _ in recovered.settlements] == ["gen_g1_0"]


def test_counts_alone_go_on_in_a_new_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES_MAX", 500)
    process = Journal(tmp_path)
    ordinal = process.opened(opening(0))
    for number in range(1, 201):
        process.progress([(ordinal, number)])
    abandon(process)

    sizes = [path.stat().st_size for path in tmp_path.glob("*.journal")]
    assert len(sizes) > 200 * 17 // 600
    assert max(sizes) <= 500 + 17
    ((_, closed),) = Journal(tmp_path).recover(LATER).settlements
    assert closed.output_tokens == 200


def test_without_a_new_segment_the_old_one_stays_and_nothing_is_said_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A closed number would soon be that of a client's socket."""
    process = Journal(tmp_path)
    process.slice_wanted("s1")
    ordinal = process.opened(opening(0))
    process.progress([(ordinal, 1)])
    before = process._descriptor
    with monkeypatch.context() as small, limited(resource.RLIMIT_NOFILE, 0):
        small.setattr(journal_module, "SEGMENT_BYTES_MAX", 10)
        for _ in range(2):
            with pytest.raises(Unavailable) as caught:
                process.progress([(ordinal, 2)])
            assert caught.value.metadata == {"dependency": "journal"}
            with pytest.raises(Unavailable):
                process.opened(opening(1))
    assert process._descriptor == before
    assert os.fstat(before).st_size == process._size
    process.progress([(ordinal, 3)])
    abandon(process)

    recovered = Journal(tmp_path).recover(LATER)

    assert [(found, end.output_tokens) for found, end in recovered.settlements] == [(opening(0), 3)]
    assert recovered.slice_ids == ["s1"]


# More than a log that a test writes meanwhile, which has the same limit.
CUT_BYTES = 512 * 1024


def test_a_segment_whose_head_is_cut_is_not_begun(tmp_path: Path) -> None:
    """It would not name all slices, and the older segments that do may go."""
    process = Journal(tmp_path)
    slice_ids = [f"{number:0200d}" for number in range(CUT_BYTES // 200)]
    for slice_id in slice_ids:
        process.slice_wanted(slice_id)
    process._size = journal_module.SEGMENT_BYTES_MAX + 1
    with limited(resource.RLIMIT_FSIZE, CUT_BYTES), pytest.raises(Unavailable):
        process.slice_wanted("one more")
    assert len(list(tmp_path.glob("*.journal"))) == 1

    process.slice_wanted("another")
    process._path(1).unlink()
    abandon(process)

    assert Journal(tmp_path).recover(LATER).slice_ids == [*slice_ids, "another"]


def test_nothing_is_written_behind_a_record_that_was_cut(tmp_path: Path) -> None:
    process = Journal(tmp_path)
    ordinal = process.opened(opening(0))
    with limited(resource.RLIMIT_FSIZE, CUT_BYTES), pytest.raises(Unavailable):
        process.progress([(number, 1) for number in range(2, CUT_BYTES // 17 + 9)])
    with limited(resource.RLIMIT_NOFILE, 0), pytest.raises(Unavailable):
        process.progress([(ordinal, 4)])

    process.progress([(ordinal, 5)])
    abandon(process)

    ((_, closed),) = Journal(tmp_path).recover(LATER).settlements
    assert closed.output_tokens == 5


def test_a_slice_that_could_not_be_noted_is_not_named_again(tmp_path: Path) -> None:
    """It is not asked for, and each further attempt would add another one for ever."""
    process = Journal(tmp_path)
    with limited(resource.RLIMIT_NOFILE, 0):
        process._size = journal_module.SEGMENT_BYTES_MAX + 1
        with pytest.raises(Unavailable):
            process.slice_wanted("s1")
    process.slice_wanted("s2")
    abandon(process)

    assert Journal(tmp_path).recover(LATER).slice_ids == ["s2"]
