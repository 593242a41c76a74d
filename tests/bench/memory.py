"""Memory of the gateway for each idle stream, and for each finished one after its window.

The gateway's resident memory is read at equal distances while streams are added; the figure is the
slope of the line through the readings behind the first, so that buffers which are made once are
not in it.
"""

from __future__ import annotations

import json
import time

from tests.bench.load import client
from tests.bench.measure import slope
from tests.bench.processes import resident_bytes
from tests.bench.report import against, table
from tests.bench.targets import Target, suite

AIM_BYTES = 300
READINGS = 6
STREAMS_EACH = 2_000
"""Added before each reading: 10,000 behind the first."""
WORKERS = 3
CAPACITY = 4096
WINDOW_S = 1
REST_S = 2.0
"""Before each reading: longer than the window of finished streams and than a settlement."""

_STILL = (
    # Prompts queue for ages: streams are accepted and nothing comes.
    "--set=worker.sim.prefill_tokens_per_s=1",
    "--set=worker.sim.prefill_chunk_tokens=1",
)
_FLAGS = {
    "attach": ("attached, idle", _STILL),
    "detach": ("detached, idle", _STILL),
    "finish": ("finished, after the replay window", ("--flat-out",)),
}


def memory(repeats: int, *, is_quick: bool) -> None:
    """Bytes of the gateway for each stream."""
    del repeats  # A slope over 10,000 streams is a mean already.
    each = 50 if is_quick else STREAMS_EACH
    rows = []
    for what, (name, extra) in _FLAGS.items():
        flags = [
            "--engine=sim",
            f"--workers={WORKERS}",
            f"--capacity={CAPACITY}",
            f"--set=gateway.generations_max={2 * READINGS * STREAMS_EACH}",
            f"--set=gateway.replay_window={WINDOW_S}s",
            *extra,
        ]
        with suite(flags) as whole:
            points = _readings(whole, what, each)
        found = slope(points[1:])
        rows.append([name, f"{points[1][1] / 1e6:.1f} MB", f"{points[-1][1] / 1e6:.1f} MB"])
        rows[-1] += [f"{found:,.0f}", against(found, AIM_BYTES)]
    table(
        f"Memory of the gateway, {(READINGS - 1) * each:,} streams behind the first {each:,}",
        ["streams", "first", "last", "bytes each", "aim"],
        rows,
    )


def _readings(whole: Target, what: str, each: int) -> list[tuple[float, float]]:
    """Reads streams and resident bytes; the first reading is before any stream."""
    pid = whole.family()["gateway"][0]
    points = [(0.0, float(resident_bytes(pid)))]
    with client("idle", whole, str(READINGS * each)) as conversation:
        for number in range(1, READINGS + 1):
            conversation.tell(json.dumps({"do": what, "count": each}))
            conversation.hear()
            time.sleep(REST_S)
            points.append((float(number * each), float(resident_bytes(pid))))
    return points
