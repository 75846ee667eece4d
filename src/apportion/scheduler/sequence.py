"""A request while it runs: the only mutable state of the scheduler besides the free blocks."""

from apportion.types.request import FinishReason, Request


class Sequence:
    """`token_ids` = prompt + output so far, of which `[0, next_position)` are computed or in flight."""

    __slots__ = ("block_ids", "next_position", "num_in_flight", "request", "token_ids")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.token_ids = list(request.prompt_ids)
        self.next_position = 0
        self.num_in_flight = 0
        self.block_ids: list[int] = []

    @property
    def num_pending(self) -> int:
        """Known tokens that no batch has taken yet; 0 while the next token is being drawn."""
        return len(self.token_ids) - self.next_position

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)

    def finish_reason(self, eos_token_ids: frozenset[int], max_context_tokens: int) -> FinishReason | None:
        """Why the sequence ends after its last token, None where it goes on."""
        sampling = self.request.sampling
        if self.token_ids[-1] in eos_token_ids and not sampling.ignore_eos:
            return "stop"
        if self.num_output >= sampling.max_tokens or len(self.token_ids) >= max_context_tokens:
            return "length"
        return None
