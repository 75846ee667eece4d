"""What the devices are asked to do."""

from dataclasses import dataclass
from typing import Literal

Objective = Literal["latency", "throughput"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`concurrency` sequences at once, each of up to `max_context_tokens`; memory is planned for all of them.

    `prompt_tokens` and `output_tokens` are the typical lengths whose time is minimised. Under "latency" that is
    the time of one request alone; under "throughput" the time per output token with all sequences running.
    """

    prompt_tokens: int
    output_tokens: int
    concurrency: int
    max_context_tokens: int
    objective: Objective
