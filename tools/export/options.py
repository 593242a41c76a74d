"""What an export was asked for: flags, and the one environment variable."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

FORMATS = ("cloudevents", "focus")
CONTENTS = ("usage", "credits")
KEY_VARIABLE = "MAAS_KEY"


class OptionError(Exception):
    """The flags do not go together, or a file cannot be read; the text says what."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to write, and from where.

    Attributes:
        endpoint: host:port of billing.
        key: an API key.
        certificates: PEM of those to trust; None for plaintext.
        form: one of FORMATS.
        content: one of CONTENTS.
        parent: "accounts/{account}"; empty for a tenant's own.
        start_time: what was settled or posted then or later; None for all.
        end_time: what was settled or posted before; None for all.
        after: where a former run stopped; empty for the beginning.
        provider: who provides the service, in FOCUS.
        source: of CloudEvents; with the id it is what receivers tell repeats by.
    """

    endpoint: str
    key: str
    certificates: bytes | None
    form: str
    content: str
    parent: str
    start_time: datetime | None
    end_time: datetime | None
    after: str
    provider: str
    source: str


def parser() -> argparse.ArgumentParser:
    """Describes the flags."""
    found = argparse.ArgumentParser(
        prog="python -m tools.export",
        description="Writes usage records, or what else moves the money of accounts, to standard"
        " output, oldest first. The same range gives"
        " the same bytes, whenever it is asked for, once it is over.",
    )
    add = found.add_argument
    add("--endpoint", metavar="HOST:PORT", required=True, help="of billing")
    add("--format", choices=FORMATS, required=True, dest="form")
    add(
        "--what",
        choices=CONTENTS,
        default="usage",
        dest="content",
        help="usage (the default), or credits: grants, top-ups, refunds, adjustments, expiries",
    )
    add("--key-file", type=Path, help=f"API key; without it the variable {KEY_VARIABLE}")
    add("--ca", type=Path, help="PEM of the certificates to trust; without it plaintext")
    add("--parent", default="", metavar="accounts/ID", help="a tenant may leave it out of usage")
    add(
        "--from",
        dest="start",
        metavar="TIME",
        help="settled or posted at this time or later: a day or a"
        " time, as 2026-01-31 or 2026-01-31T12:00:00Z",
    )
    add("--to", dest="end", metavar="TIME", help="settled or posted before this time")
    add("--after", default="", metavar="TOKEN", help="go on where a run stopped, as it said")
    add("--provider", default="MaaS", metavar="NAME", help="who provides the service (MaaS)")
    add("--source", default="/maas/billing", metavar="URI", help="of events (/maas/billing)")
    return found


def parse(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Options:
    """Reads the flags.

    Args:
        arguments: of the command line.
        environment: where the key may be; None for that of the process.

    Raises:
        OptionError: there is no key, a time is none, or a file is unreadable.
    """
    found = parser().parse_args(arguments)
    if not found.endpoint.rpartition(":")[2].isdecimal():
        raise OptionError("--endpoint must be HOST:PORT")
    start_time = _time(found.start, "--from")
    end_time = _time(found.end, "--to")
    if start_time is not None and end_time is not None and start_time >= end_time:
        raise OptionError("--to must be after --from")
    if not (found.provider and found.source):
        raise OptionError("--provider and --source must not be empty")
    if found.content == "credits" and not found.parent:
        raise OptionError("--what credits needs --parent")
    return Options(
        endpoint=found.endpoint,
        key=_key(found.key_file, environment),
        certificates=None if found.ca is None else _read(found.ca),
        form=found.form,
        content=found.content,
        parent=found.parent,
        start_time=start_time,
        end_time=end_time,
        after=found.after,
        provider=found.provider,
        source=found.source,
    )


def _key(path: Path | None, environment: Mapping[str, str] | None) -> str:
    if path is not None:
        text = _read(path).decode("ascii", "replace").strip()
        if not text:
            raise OptionError(f"{path} is empty")
        return text
    # A key on the command line could be read by everybody on the machine.
    known = os.environ if environment is None else environment  # noqa: TID251 - the one place
    text = known.get(KEY_VARIABLE, "").strip()
    if not text:
        raise OptionError(f"there is no key: set {KEY_VARIABLE} or --key-file")
    return text


def _time(text: str | None, flag: str) -> datetime | None:
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise OptionError(f"{flag} {text}: must be a day or a time, as 2026-01-31") from None
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OptionError(f"{path}: {error.strerror}") from error
