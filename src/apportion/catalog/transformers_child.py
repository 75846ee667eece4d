"""A model's tensors from transformers' own classes, asked of a child process: planning itself imports no torch."""

import json
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, cast

from apportion.catalog.config_fields import ConfigFields
from apportion.catalog.tensor_roles import NamedTensor
from apportion.types.children import python

CHILD_LIMIT_S = 300
"""It takes 5 to 10 s of CPU, most of it imports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    tensors: list[NamedTensor]
    config: ConfigFields


def ask_transformers(fields: ConfigFields, content: dict[str, object]) -> Described | str:
    """What transformers builds from the content of a config.json, or why it does not, in a few words.

    The child runs transformers' classes alone, never code of a model's folder, and has no folder on its path."""
    if find_spec("transformers") is None or find_spec("torch") is None:
        return "transformers is not installed (pip install 'apportion[run]')"
    command = python("-m", "apportion.model.hf.describe")
    try:
        child = subprocess.run(
            command,
            input=json.dumps(content),
            capture_output=True,
            text=True,
            timeout=CHILD_LIMIT_S,
            check=False,
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        return f"transformers did not answer ({type(error).__name__})"
    if child.returncode != 0:
        return (child.stderr.strip().splitlines() or ["transformers failed"])[-1]
    answer = cast(dict[str, Any], json.loads(child.stdout))
    tensors = [NamedTensor.of_shape(name, shape) for name, shape in answer["tensors"].items()]
    return Described(tensors=tensors, config=ConfigFields(fields.file, answer["config"], {}))
