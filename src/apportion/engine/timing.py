"""TTFT, TPOT and throughput of a run, from the arrival of each token."""

import time
from statistics import mean

from apportion.types.request import TokenEvent


class Timing:
    """Created when the requests are handed in; every event is recorded as it comes, or with its second of the run."""

    def __init__(self) -> None:
        self._begun_s = time.perf_counter()
        self._first_s: dict[tuple[int, int], float] = {}
        self._last_s: dict[tuple[int, int], float] = {}
        self._num_tokens: dict[tuple[int, int], int] = {}
        self._times_s: list[float] = []

    def record(self, event: TokenEvent, at_s: float | None = None) -> None:
        now_s = time.perf_counter() - self._begun_s if at_s is None else at_s
        key = (event.request_id, event.sample)
        self._first_s.setdefault(key, now_s)
        self._last_s[key] = now_s
        self._times_s.append(now_s)
        self._num_tokens[key] = self._num_tokens.get(key, 0) + 1

    @property
    def ttft_s(self) -> float:
        """Mean over requests."""
        return mean(self._first_s.values())

    @property
    def tpot_s(self) -> float:
        """Mean over requests of the time between their tokens; 0 where none drew two."""
        gaps = [
            (self._last_s[i] - self._first_s[i]) / (num_tokens - 1)
            for i, num_tokens in self._num_tokens.items()
            if num_tokens > 1
        ]
        return mean(gaps) if gaps else 0.0

    @property
    def tokens_per_s(self) -> float:
        return sum(self._num_tokens.values()) / max(self._last_s.values())

    @property
    def prefill_s(self) -> float:
        """Until every request has its first token."""
        return max(self._first_s.values())

    @property
    def decode_tokens_per_s(self) -> float:
        """While every request draws: from the last first token to the first end; 0 where there is no such time."""
        begun_s, ended_s = self.prefill_s, min(self._last_s.values())
        if ended_s <= begun_s:
            return 0.0
        return sum(begun_s < time_s <= ended_s for time_s in self._times_s) / (ended_s - begun_s)
