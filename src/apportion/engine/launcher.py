"""Starts one worker process per device of a plan on this machine.

forkserver with torch preloaded: the imports are paid once, a worker then starts in tenths of a second. This process
needs none of them.
"""

import os
from collections.abc import Mapping, Sequence
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path

from apportion.engine import processes
from apportion.engine.place import WorkerBirth, WorkerPlace
from apportion.model.lean.config import lean_config
from apportion.transport.links import COORDINATOR, Outbox
from apportion.transport.wire import Kind, pack
from apportion.types.errors import EngineError
from apportion.types.model import ModelSpec
from apportion.types.plan import Plan


def preload(folder: Path, model: ModelSpec) -> None:
    """Starts importing what workers of the model in `folder` need, beside whatever the caller does next."""
    processes.preload(worker_modules(folder, model))


def worker_modules(folder: Path, model: ModelSpec) -> list[str]:
    """transformers takes longer to import than everything else, so only where its layers are needed."""
    modules = ["apportion.engine.worker"]
    return modules if lean_config(folder, model) else [*modules, "apportion.model.hf.build"]


def launch(birth: WorkerBirth) -> BaseProcess:
    """The started process of one device's worker."""
    return processes.start(_run_worker, (birth,), f"the worker of device {birth.device_id}")


def places(
    plan: Plan,
    folder: Path,
    names: Mapping[str, str],
    *,
    random_weights: bool,
    trace: bool,
    cores: Sequence[int] | None = None,
) -> dict[str, WorkerPlace]:
    """Every worker's by device id; on these cores, or on all that this process may use."""
    own = own_cores(plan, all_cores() if cores is None else cores)
    return {
        device_id: WorkerPlace(
            plan=plan,
            folder=str(folder.absolute()),
            random_weights=random_weights,
            trace=trace,
            stage_index=stage_index,
            rank=rank,
            cores=tuple(sorted(own.get(device_id, ()))),
            names=dict(names),
        )
        for stage_index, stage in enumerate(plan.stages)
        for rank, device_id in enumerate(stage.split.device_ids)
    }


def _run_worker(birth: WorkerBirth) -> None:
    """Runs in the worker's process, where the import has been made already, or is found to fail."""
    try:
        from apportion.engine.worker import run_worker
    except BaseException as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        coordinator = Outbox(birth.run_dir, COORDINATOR)
        coordinator.generation = birth.generation
        coordinator.send(Kind.FAILED, pack((birth.device_id, EngineError.__name__, reason)))
        os._exit(1)
    run_worker(birth)


def all_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def cores_of_replicas(plans: Sequence[Plan], available: Sequence[int]) -> list[list[int]]:
    """For each plan as many cores as its CPU devices have threads; none where there are too few for all."""
    needed = [sum(_cpu_threads(plan).values()) for plan in plans]
    if sum(needed) > len(available):
        return [[] for _ in plans]
    free = iter(available)
    return [list(islice(free, number)) for number in needed]


def _cpu_threads(plan: Plan) -> dict[str, int]:
    devices = [plan.cluster.device(device_id) for device_id in plan.device_ids]
    return {device.id: device.num_threads for device in devices if device.kind == "cpu"}


def own_cores(plan: Plan, available: Sequence[int]) -> dict[str, frozenset[int]]:
    """For each CPU device as many cores as it has threads; {} where there are too few: the kernel shares them out."""
    threads = _cpu_threads(plan)
    if sum(threads.values()) > len(available):
        return {}
    free = iter(available)
    return {device_id: frozenset(islice(free, num)) for device_id, num in threads.items()}
