"""Where the rows of a batch go, worked out once for all batches with the same lanes.

While nobody comes or goes every step has the same lanes, and its rows go to the same places. Then
whole columns are handed on instead of rows: what a step touches for each token is what a process
that sleeps between two steps pays for, because nothing of it is in a cache any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter

from services.worker.engine.base import Lane
from services.worker.outbox import Outbox
from services.worker.runs import Run


class Group:
    """Rows of one stream whose tokens need no text layer.

    Attributes:
        outbox: of the stream.
        lanes: on that stream, one for each row.
        pick: takes its rows out of a column of the batch.
    """

    __slots__ = ("lanes", "outbox", "pick")

    def __init__(self, outbox: Outbox, rows: Sequence[int], lanes: list[int]) -> None:
        self.outbox = outbox
        self.lanes = lanes
        is_range = rows[-1] - rows[0] == len(rows) - 1
        chosen = [slice(rows[0], rows[-1] + 1)] if is_range else rows
        self.pick: Callable[[list[int]], Sequence[int]] = itemgetter(*chosen)


class Route:
    """For the batches that have exactly these lanes, as long as the same executions run.

    Attributes:
        lanes: of the engine, row by row.
        groups: rows that can be handed on as columns.
        matching: rows of outputs whose every token is looked at.
    """

    __slots__ = ("groups", "lanes", "matching")

    def __init__(self, lanes: list[Lane], running: Mapping[Lane, Run]) -> None:
        self.lanes = lanes
        self.matching: list[tuple[int, Run]] = []
        rows: dict[Outbox, list[int]] = {}
        for row, lane in enumerate(lanes):
            run = running.get(lane)
            if run is None:
                continue
            if run.is_matching:
                self.matching.append((row, run))
            else:
                rows.setdefault(run.outbox, []).append(row)
        self.groups = [
            Group(outbox, found, [running[lanes[row]].lane for row in found])
            for outbox, found in rows.items()
        ]


class Routes:
    """Finds routes, and knows when they do not hold.

    Attributes:
        holding: executions without stop sequences whose next token has to go through the text
            layer all the same; while there is one, rows are handed on one by one.
    """

    __slots__ = ("_lanes_before", "_route", "holding")

    def __init__(self) -> None:
        self.holding: set[Run] = set()
        self._route: Route | None = None
        self._lanes_before: list[Lane] = []

    def find(self, lanes: list[Lane], running: Mapping[Lane, Run]) -> Route | None:
        """Finds the route of a batch; None when its rows have to be looked at one by one."""
        if self._route is None or self._route.lanes != lanes:
            # What comes for the second time is likely to come for long.
            is_same = lanes == self._lanes_before
            self._route = Route(lanes, running) if is_same else None
            self._lanes_before = lanes
        return None if self.holding else self._route

    def leave(self, run: Run) -> None:
        """An output speaks no more."""
        self._route = None
        self.holding.discard(run)

    def forget(self) -> None:
        """An output goes another way from here on."""
        self._route = None
