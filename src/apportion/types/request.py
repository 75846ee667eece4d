"""A request on its way: Request -> ScheduledBatch -> StepResult -> TokenEvent."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn. `temperature == 0` is greedy. The draw at a position depends on `seed` and
    that position alone, never on the batch, so a sequence resumes identically wherever it is recomputed."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False
    return_logits: bool = False


FIRST_OWN_ID = 2**32
"""Of requests that the library numbers; callers have those below for theirs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt to continue, `n` times over. A lower `priority` goes first."""

    id: int
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    n: int = 1
    priority: int = 0


class Draw(NamedTuple):
    """A token to draw for a sequence after the last token of a chunk."""

    sequence_id: int
    sampling: SamplingParams


class Chunk(NamedTuple):
    """New tokens of one sequence in a batch: `token_ids` stand at positions `[start, start + len)`, whose KV goes
    to `block_ids` (the sequence's whole table so far). `sampling` is set where the chunk ends in a token to draw;
    `forks` are further samples of the same prompt, which begin with their own draw from the same logits.

    The last `num_drafts` of the tokens are guesses. A token is drawn after each and after the one before them, as
    long as each guess is what was drawn: what follows the first wrong one means nothing."""

    sequence_id: int
    start: int
    token_ids: tuple[int, ...]
    block_ids: tuple[int, ...]
    sampling: SamplingParams | None
    forks: tuple[Draw, ...] = ()
    num_drafts: int = 0

    @property
    def num_draws(self) -> int:
        """Rows of logits."""
        return 0 if self.sampling is None else 1 + self.num_drafts

    @property
    def stop(self) -> int:
        return self.start + len(self.token_ids)


MoveKind = Literal["copy", "swap out", "swap in"]


class BlockMove(NamedTuple):
    """A block's content on its way: between two blocks, to a slot of the host's swap space, or back from one."""

    kind: MoveKind
    src: int
    dst: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledBatch:
    """One microbatch: a flat ragged batch that passes through every stage.

    Each stage first carries out `moves` in order, then writes the chunks' KV. The sequences of `ended` occur in
    no later batch."""

    step_id: int
    chunks: tuple[Chunk, ...]
    moves: tuple[BlockMove, ...] = ()
    ended: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """The tokens drawn in a step, by sequence: of one with drafts those that were right, and the next. `logits` (fp32,
    little endian bytes) of each only where asked for."""

    step_id: int
    token_ids: dict[int, Sequence[int]]
    logits: dict[int, Sequence[bytes]]


class TokenEvent(NamedTuple):
    """A token of one of a request's samples. Of the prompt, `cached_tokens` came from the prefix cache."""

    request_id: int
    token_id: int
    finish_reason: FinishReason | None
    logits: bytes | None
    sample: int = 0
    cached_tokens: int = 0
