"""The links that join a division's groups to each other and to the coordinator."""

from collections.abc import Iterable, Iterator

from apportion.cost.estimate import Steps, entry_timing, exit_timing, hop_timing
from apportion.cost.objective import Timing
from apportion.cost.traffic import coordinator_host, host_link
from apportion.planner.problem import Problem
from apportion.types.cluster import Link


class Joins:
    """Times on links by host and size of the receiving group; None where two hosts have no link. With any coordinator
    the least of those from and to all hosts."""

    def __init__(self, problem: Problem, steps: Steps) -> None:
        self.problem = problem
        self.steps = steps
        self.home = coordinator_host(problem.cluster)
        hosts = dict.fromkeys(device.host for device in problem.cluster.devices)
        self._homes = list(hosts) if problem.any_coordinator else [self.home]
        self._entries: dict[tuple[str, int], Timing | None] = {}
        self._hops: dict[tuple[str, str, int], Timing | None] = {}
        self._exits: dict[str, Timing | None] = {}

    def entry(self, host: str, size: int) -> Timing | None:
        key = (host, size)
        if key not in self._entries:
            links = self._to_coordinator(host)
            self._entries[key] = _least(entry_timing(link, size, self.steps) for link in links)
        return self._entries[key]

    def hop(self, src_host: str, host: str, size: int) -> Timing | None:
        key = (src_host, host, size)
        if key not in self._hops:
            link = host_link(self.problem.cluster, src_host, host)
            problem = self.problem
            self._hops[key] = (
                None
                if link is None
                else hop_timing(problem.model, link, size, self.steps, problem.activation_format)
            )
        return self._hops[key]

    def exit(self, host: str) -> Timing | None:
        if host not in self._exits:
            links = self._to_coordinator(host)
            self._exits[host] = _least(exit_timing(link, self.steps) for link in links)
        return self._exits[host]

    def _to_coordinator(self, host: str) -> Iterator[Link]:
        """Links join in both directions."""
        links = (host_link(self.problem.cluster, home, host) for home in self._homes)
        return (link for link in links if link is not None)


def _least(timings: Iterable[Timing]) -> Timing | None:
    """In prefill and in decode; None where there are none."""
    known = list(timings)
    if not known:
        return None
    return Timing(prefill_s=min(one.prefill_s for one in known), decode_s=min(one.decode_s for one in known))
