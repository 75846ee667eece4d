from pathlib import Path

import pytest

from apportion.catalog.hub import resolve_model
from apportion.engine.text import Text
from apportion.types.errors import ModelError

SAMPLE = "ROMEO:\nBut soft, naïve 世界 🎭!\n"


def test_stream_gives_the_text_piece_by_piece():
    text = Text(resolve_model("demo", weights=True))
    token_ids = text.encode(SAMPLE)
    stream = text.stream()
    pieces = [stream.push(token_id) for token_id in token_ids]
    assert "".join(pieces) == SAMPLE == text.decode(list(token_ids))
    assert len(token_ids) > len(SAMPLE) / 2
    assert "" in pieces  # a character of several tokens comes with its last


def test_end_of_text_is_known_and_not_printed():
    text = Text(resolve_model("demo", weights=True))
    (eos,) = text.eos_token_ids
    assert text.stream().push(eos) == ""


def test_missing_and_broken_tokenizers_are_one_line(tmp_path: Path):
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        Text(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="is no tokenizer"):
        Text(tmp_path)
