"""Records the fields of real models' config.json files that planning depends on, as tests/data/real_configs.json.

Usage: python scripts/record_configs.py FOLDER, with a folder per model (org--name) that holds its config.json and,
where there is one, hf_quant_config.json.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

OUT = Path(__file__).parents[1] / "tests" / "data" / "real_configs.json"
SOURCE = "config.json files of the models' publishers, collected in ai-dynamo/aiconfigurator (Apache-2.0); facts alone"
LEFT_OUT = re.compile(
    r"vision_config|audio_config|auto_map|.*token_id|.*token_index|transformers_version|generation\w*|.*dropout"
    r"|initializer\w*|use_cache|_name_or_path|.*_eps|.*epsilon|.*aux_loss\w*|hidden_act|input_activations"
    r"|producer|output_activations|kv_cache_\w+"
)
NEVER_QUANTISED = re.compile(r"norm|\.gate\b|bias|vis|mm_proj|conv1d")


def kept(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: kept(item) for key, item in value.items() if not LEFT_OUT.fullmatch(key) and item is not None
        }
    if isinstance(value, list) and len(value) > 8 and all(isinstance(item, str) for item in value):
        return [item for item in value if not NEVER_QUANTISED.search(item)]
    if isinstance(value, list):
        return [kept(item) for item in value]
    return value


def main() -> None:
    models: dict[str, Any] = {}
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        files = {name: folder / name for name in ("config.json", "hf_quant_config.json")}
        models[folder.name] = {
            name: kept(json.loads(file.read_text(encoding="utf-8")))
            for name, file in files.items()
            if file.is_file()
        }
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(files)}" for name, files in models.items())
    OUT.write_text(f'{{"source": {json.dumps(SOURCE)},\n"models": {{\n{lines}\n}}}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
