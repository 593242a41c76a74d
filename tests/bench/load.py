"""What a client process is told to do, and what it answers: lines of JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from tests.bench.measure import Fairness
from tests.bench.processes import using
from tests.bench.targets import ROOT, BenchError, Target

PROMPT_TOKENS = 32
WARM = "warm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a client does.

    Attributes:
        kind: "streams": `count` at once; "together": the same, watched while all of them run, for
            `seconds` or until the first one ends, and then cancelled; "callers": `count` that each
            ask again as soon as they are answered, `requests` in all; "arrivals": `requests` as
            independent callers make them, `per_s`, beside `count` streams that go on all the time.
        count: of streams or callers.
        tokens: output tokens of each stream or request.
        frame_interval_s: asked of the suite; 0 for none.
        requests: of callers and arrivals.
        per_s: of arrivals.
        seed: of the arrivals' moments.
        seconds: that streams are watched "together".
        top_logprobs: alternatives with each token's log-probability; None for no scores.
        at_once: arrivals in flight that connections are made for; as many streams warm it up.
    """

    kind: str
    count: int
    tokens: int
    frame_interval_s: float = 0.0
    requests: int = 0
    per_s: float = 0.0
    seed: int = 0
    seconds: float = 0.0
    top_logprobs: int | None = None
    at_once: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a load gave.

    Attributes:
        tokens: output tokens received.
        frames: messages with tokens.
        seconds: from the first request until the last end.
        first_token_s: of each stream or request, from the call until its first token.
        fairness: of "together"; None for other loads.
    """

    tokens: int
    frames: int
    seconds: float
    first_token_s: list[float]
    fairness: Fairness | None = None

    def to_json(self) -> str:
        """Writes it as one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Result:
        """Reads what `to_json` wrote."""
        found = json.loads(text)
        if found["fairness"] is not None:
            found["fairness"] = Fairness(**found["fairness"])
        return cls(**found)


@dataclass(frozen=True, slots=True)
class Measured:
    """A load with the CPU time that its target used.

    Attributes:
        result: what the client saw.
        cpu_s: CPU seconds by process.
    """

    result: Result
    cpu_s: dict[str, float] = field(default_factory=dict)

    @property
    def total_s(self) -> float:
        """CPU seconds of all processes."""
        return sum(self.cpu_s.values())

    def us_per(self, count: int) -> dict[str, float]:
        """CPU microseconds by process, for each of `count` tokens or requests."""
        return {name: seconds * 1e6 / count for name, seconds in self.cpu_s.items()}


class Conversation:
    """A client process: it is told lines and answers lines."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def tell(self, line: str) -> None:
        """Sends a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def hear(self) -> str:
        """Waits for a line.

        Raises:
            BenchError: the client ended instead.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise BenchError("the client ended without an answer; its error is above")
        return line


@contextmanager
def client(module: str, target: Target, *arguments: str) -> Iterator[Conversation]:
    """Runs a client against a target, in a process of its own."""
    command = [sys.executable, "-m", f"tests.bench.{module}", target.endpoint]
    command += [target.api_key, target.model, *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Conversation(process)
        finally:
            if process.stdin is not None:
                process.stdin.close()
            process.wait()


def run(target: Target, load: Load) -> Measured:
    """Runs a load once, warmed up; CPU is counted from its first request on.

    Args:
        target: what to run it against.
        load: what to do.

    Raises:
        BenchError: the client failed.
    """
    with client("client", target, json.dumps(asdict(load))) as conversation:
        if conversation.hear() != WARM:
            raise BenchError("the client did not warm up")
        target.settle()
        with using(target.family) as usage:
            conversation.tell("go")
            result = Result.from_json(conversation.hear())
            target.settle()
    return Measured(result, usage.seconds)
