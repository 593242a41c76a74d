"""Writes usage, or credits, for other systems: python -m tools.export --format cloudevents ...

    export MAAS_KEY=mk_...
    python -m tools.export --endpoint 127.0.0.1:50053 --format focus --from 2026-01-01

Reads and writes page by page. After each page that is written, standard error says how to go on
behind it: should the run be cut off, --after with the last such token writes the rest.
"""

from __future__ import annotations

import asyncio
import io
import sys
from collections.abc import AsyncIterator, Sequence

import grpc
from maas.billing.v1 import ledger_pb2

from libs.clock import SystemClock
from tools.export import cloudevents, focus, movements
from tools.export.options import OptionError, Options, parse
from tools.export.source import Source, connected


async def export(options: Options) -> None:
    """Writes what was asked for to standard output."""
    count = 0
    async with connected(options, SystemClock()) as source:
        if options.form == "focus" and not options.after:
            sys.stdout.write(focus.header())
        async for text, written, next_token in _texts(source, options):
            sys.stdout.write(text)
            # What is said to be written has to be.
            sys.stdout.flush()
            count += written
            more = f"; go on with --after {next_token}" if next_token else ""
            sys.stderr.write(f"export: {count} records{more}\n")


async def _texts(source: Source, options: Options) -> AsyncIterator[tuple[str, int, str]]:
    """Yields what is written of each page, how many things that is, and where the next begins."""
    if options.content == "credits":
        async for page in source.movements():
            lines = [await _text_of_entry(entry, source, options) for entry in page.items]
            yield "".join(lines), len(lines), page.next_token
    else:
        async for records in source.records():
            lines = [await _text_of(record, source, options) for record in records.items]
            yield "".join(lines), len(records.items), records.next_token


async def _text_of(record: ledger_pb2.UsageRecord, source: Source, options: Options) -> str:
    if options.form == "cloudevents":
        return cloudevents.line_of(record, source=options.source)
    return focus.lines_of(
        record,
        await source.price(record.price),
        customer=await source.customer(record.name.partition("/usageRecords/")[0]),
        provider=options.provider,
    )


async def _text_of_entry(entry: ledger_pb2.LedgerEntry, source: Source, options: Options) -> str:
    if options.form == "cloudevents":
        return movements.event_line_of(entry, source=options.source)
    customer = await source.customer(entry.account)
    return movements.focus_line_of(entry, customer=customer, provider=options.provider)


def main(arguments: Sequence[str]) -> int:
    """Exports; returns the exit code."""
    try:
        options = parse(arguments)
        # The same bytes wherever it runs: no locale, and CSV brings its own line ends.
        assert isinstance(sys.stdout, io.TextIOWrapper)
        sys.stdout.reconfigure(encoding="utf-8", newline="")
        asyncio.run(export(options))
    except OptionError as error:
        sys.stderr.write(f"export: {error}\n")
        return 2
    except BrokenPipeError:
        # The reader has seen enough; nothing more can be said to it.
        sys.stdout = None
        return 1
    except grpc.aio.AioRpcError as error:
        sys.stderr.write(f"export: {error.code().name}: {error.details()}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
