"""How figures are printed: tables of fixed columns, for people and for docs/performance.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; the first column is left-aligned."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    print(f"\n{title}")
    for row in [header, *rows]:
        first = row[0].ljust(widths[0])
        others = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  " + "  ".join([first, *others]), flush=True)


def by_process(title: str, columns: Mapping[str, Mapping[str, float]]) -> None:
    """Prints CPU microseconds, a row for each process and a column for each load."""
    names = sorted({name for column in columns.values() for name in column})
    rows = [
        [name, *(f"{column.get(name, 0.0):.2f}" for column in columns.values())] for name in names
    ]
    sums = [f"{sum(column.values()):.2f}" for column in columns.values()]
    table(title, ["process", *columns], [*rows, ["all", *sums]])


def against(value: float, aim: float, *, is_least: bool = False) -> str:
    """Says an aim and whether a value reaches it."""
    is_met = value >= aim if is_least else value <= aim
    return f"{aim:g} {'met' if is_met else 'missed'}"
