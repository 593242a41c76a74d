"""From the batches of the engine to the streams: text layers, columns, and the ends of outputs.

    batch --routes--> columns of the outboxes       tokens that are whole text, nothing else asked
          '-> text layer -> rich output -> rows     stop sequences, calls, reasoning, scores

Scores of a batch are handed to their outputs first: there they wait for their tokens, so that the
way of a token is the same with and without them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2

from services.worker import metrics
from services.worker.convert import end_to_pb, stop_to_pb
from services.worker.engine.base import Ended, Lane, StepBatch, TokenScores
from services.worker.engine_time import EngineTime
from services.worker.routes import Route, Routes
from services.worker.runs import Run
from services.worker.text import OutputText, Release, TokenPieces


class Delivery:
    """The outputs that still speak. Belongs to the loop of its executions.

    Attributes:
        running: outputs by lane of the engine.
        routes: where their rows go.
    """

    def __init__(
        self,
        pieces: TokenPieces,
        *,
        engine_time: EngineTime,
        on_stopped: Callable[[Run, generation_pb2.OutputEnd], None],
        on_ended: Callable[[Ended], None],
    ) -> None:
        """Keeps what it needs.

        Args:
            pieces: of the vocabulary.
            engine_time: shares of the outputs.
            on_stopped: called when the text of an output has ended it; the engine does not know.
            on_ended: called for each end that the engine tells.
        """
        self.running: dict[Lane, Run] = {}
        self.routes = Routes()
        self._pieces = pieces
        self._engine_time = engine_time
        self._on_stopped = on_stopped
        self._on_ended = on_ended
        self._meter = metrics.StepMeter()

    def add(self, run: Run, lane: Lane) -> None:
        """An output is in the engine, and primed."""
        run.engine_lane = lane
        self.running[lane] = run
        self._engine_time.enter(lane)
        if run.text is not None and not run.is_matching:
            self.routes.holding.add(run)

    def pop(self, lane: Lane) -> Run | None:
        """An output speaks no more, and takes no time; None when it did not."""
        run = self.running.pop(lane, None)
        if run is not None:
            self.routes.leave(run)
            run.engine_time_s = self._engine_time.leave(lane)
        return run

    def clear(self) -> None:
        """The engine is gone."""
        for lane in list(self.running):
            self.pop(lane)
        self.routes = Routes()

    def deliver(self, batch: StepBatch) -> None:
        """Hands one batch to the outboxes. Waking them is left to the caller."""
        if batch.prefilled or batch.prompt_scores:
            self._deliver_prompts(batch)
        if batch.scores is not None:
            self._add_scores(batch.lanes, batch.scores)
        route = self.routes.find(batch.lanes, self.running)
        if route is None:
            self._deliver_rows(batch)
        else:
            self._hand_on(route, batch)
        for ended in batch.ended:
            self._on_ended(ended)
        self._meter.add(len(batch.lanes), may_be_last=bool(batch.ended))

    def conclude(self, run: Run, ended: Ended) -> generation_pb2.OutputEnd:
        """Shows what an output holds that has ended well by itself; returns how it ended."""
        end = end_to_pb(ended, is_capped=run.is_capped)
        if run.text is not None:
            release = run.text.finish()
            run.show(release)
            run.show_rest()
            if release.stop is not None:
                return stop_to_pb(release.stop)
        if (
            run.rich is not None
            and run.rich.has_calls
            and end.reason == generation_pb2.FINISH_REASON_END
        ):
            end.reason = generation_pb2.FINISH_REASON_TOOL_CALLS
        return end

    def _deliver_prompts(self, batch: StepBatch) -> None:
        """Hands on what is said of prompts, which output 0 of an execution says."""
        for prefilled in batch.prefilled:
            run = self.running.get(prefilled.lane)
            if run is not None and prefilled.cached_tokens and run is run.place.runs[0]:
                run.outbox.prefilled(run.lane, prefilled.cached_tokens)
        for found in batch.prompt_scores:
            run = self.running.get(found.lane)
            if run is None or run.rich is None or not run.rich.extras.has_prompt_scores:
                continue
            for part in run.rich.prompt_parts(found):
                run.outbox.rich.add_prompt(engine_pb2.LanePromptScores(lane=run.lane, scores=part))

    def _add_scores(self, lanes: list[Lane], scores: TokenScores) -> None:
        running = self.running
        for row, lane in enumerate(lanes):
            run = running.get(lane)
            if run is not None and run.rich is not None:
                run.rich.add_scores(scores, row)

    def _hand_on(self, route: Route, batch: StepBatch) -> None:
        """Hands on columns; row by row what is looked at, or is no whole text of its own."""
        for group in route.groups:
            token_ids = group.pick(batch.token_ids)
            texts = [self._pieces.texts[token_id] for token_id in token_ids]
            if None in texts:
                lanes = list(group.pick(batch.lanes))
                self._deliver_rows(StepBatch(lanes=lanes, token_ids=list(token_ids)))
                continue
            outbox = group.outbox
            outbox.lanes += group.lanes
            outbox.token_ids += token_ids
            outbox.texts += cast("list[str]", texts)
        for row, run in route.matching:
            self._push(run, batch.token_ids[row])

    def _deliver_rows(self, batch: StepBatch) -> None:
        """Hands on row by row."""
        running = self.running
        texts = self._pieces.texts
        for lane, token_id in zip(batch.lanes, batch.token_ids, strict=True):
            run = running.get(lane)
            if run is None:
                continue
            text = texts[token_id]
            if text is None or run.text is not None:
                self._push(run, token_id)
                continue
            outbox = run.outbox
            outbox.lanes.append(run.lane)
            outbox.token_ids.append(token_id)
            outbox.texts.append(text)

    def _push(self, run: Run, token_id: int) -> None:
        """Takes a token through the text layer."""
        text = run.text
        if text is None:
            text = run.text = OutputText(self._pieces)
            self.routes.holding.add(run)
        if run.rich is not None:
            self._push_rich(run, text, token_id)
            return
        release = text.push(token_id)
        run.show(release)
        if release.stop is not None:
            self._on_stopped(run, stop_to_pb(release.stop))
        elif text.is_clear and not run.is_matching:
            run.text = None
            self.routes.holding.discard(run)

    def _push_rich(self, run: Run, text: OutputText, token_id: int) -> None:
        """Takes a token of an output that is more than text through its layers.

        A stop sequence never spans a mark that is a control token, and a character neither: what is
        held before it is released.
        """
        rich = run.rich
        if rich is None or run.is_told:
            return
        if rich.is_unsplit and text.is_clear and run.matcher is None:
            whole = self._pieces.texts[token_id]
            if whole is not None:
                run.show_row(rich.single(token_id, whole))
                return
        is_mark = rich.is_mark(token_id)
        release = text.finish() if is_mark else text.push(token_id)
        run.show(release)
        if release.stop is not None:
            run.show_rest()
            self._on_stopped(run, stop_to_pb(release.stop))
            return
        if is_mark:
            text = run.text = run.new_text(self._pieces)
            run.show(Release((token_id,), rich.text_of_mark(token_id)))
        if rich.is_plain:
            self._become_plain(run, text)

    def _become_plain(self, run: Run, text: OutputText) -> None:
        """Nothing but text of the answer comes any more: it takes the short way."""
        run.rich = None
        run.is_matching = run.matcher is not None
        self.routes.forget()
        if run.is_matching:
            return
        if text.is_clear:
            run.text = None
        else:
            self.routes.holding.add(run)
