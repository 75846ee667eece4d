"""A config.json is not believed: whatever one field of it is changed to, it is read, or refused in one line."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apportion.catalog import general
from apportion.catalog.known_models import CATALOGUE
from apportion.catalog.model_config import read_model_spec
from apportion.model.lean.config import lean_config
from apportion.types.errors import ModelError

REAL = json.loads((Path(__file__).parents[1] / "data" / "real_configs.json").read_text(encoding="utf-8"))[
    "models"
]
CONFIGS = [
    *(file.read_text(encoding="utf-8") for file in sorted(CATALOGUE.glob("*.json"))),
    *(json.dumps(files["config.json"]) for files in REAL.values()),
]
ODD: list[Any] = [
    *(None, True, False, "", "x", "a\nb", [], {}, [1], ["llama"], {"a": 1}, [[]], {"rope_type": []}),
    *(0, 1, 2, 3, 10**9, 2**64, 10**400, -1, 0.5, 1e-300, 1e300, float("nan"), float("inf")),
]


@pytest.fixture(autouse=True)
def by_fields(monkeypatch: pytest.MonkeyPatch):
    """transformers, in a child process, believes its configs no more than we do, but takes seconds."""
    monkeypatch.setattr(general, "ask_transformers", lambda *_: "not asked")


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_field_changed_is_read_or_refused(tmp_path: Path, data: st.DataObject):
    config = json.loads(data.draw(st.sampled_from(CONFIGS)))
    place: Any = config
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        inner = place[key]
        if not (isinstance(inner, (dict, list)) and inner) or data.draw(st.booleans()):
            break
        place = inner
    place[key] = data.draw(st.sampled_from(ODD))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    message = ""
    try:
        spec = read_model_spec(file)
    except ModelError as error:
        message = str(error)
    else:
        with suppress(ModelError):
            lean_config(file, spec)
    assert "\n" not in message
