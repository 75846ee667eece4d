"""Starts one worker process per device of a plan on this machine.

forkserver with torch preloaded: the imports are paid once, a worker then starts in hundredths of a second.
"""

import multiprocessing
import os
from collections.abc import Sequence
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path

from apportion.runtime.worker import WorkerPlace, run_worker
from apportion.types.plan import Plan


def launch(
    plan: Plan, folder: Path, run_dir: Path, *, random_weights: bool, trace: bool
) -> dict[str, BaseProcess]:
    """The started processes by device id."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["apportion.runtime.worker"])
    cores = own_cores(plan, sorted(os.sched_getaffinity(0)))
    processes: dict[str, BaseProcess] = {}
    for stage_index, stage in enumerate(plan.stages):
        for rank, device_id in enumerate(stage.split.device_ids):
            place = WorkerPlace(
                plan=plan,
                folder=folder,
                random_weights=random_weights,
                trace=trace,
                run_dir=run_dir,
                stage_index=stage_index,
                rank=rank,
                cores=cores.get(device_id, frozenset()),
            )
            process = context.Process(
                target=run_worker, args=(place,), name=f"apportion {device_id}", daemon=True
            )
            process.start()
            processes[device_id] = process
    return processes


def own_cores(plan: Plan, available: Sequence[int]) -> dict[str, frozenset[int]]:
    """For each CPU device as many cores as it has threads; {} where there are too few: the kernel shares them out."""
    devices = [plan.cluster.device(device_id) for device_id in plan.device_ids]
    threads = {device.id: device.num_threads for device in devices if device.kind == "cpu"}
    if sum(threads.values()) > len(available):
        return {}
    free = iter(available)
    return {device_id: frozenset(islice(free, num)) for device_id, num in threads.items()}
