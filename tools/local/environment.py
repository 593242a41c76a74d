"""What a user is told when the suite is ready, and what scripts read: dev.env."""

from __future__ import annotations

import shlex

from tools.local import credential
from tools.local.options import Options
from tools.local.place import ROOT, STATEFUL, address

ACCOUNT = "accounts/dev"

_GREETING = """
The suite is up. Ctrl-C, or `make stop` in another shell, stops it.

  API key     {key}
  model       {model}
  gateway     {gateway}
  catalog     {catalog}   auth {auth}   billing {billing}   scheduler {scheduler}
  logs        {logs}

Paste (grpcurl):

  . {environment}
  grpcurl -plaintext -H "authorization: Bearer $MAAS_API_KEY" \\
    -d '{{"spec":{{"model":"'$MAAS_MODEL'","text":"Once upon a time","stop":{{"max_output_tokens":64}}}}}}' \\
    $MAAS_ENDPOINT maas.inference.v1.GenerationService/StreamGenerate

or, without grpcurl:

  . {environment}
  {python} -m tools.ask --chat "Tell me a story about a fox in the snow"
"""  # noqa: E501 - a line to paste


def variables(options: Options, offering: str) -> dict[str, str]:
    """What scripts may rely on."""
    ports = options.ports
    names = ("gateway", *STATEFUL)
    return {
        "MAAS_ENDPOINT": address(ports.of("gateway")),
        "MAAS_ENDPOINTS": " ".join(
            address(ports.of_process(name)) for name in options.gateway_names
        ),
        "MAAS_API_KEY": credential.read(credential.tenant_key_file(options.state)),
        "MAAS_ADMIN_KEY": credential.read(credential.admin_key_file(options.state)),
        "MAAS_MODEL": offering,
        "MAAS_ACCOUNT": ACCOUNT,
        **{f"MAAS_{name.upper()}": address(ports.of(name)) for name in names},
        "MAAS_WORKER": address(ports.worker(1)),
    }


def write(options: Options, offering: str) -> None:
    """Writes dev.env, for `. .maas/dev.env`."""
    lines = [
        f"export {name}={shlex.quote(value)}"
        for name, value in variables(options, offering).items()
    ]
    credential.write(options.state.environment, "\n".join(lines) + "\n")


def greeting(options: Options, offering: str) -> str:
    """Key, addresses and lines to paste."""
    values = variables(options, offering)
    return _GREETING.format(
        key=values["MAAS_API_KEY"],
        model=offering,
        logs=_short(str(options.state.logs)),
        environment=_short(str(options.state.environment)),
        python=".venv/bin/python",
        **{name: values[f"MAAS_{name.upper()}"] for name in ("gateway", *STATEFUL)},
    )


def _short(path: str) -> str:
    """Relative to the repository where it is inside, as that is where make runs."""
    return shlex.quote(path.removeprefix(f"{ROOT}/"))
