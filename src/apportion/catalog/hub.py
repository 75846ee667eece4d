"""Where a model lies: the bundled one, a folder, a config.json or GGUF file, the catalogue, or a hub id."""

import re
from pathlib import Path

from apportion.catalog.known_models import (
    find_known_model,
    known_config,
    known_models,
    near_models,
    several_models,
)
from apportion.catalog.runnable import check_files
from apportion.types.errors import ModelError
from apportion.types.names import one_of

DEMO = "demo"
HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
CONFIG_FILES = ["config.json", "generation_config.json", "hf_quant_config.json"]
MODEL_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja"]


def resolve_model(name: str, *, weights: bool) -> Path:
    """Folder (or config.json or GGUF file) of a model; downloads what is missing of a hub id.

    With `weights` the folder holds the whole checkpoint, else at least its config, and what the catalogue knows
    needs no network. Raises ModelError, also for weights that cannot be run, before they are downloaded.
    """
    if not name.strip():
        raise ModelError(
            "the model has no name; give a folder, a hub id like org/name, or one of `apportion models`"
        )
    if name == DEMO:
        return Path(__file__).parent.parent / "demo"
    path = Path(name).expanduser()
    if path.is_file() and weights:
        raise ModelError(f"'{name}' is a file; running needs a folder with config.json and *.safetensors")
    if path.exists():
        if weights:
            check_files(path)
        return path
    known = find_known_model(name)
    if known is not None and not weights:
        return known_config(known)
    hub_id = HUB_ID.fullmatch(name)
    if hub_id is not None and not name.startswith("."):
        repository, revision = hub_id["repository"], hub_id["revision"]
        folder = _download(repository, revision, CONFIG_FILES)
        if not weights:
            return folder
        check_files(folder)
        return _download(repository, _commit(folder) or revision, MODEL_FILES)
    if known is not None:
        hub_ids = " or ".join(f"'{hub_id}'" for hub_id in known_models()[known]["hub_ids"][:2])
        raise ModelError(f"'{name}' can be planned by that name; to run it, name its hub id {hub_ids}")
    raise ModelError(
        f"'{name}' is no folder, config.json or hub id (like 'org/name', or 'org/name@revision'){_suggest(name)};"
        " 'demo' is the bundled model"
    )


def _suggest(name: str) -> str:
    several = several_models(name)
    if several is not None:
        return f"; did you mean {several}?"
    near = near_models(name)
    return f", nor in the catalogue; did you mean {one_of(near)}?" if near else ", nor in the catalogue"


def _commit(snapshot: Path) -> str | None:
    """Of the files that were checked, so that the weights are not a later one's."""
    return snapshot.name if re.fullmatch(r"[0-9a-f]{40}", snapshot.name) else None


def _download(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    """The hub's snapshot folder, with a progress bar; files already downloaded are not asked for again."""
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType] partly typed
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except RevisionNotFoundError:
        raise ModelError(
            f"the hub's '{hub_id}' has no revision '{revision}'; name a branch, tag or commit"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"the hub has no model '{hub_id}' that you may read; check the name, or set HF_TOKEN"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"cannot download '{hub_id}' from the hub: {reason}") from None
