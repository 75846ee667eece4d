"""Text to token ids and back, from a model folder's tokenizer.json.

The `tokenizers` library alone: loading through transformers costs seconds of imports and gives the same ids.
"""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from apportion.types.errors import ModelError
from apportion.types.json_text import parse_json
from apportion.types.text_file import read_text


class Text:
    """`eos_token_ids` come from generation_config.json, else config.json."""

    def __init__(self, folder: Path) -> None:
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ModelError(f"{folder} has no tokenizer.json; save the model's fast tokenizer there")
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{file} is no tokenizer: {error}") from None
        self.eos_token_ids = _eos_token_ids(folder)

    def encode(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """With `special` what the tokenizer adds around a text, such as a token to begin with."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def stream(self) -> "TextStream":
        return TextStream(self._tokenizer)


class TextStream:
    """Text of one sequence as its tokens arrive; a character of several tokens comes with the last of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held: list[int] = []
        """Tokens since the last that added text."""

    def push(self, token_id: int) -> str:
        text = self._stream.step(self._tokenizer, token_id) or ""
        self._held = [] if text else [*self._held, token_id]
        return text

    def rest(self) -> str:
        """What is left when no token follows: a character that was never completed."""
        return self._tokenizer.decode(self._held, skip_special_tokens=True) if self._held else ""


def _eos_token_ids(folder: Path) -> frozenset[int]:
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        eos = _field(file, "eos_token_id") if file.is_file() else None
        if eos is not None:
            ids: list[Any] = eos if isinstance(eos, list) else [eos]
            if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids):
                raise ModelError(
                    f"{file}: eos_token_id is no token id, nor a list of some; download it again"
                )
            return frozenset(ids)
    return frozenset()


def _field(file: Path, name: str) -> Any:
    try:
        return dict(parse_json(read_text(file))).get(name)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{file} is not a JSON object ({error}); download it again") from None
