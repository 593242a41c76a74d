"""Checks the trtllm engine on a GPU machine: make gpu-check MODEL=<directory>.

Says what is there, makes the engine's contract on the given model, compares the suite's throughput
with that of the bare LLM API, and leaves the results in a file. See docs/trtllm.md.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from libs.observability.logs import configure_logs
from services.worker.engine.base import EngineStartError
from services.worker.engine.hf_model import read_model
from tools.conformance.engine import run as contract
from tools.conformance.engine.table import ROWS
from tools.conformance.engine.trtllm import (
    stand_in_environment,
    trtllm_row,
    write_tiny_model,
)
from tools.conformance.verdict import CannotShow, summary
from tools.gpu_check import report
from tools.gpu_check.machine import look
from tools.gpu_check.options import OptionError, Options, parse
from tools.gpu_check.throughput import Setup, bare_runs, suite_runs, table
from tools.gpu_check.workload import Workload

SHOWN, FAILED, NOT_SHOWN = 0, 1, 2
_STAND_IN_STEP_S = 0.0005
# Of the rows of a vocabulary the last ones are control tokens, or none at all.
_ORDINARY = 0.75


def say(text: str) -> None:
    """Prints a line now."""
    print(text, flush=True)


class Check:
    """One run.

    Args:
        options: what was asked for.
        folder: for what it needs on the way.
        say: takes each line.
    """

    def __init__(self, options: Options, folder: Path, say: Callable[[str], None]) -> None:
        self._options = options
        self._folder = folder
        self._say = say
        self._environment: Mapping[str, str] = {}
        self._model = options.model
        if options.is_stand_in:
            self._environment = stand_in_environment({"step_s": _STAND_IN_STEP_S})
            self._model = folder / "model"
            write_tiny_model(self._model)

    async def run(self) -> int:
        """Does all of it; returns the exit code."""
        machine = await asyncio.to_thread(
            look, self._options.python, self._environment, is_shared=self._options.is_shared
        )
        for line in machine.lines():
            self._say(line)
        if not machine.gpus and not self._options.is_stand_in:
            self._say("no GPU, so nothing else can be shown here")
            return NOT_SHOWN
        results = report.Results(machine)
        has_engine = bool(machine.engine.surface)
        if not has_engine:
            self._lack(results, f"the trtllm engine: {machine.engine.problem}")
        elif self._model is None:
            has_engine = False
            self._lack(results, "the trtllm engine: needs MODEL=<directory of a model>")
        else:
            results.model = report.model_facts(self._model)
        if "contract" in self._options.parts:
            await self._contract(results, has_engine=has_engine)
        if "throughput" in self._options.parts and has_engine:
            await self._throughput(results)
        return self._close(results)

    def _lack(self, results: report.Results, what: str) -> None:
        results.missing.append(what)
        self._say(f"NOT SHOWN {what}")

    async def _contract(self, results: report.Results, *, has_engine: bool) -> None:
        """The contract on the real engine; without it on the others, which need no GPU."""
        rows = dict(ROWS)
        del rows["trtllm"]
        if has_engine and self._model is not None:
            rows = {
                "trtllm": partial(
                    trtllm_row,
                    self._model,
                    section=self._options.section,
                    environment=self._environment,
                    is_repeatable=self._options.is_stand_in,
                    remark="the model is loaded now, and again for each of the last checks",
                )
            }
        folder = self._folder / "contract"
        folder.mkdir()
        results.verdicts = await contract.run(rows, self._options.only, folder, self._say)
        self._say(summary(results.verdicts))

    async def _throughput(self, results: report.Results) -> None:
        options = self._options
        assert self._model is not None
        try:
            vocabulary = (await asyncio.to_thread(read_model, self._model)).vocabulary_size
            setup = Setup(
                model=self._model,
                # Nobody asks for an adapter, and room for them costs speed on both sides.
                section={name: options.section[name] for name in options.section if name != "lora"},
                python=options.python,
                environment=self._environment,
                work=Workload(
                    streams=options.streams,
                    input_tokens=options.input_tokens,
                    output_tokens=options.output_tokens,
                    rounds=options.rounds,
                    vocabulary=int(vocabulary * _ORDINARY),
                ),
            )
            self._say("throughput: the bare LLM API, then the whole suite on the same engine")
            results.bare = await bare_runs(setup)
            results.suite = await suite_runs(setup)
        except (CannotShow, EngineStartError) as reason:
            self._lack(results, f"throughput: {reason}")
            return
        for line in table(results.bare, results.suite):
            self._say(line)

    def _close(self, results: report.Results) -> int:
        options = self._options
        path = options.report
        private = {str(options.python): "<python>", str(self._folder): "<folder>"}
        if self._model is not None:
            private[str(self._model)] = "<model>"
        report.write(path, results, private)
        for line in report.how_to_report(path, results):
            self._say(line)
        if results.failures:
            return FAILED
        return NOT_SHOWN if results.missing else SHOWN


def main(arguments: Sequence[str]) -> int:
    """Checks this machine; returns the exit code."""
    configure_logs("gpu-check", "error")
    try:
        options = parse(arguments)
        with tempfile.TemporaryDirectory(prefix="maas-gpu-check-") as folder:
            return asyncio.run(Check(options, Path(folder), say).run())
    except (OptionError, OSError) as error:
        sys.stderr.write(f"gpu-check: {error}\n")
        return NOT_SHOWN


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
