"""A conversation as the prompt that a checkpoint was trained on, by its own Jinja template.

As transformers' `apply_chat_template` renders it: blocks are trimmed, `bos_token` and the like are the tokenizer's, and
the template runs in a sandbox, since it comes with downloaded weights.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from apportion.types.errors import ModelError, UsageError
from apportion.types.json_text import parse_json
from apportion.types.text_file import read_text

Message = Mapping[str, Any]
"""{"role": "user", "content": "…"}, and whatever else a template knows."""
_DEFAULT = "default"
"""Among several named templates."""


class ChatTemplate:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt, up to where the answer begins. Raises ModelError where the checkpoint has no template,
        UsageError for messages that it refuses."""
        config = _tokenizer_config(self._folder)
        source = self._source(config)
        if source is None:
            raise ModelError(
                f"{self._folder.name} has no chat template, so it was trained on no conversations that it says; give"
                " generate() a whole prompt, or use an instruction-tuned model"
            )
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(source).render(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **_special(config)
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"the model's chat template refuses these messages: {reason}") from None

    def _source(self, config: Mapping[str, Any]) -> str | None:
        file = self._folder / "chat_template.jinja"
        if file.is_file():
            return read_text(file)
        given = config.get("chat_template")
        if isinstance(given, list):  # several, by name
            named = {one["name"]: one["template"] for one in given}
            given = named.get(_DEFAULT)
        return given if isinstance(given, str) else None


def _tokenizer_config(folder: Path) -> Mapping[str, Any]:
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        return dict(parse_json(read_text(file)))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{file} is not a JSON object ({error}); download it again") from None


def _special(config: Mapping[str, Any]) -> dict[str, str]:
    """Tokens that templates name; older files hold them as objects."""
    names = [name for name in config if name.endswith("_token")]
    found = {
        name: config[name]["content"] if isinstance(config[name], dict) else config[name] for name in names
    }
    return {name: text for name, text in found.items() if isinstance(text, str)}


def _to_json(value: object, indent: int | None = None) -> str:
    """Without the HTML escapes of Jinja's own."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise UsageError(f"the model's chat template refuses these messages: {message}")
