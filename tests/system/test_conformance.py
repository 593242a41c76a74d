"""The conformance kit as `make conformance` runs it, and against a suite that runs already."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tests.system.suite import Client
from tools.conformance.features import REQUEST, STREAM

TIMEOUT_S = 300
"""Far above the minute that it takes: a busy machine may be slower."""
DISTURBING = ("U3", "S-4", "S-9", "drain")
"""Features that kill or stop workers and mostly wait: they have a suite to themselves."""


async def run_kit(*flags: str, group: str = "stream") -> tuple[int, list[str]]:
    """Exit code and lines of a run."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tools.conformance", "--group", group, *flags),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(TIMEOUT_S):
        output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode().splitlines()


async def test_stream_group_passes_on_suites_of_its_own() -> None:
    quiet = [feature for feature in STREAM if feature not in DISTURBING]
    runs = await asyncio.gather(
        run_kit("--only", ",".join(quiet)), run_kit("--only", ",".join(DISTURBING))
    )

    lines = [line for _, printed in runs for line in printed]
    assert [code for code, _ in runs] == [0, 0], "\n".join(lines)
    passed = {line.split()[1] for line in lines if line.startswith("PASS ")}
    assert passed == set(STREAM), "\n".join(lines)


async def test_request_group_passes_on_every_engine() -> None:
    # Refusals within 50 ms are a matter of the machine: `make conformance` shows them.
    features = [feature for feature in REQUEST if feature != "bombs"]
    # Our small model was never taught to think: a part of W-11 cannot be shown on it.
    lacks = {"sim": set(), "llamacpp": {"W-11"}}
    runs = await asyncio.gather(
        *(
            run_kit("--engine", engine, "--only", ",".join(features), group="request")
            for engine in lacks
        )
    )

    for (code, lines), missing in zip(runs, lacks.values(), strict=True):
        assert code == 0, "\n".join(lines)
        passed = {line.split()[1] for line in lines if line.startswith("PASS ")}
        assert passed == set(features) - missing, "\n".join(lines)
        skipped = [line.split("(")[0] for line in lines if line.startswith("SKIP ")]
        assert skipped == [
            f"SKIP {feature} reasoning: the model has none " for feature in sorted(missing)
        ]


async def test_what_was_not_given_is_skipped_with_its_reason(
    client: Client, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text(client.variables["MAAS_API_KEY"])
    place = ["--endpoint", client.variables["MAAS_ENDPOINT"], "--api-key-file", str(key)]
    place += ["--model", client.variables["MAAS_MODEL"]]

    code, lines = await run_kit(*place, "--only", "W-5,W-2,W-3,U2")

    assert code == 0
    assert lines[0].startswith("SKIP W-3 usage records: needs --billing (shown: 120 tokens")
    assert lines[1].startswith("PASS W-5 ")
    assert lines[2] == "SKIP U2 needs --billing (shown: nothing)"
    assert lines[3] == "SKIP W-2 needs --scheduler and --admin-key-file (shown: nothing)"
    assert lines[4] == "1 passed, 0 failed, 3 not shown of 4"
