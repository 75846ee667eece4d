"""The tensors of a model as transformers builds it from its config, without their data: a program for a child process.

Reads a config.json on stdin and writes {"tensors": {name: shape}, "config": {...}} on stdout; config is the language
model's, with defaults and the names that most families use. Classes are transformers' own: no code of a model's
folder is run. An error is one line on stderr and exit status 1.
"""

import json
import os
import sys
from typing import Any

_DERIVED = ("num_hidden_layers", "num_attention_heads")
"""Which some configs compute."""
_LEFT_OUT = ("quantization_config", "auto_map")


def describe(fields: dict[str, Any]) -> dict[str, Any]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = _model_type(fields)
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    config = CONFIG_MAPPING[model_type].from_dict(_plain(fields))
    text = config.get_text_config(decoder=True)
    reasons: list[str] = []
    for auto, of in (
        (AutoModelForCausalLM, config),
        (AutoModelForImageTextToText, config),
        (AutoModelForCausalLM, text),
        (AutoModel, text),
    ):
        try:
            with torch.device("meta"):
                model = auto.from_config(of)
        except Exception as error:  # whatever one class makes of a config, another may build it
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        tensors = {name: list(one.shape) for name, one in model.named_parameters()}
        return {"tensors": tensors, "config": _known_names(text)}
    raise ValueError(reasons[0])


def _model_type(fields: dict[str, Any]) -> str:
    """The config's own, or that of the class it names."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    own = fields.get("model_type")
    if own in CONFIG_MAPPING:
        return str(own)
    classes = fields.get("architectures")
    for name, built in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if isinstance(classes, list) and built in classes:
            return name
    raise ValueError(f"transformers has no model_type {own!r}")


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _plain(value) if isinstance(value, dict) else value
        for name, value in fields.items()
        if name not in _LEFT_OUT
    }


def _known_names(config: Any) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    aliases = {common: fields[own] for common, own in config.attribute_map.items() if own in fields}
    derived = {
        name: getattr(config, name) for name in _DERIVED if isinstance(getattr(config, name, None), int)
    }
    return fields | aliases | derived


def main() -> None:
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_OFFLINE"] = "1"
    answer, sys.stdout = sys.stdout, sys.stderr  # what libraries print stands beside the answer
    try:
        described = describe(json.load(sys.stdin))
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        print(f"{text or type(error).__name__}", file=sys.stderr)
        raise SystemExit(1) from None
    json.dump(described, answer)


if __name__ == "__main__":
    main()
