"""Which replica a request goes to: the one with the least to do for its share of the sequences, while it has room.

Requests wait here until a replica has fewer running than it was planned for, so that one which is quick with what
it has is given more. Replicas ask from threads of their own.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from threading import Condition

from apportion.types.request import Request


class Dispatcher:
    def __init__(self, capacities: Sequence[int], requests: Iterable[Request]) -> None:
        """`capacities`: sequences that each replica was planned for."""
        self._capacities = capacities
        self._running = [0] * len(capacities)
        self._given: list[deque[Request]] = [deque() for _ in capacities]
        self._waiting = deque(requests)
        self._changed = Condition()
        self._stopped = False
        self.replica_of: dict[int, int] = {}
        """By request."""
        self._hand_out()

    def take(self, replica: int, *, wait: bool) -> list[Request] | None:
        """What is newly given to the replica; `wait` until there is something. None where nothing will come."""
        with self._changed:
            while wait and not self._given[replica] and self._waiting and not self._stopped:
                self._changed.wait()
            taken = list(self._given[replica])
            self._given[replica].clear()
            over = self._stopped or not (taken or self._waiting)
            return None if over and (wait or self._stopped) else taken

    def finished(self, replica: int) -> None:
        """One of its sequences."""
        with self._changed:
            self._running[replica] -= 1
            self._hand_out()
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _hand_out(self) -> None:
        """In order; a request of more samples than any replica has room for goes to one that has nothing to do."""
        while self._waiting:
            request = self._waiting[0]
            loads = [
                ((running + request.n) / capacity, number)
                for number, (running, capacity) in enumerate(
                    zip(self._running, self._capacities, strict=True)
                )
                if running + request.n <= capacity or running == 0
            ]
            if not loads:
                return
            _, replica = min(loads)
            self._running[replica] += request.n
            self._given[replica].append(self._waiting.popleft())
            self.replica_of[request.id] = replica
