"""The links that join a division's groups to each other and to the coordinator."""

from apportion.cost.estimate import Steps, entry_timing, exit_timing, hop_timing
from apportion.cost.objective import Timing
from apportion.cost.traffic import coordinator_host, host_link
from apportion.planner.problem import Problem


class Joins:
    """Times on links by host and size of the receiving group; None where two hosts have no link."""

    def __init__(self, problem: Problem, steps: Steps) -> None:
        self.problem = problem
        self.steps = steps
        self.home = coordinator_host(problem.cluster)
        self._hops: dict[tuple[str, str, int], Timing | None] = {}

    def entry(self, host: str, size: int) -> Timing | None:
        link = host_link(self.problem.cluster, self.home, host)
        return None if link is None else entry_timing(link, size, self.steps)

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
        link = host_link(self.problem.cluster, host, self.home)
        return None if link is None else exit_timing(link, self.steps)
