"""What a worker process is started with, and its place in a plan, which it is told and may be told anew."""

from dataclasses import dataclass
from pathlib import Path

from apportion.types.cluster import Device
from apportion.types.plan import Plan, Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerBirth:
    """`run_dir` holds the sockets of the run, of which `name` is the worker's own: a number, as a device's id is free
    text and no name for a file."""

    device_id: str
    run_dir: Path
    name: str
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlace:
    """Which member of the plan a process is: who sends to it and to whom it sends follow from that.

    `folder` holds config.json and, unless they are random, the weights; `cores` are the worker's own, none where it
    shares them; `names` are those of all workers' sockets by device.
    """

    plan: Plan
    folder: str
    random_weights: bool
    trace: bool
    stage_index: int
    rank: int
    cores: tuple[int, ...]
    names: dict[str, str]

    @property
    def stage(self) -> Stage:
        return self.plan.stages[self.stage_index]

    @property
    def device(self) -> Device:
        return self.plan.cluster.device(self.stage.split.device_ids[self.rank])

    @property
    def receivers(self) -> list[str]:
        """Members of the next stage that this one sends to: member i is served by rank i mod size."""
        if self.stage_index + 1 == len(self.plan.stages):
            return []
        following = self.plan.stages[self.stage_index + 1].split.device_ids
        return [device_id for i, device_id in enumerate(following) if i % self.stage.split.size == self.rank]
