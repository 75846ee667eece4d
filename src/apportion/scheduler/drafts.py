"""Guesses of what a sequence will draw: verified many at once, they save steps and change no output."""

from collections.abc import Sequence
from typing import Protocol


class DraftSource(Protocol):
    def propose(self, token_ids: Sequence[int], most: int) -> Sequence[int]:
        """What may follow prompt and output so far: at most `most` tokens of the model's vocabulary, [] for no
        guess."""
        ...
