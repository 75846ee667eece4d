"""Replicas of clusters with too many sets of devices to look at each: the best of some even divisions. Heuristic.

The devices of every kind are dealt out to 1, 2, 3, … replicas in turn, or every host, or every so many-th part of a
host, is a replica of its own; the sequences are shared out by the replicas' speed.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from apportion.planner.finder import Finder
from apportion.planner.found import Found
from apportion.planner.replicas.device_sets import DeviceSets
from apportion.planner.replicas.task import Task, of_replica
from apportion.planner.stages.groups import Used

MANY = 16
"""Up to so many replicas all numbers are tried, beyond the doubles."""

Pipelines = list[tuple[Used, Found]]


def best_guess(task: Task, sets: DeviceSets) -> Pipelines | None:
    """None where none of the divisions holds the model."""
    known: dict[object, Found | None] = {}
    best: Pipelines | None = None
    for parts in _divisions(task, sets):
        found = _found(task, sets, parts, known)
        if found is not None and (best is None or _tokens_per_s(found) > _tokens_per_s(best)):
            best = found
    return best


def _tokens_per_s(division: Pipelines) -> float:
    return sum(1 / found.value for _, found in division)


def _divisions(task: Task, sets: DeviceSets) -> Iterator[list[Used]]:
    most = min(task.most_sequences, len(task.cluster.devices))
    numbers = [task.num_replicas] if task.num_replicas else _numbers(most)
    for number in numbers:
        yield _dealt(sets.available, number)
    hosts = dict.fromkeys(kind[0].host for kind in sets.kinds)
    for number in _numbers(most // len(hosts)):
        parts = [part for host in hosts for part in _dealt(_of_host(sets, host), number)]
        if task.num_replicas in (None, len(parts)):
            yield parts


def _numbers(most: int) -> list[int]:
    doubles = [MANY << shift for shift in range(1, most.bit_length())]
    return [*range(1, min(most, MANY) + 1), *(number for number in doubles if number <= most)]


def _of_host(sets: DeviceSets, host: str) -> Used:
    pairs = zip(sets.kinds, sets.available, strict=True)
    return tuple(count if kind[0].host == host else 0 for kind, count in pairs)


def _dealt(available: Sequence[int], number: int) -> list[Used]:
    """In turn, kind after kind, so that the parts differ by one device of a kind at most."""
    parts = np.zeros((number, len(available)), dtype=np.int64)
    turn = 0
    for kind, count in enumerate(available):
        for _ in range(count):
            parts[turn % number, kind] += 1
            turn += 1
    return [tuple(part) for part in parts.tolist() if any(part)]


def _found(
    task: Task, sets: DeviceSets, parts: Sequence[Used], known: dict[object, Found | None]
) -> Pipelines | None:
    """None where one of them does not hold the model."""
    division: Pipelines = []
    for counts, sequences in zip(parts, _shares(task, sets, parts), strict=True):
        key = (sets.signature(counts), sequences)
        if key not in known:
            cluster = sets.cluster_of(counts)
            finder = Finder(
                task.model, cluster, task.weight_formats, of_replica(task.constraints), streaming=False
            )
            known[key] = finder.best(task.share(sequences))
        found = known[key]
        if found is None:
            return None
        division.append((counts, found))
    return division


def _shares(task: Task, sets: DeviceSets, parts: Sequence[Used]) -> list[int]:
    """By the devices' memory bandwidth, which decoding goes by; every part has one at least."""
    bandwidth = np.array([kind[0].mem_bytes_per_s for kind in sets.kinds])
    speed = np.array(parts) @ bandwidth
    left = task.most_sequences - len(parts)
    given = np.floor(left * speed / speed.sum()).astype(int)
    behind = np.argsort(given - left * speed / speed.sum(), kind="stable")
    given[behind[: left - int(given.sum())]] += 1
    return (given + 1).tolist()
