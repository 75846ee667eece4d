"""Where in a plan a worker process stands: who sends to it and to whom it sends follow from that."""

from dataclasses import dataclass
from pathlib import Path

from apportion.types.cluster import Device
from apportion.types.plan import Plan


def socket_name(plan: Plan, device_id: str) -> str:
    """A number: an id is free text, and no name for a file."""
    return str(plan.device_ids.index(device_id))


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlace:
    """Which member of the plan a process is. `folder` holds config.json and, unless they are random, the weights;
    `run_dir` the sockets of this run; `cores` are the worker's own, none where it shares them."""

    plan: Plan
    folder: Path
    random_weights: bool
    trace: bool
    run_dir: Path
    stage_index: int
    rank: int
    cores: frozenset[int]

    @property
    def device(self) -> Device:
        device_id = self.plan.stages[self.stage_index].split.device_ids[self.rank]
        return self.plan.cluster.device(device_id)

    @property
    def receivers(self) -> list[str]:
        """Members of the next stage that this one sends to: member i is served by rank i mod size."""
        if self.stage_index + 1 == len(self.plan.stages):
            return []
        size = self.plan.stages[self.stage_index].split.size
        following = self.plan.stages[self.stage_index + 1].split.device_ids
        return [device_id for i, device_id in enumerate(following) if i % size == self.rank]
