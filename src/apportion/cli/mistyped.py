"""What typer says of a command line that it cannot use, in our words: one sentence for names, values and options."""

import re
from typing import Any

from apportion.types.names import unknown_name

VERBS_MEANT = {
    "serve": "run",
    "generate": "run",
    "chat": "run",
    "benchmark": "bench",
    "check": "verify",
    "convert": "export",
    "detect": "probe",
    "list": "models",
    "ls": "models",
    "gpus": "devices",
    "cards": "devices",
    "split": "plan",
}
OPTIONS_MEANT = {
    "--model-len": "--context",
    "--max-model-len": "--context",
    "--ctx-size": "--context",
    "--ctx": "--context",
    "--gpus": "--devices",
    "--gpu": "--devices",
    "--quantization": "--weights",
    "--quant": "--weights",
    "--dtype": "--weights",
    "--batch-size": "--concurrency",
    "--max-num-seqs": "--concurrency",
    "--output": "--out",
    "--engine": "--to",
    "--key": "--key-file",
    "--kv": "--kv-format",
    "--kv-cache-dtype": "--kv-format",
    "--cache-type-k": "--kv-format",
}
"""What other programs call it."""
_CHOICE = re.compile(r"^(?:Value error, )?'(?P<asked>.*)' is not one of (?P<known>'.*')\.$", re.DOTALL)


def sentence(error: Any) -> str | None:
    """None where it is no error of typer's, which have no public base class; `format_message` is what they share."""
    if not hasattr(error, "format_message"):
        return None
    asked = getattr(error, "option_name", None)
    if asked is not None:
        options = [
            name for option in error.ctx.command.params for name in option.opts if name.startswith("--")
        ]
        return unknown_name("option", asked, options, meant=_within(OPTIONS_MEANT, options))
    choice = _CHOICE.match(error.message)
    if choice is not None:
        known = re.findall(r"'([^']*)'", choice["known"])
        name = error.param.opts[0] if error.param else "choice"
        return f"{name}: {unknown_name('choice', choice['asked'], known)}"
    message = error.format_message().replace("Value error, ", "")
    return f"{message} (see apportion --help)"


def _within(meant: dict[str, str], known: list[str]) -> dict[str, str]:
    return {asked: name for asked, name in meant.items() if name in known}
