"""Fills the templates in deploy/config/local with a suite's ports, paths and model."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from tools.local import credential
from tools.local.model import ServedModel
from tools.local.options import Options
from tools.local.place import DATABASE, METRICS_OFFSET, STATEFUL, TEMPLATES, address


def quoted(text: str) -> str:
    """Makes a text fit between the quotes of a TOML string, which are those of JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def render(options: Options, model: ServedModel, socket: Path) -> dict[str, Path]:
    """Writes the configuration of every process; returns the files by process name.

    Args:
        options: ports, state directory, engine.
        model: what workers serve.
        socket: directory of PostgreSQL's socket.
    """
    values = _values(options, socket)
    texts = {name: _fill(name, values) for name in STATEFUL}
    for name in options.gateway_names:
        texts[name] = _fill("gateway", values | _gateway_values(name, options))
    for name in options.worker_names:
        texts[name] = _fill("worker", values | _worker_values(name, options, model))
    files = {name: options.state.config / f"{name}.toml" for name in texts}
    for name, text in texts.items():
        credential.write(files[name], with_settings(text, name, options.settings))
    return files


def with_settings(text: str, process: str, settings: Mapping[str, str]) -> str:
    """Adds what `--set` asks of a process; replaces what its template says of the same keys.

    Args:
        text: TOML, a key on a line.
        process: name of the process; settings of other services are left out.
        settings: TOML values by "section.key", or "process:section.key".
    """
    lines = text.splitlines()
    for name, value in settings.items():
        target, _, path = name.rpartition(":")
        section, _, key = path.rpartition(".")
        is_meant = section.partition(".")[0] == process.partition("-")[0]
        if target != process if target else not is_meant:
            continue
        header = f"[{section}]"
        if header not in lines:
            lines += ["", header]
        start = lines.index(header) + 1
        end = next(
            (n for n in range(start, len(lines)) if lines[n].startswith("[")),
            len(lines),
        )
        body = [line for line in lines[start:end] if line.partition("=")[0].strip() != key]
        lines[start:end] = [f"{key} = {value}", *body]
    return "\n".join(lines) + "\n"


def _values(options: Options, socket: Path) -> dict[str, str]:
    values = {
        "secrets": quoted(str(options.state.secrets)),
        "socket": quoted(quote(str(socket))),
        "database": DATABASE,
    }
    for name in STATEFUL:
        port = options.ports.of(name)
        values[name] = address(port)
        values[f"{name}_metrics"] = address(port + METRICS_OFFSET)
    return values


def _gateway_values(name: str, options: Options) -> dict[str, str]:
    port = options.ports.of_process(name)
    return {
        "listen": address(port),
        "metrics_listen": address(port + METRICS_OFFSET),
        "instance": f"g{name.partition('-')[2] or 1}",
        "journal": quoted(str(options.state.journal_of(name))),
    }


def _worker_values(name: str, options: Options, model: ServedModel) -> dict[str, str]:
    port = options.ports.of_process(name)
    optional = []
    if options.engine != "trtllm":
        # There they cost GPU memory, wanted or not, and trtllm.lora.enabled goes with them.
        optional.append(f'adapters_dir = "{quoted(str(options.state.adapters))}"')
    if model.file is not None:
        optional.append(f'model_path = "{quoted(str(model.file))}"')
    if model.template_file is not None:
        # Our small model calls tools where it has to; it was never taught to think.
        optional.append(f'chat_template = "{quoted(str(model.template_file))}"')
        optional.append('reasoning_parser = "none"')
    if options.capacity is not None:
        optional.append(f"capacity = {options.capacity}")
    return {
        "name": name.replace("worker-", "w"),
        "listen": address(port),
        "metrics_listen": address(port + METRICS_OFFSET),
        "model_version": model.version_name,
        "engine": options.engine,
        "optional": "\n".join(optional),
    }


def _fill(template: str, values: Mapping[str, str]) -> str:
    text = (TEMPLATES / f"{template}.toml").read_text(encoding="utf-8")
    # The comment at the top speaks of ${...} and is not for whoever reads the result.
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    return string.Template(body).substitute(values).strip() + "\n"
