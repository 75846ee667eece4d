"""A request on its way: Request -> ScheduledBatch -> StepResult -> TokenEvent."""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn. `temperature == 0` is greedy. The draw at a position depends on `seed` and
    that position alone, never on the batch, so a sequence resumes identically wherever it is recomputed."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False
    return_logits: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    id: int
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """New tokens of one sequence in a batch: `token_ids` stand at positions `[start, start + len)`, whose KV goes
    to `block_ids` (the sequence's whole table so far). `sampling` is set where the chunk ends in a token to draw."""

    sequence_id: int
    start: int
    token_ids: tuple[int, ...]
    block_ids: tuple[int, ...]
    sampling: SamplingParams | None

    @property
    def stop(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledBatch:
    """One microbatch: a flat ragged batch that passes through every stage."""

    step_id: int
    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """The tokens drawn in a step, by sequence; `logits` (fp32, little endian bytes) only where asked for."""

    step_id: int
    token_ids: dict[int, int]
    logits: dict[int, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    request_id: int
    token_id: int
    finish_reason: FinishReason | None
    logits: bytes | None
