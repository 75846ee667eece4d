"""What the usual rules build their divisions from: whole-layer stages, and the planner's own check of memory."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from apportion.cost.memory import stages_memory
from apportion.planner.problem import Problem
from apportion.types.cluster import Device
from apportion.types.errors import InfeasibleError
from apportion.types.plan import Stage, TensorSplit


def even_share(total: int, size: int) -> tuple[int, ...]:
    """`total` over `size`, the remainder one each to those just before the last.

    Source: vLLM, `get_pp_indices` in vllm/distributed/utils.py, which spares the last for its head.
    """
    if total < size:
        raise InfeasibleError(f"{total} layers cannot be spread over {size} stages")
    shares = [total // size] * size
    for number in range(total % size):
        shares[-2 - number] += 1
    return tuple(shares)


def largest_remainder(total: int, weights: Sequence[float], caps: Sequence[int]) -> tuple[int, ...]:
    """Integers in the ratio of the weights that sum to `total`: rounded down, then those with the largest remainders
    one more, none beyond its cap. The caps allow `total`."""
    exact = _under_caps(total, weights, caps)
    shares = [int(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: shares[index] - exact[index])
    while (left := total - sum(shares)) > 0:
        for index in [index for index in by_remainder if shares[index] < caps[index]][:left]:
            shares[index] += 1
    return tuple(shares)


def _under_caps(total: int, weights: Sequence[float], caps: Sequence[int]) -> list[float]:
    """The ratio of the weights among those below their cap; the others are at it."""
    full: set[int] = set()
    while True:
        left = total - sum(caps[index] for index in full)
        rest = sum(weight for index, weight in enumerate(weights) if index not in full) or 1.0
        exact = [
            float(caps[index]) if index in full else left * weight / rest
            for index, weight in enumerate(weights)
        ]
        beyond = {index for index, part in enumerate(exact) if part > caps[index]} - full
        if not beyond:
            return exact
        full |= beyond


def at_least_one(shares: Sequence[int]) -> tuple[int, ...]:
    """Takes from the largest for those with none."""
    kept = list(shares)
    for index, share in enumerate(kept):
        if share == 0:
            kept[kept.index(max(kept))] -= 1
            kept[index] = 1
    return tuple(kept)


def pipeline(problem: Problem, layers: Iterable[tuple[Device, int]]) -> tuple[Stage, ...]:
    """One device a stage, in order; devices with no layers are left out."""
    return joined(problem, [((device,), count) for device, count in layers if count])


def joined(problem: Problem, groups: Sequence[tuple[Sequence[Device], int]]) -> tuple[Stage, ...]:
    """Groups with equal shares, in order, each with its number of layers."""
    stops = [0]
    for _, count in groups:
        stops.append(stops[-1] + count)
    return tuple(
        even_stage(problem, devices, start, stop)
        for (devices, _), (start, stop) in zip(groups, pairwise(stops), strict=True)
    )


def even_stage(problem: Problem, devices: Sequence[Device], start: int, stop: int) -> Stage:
    model, size = problem.model, len(devices)
    # Rounded as the planner rounds them.
    row_stops = [(2 * rank * model.vocab_rows + size) // (2 * size) for rank in range(size + 1)]
    return Stage(
        layer_start=start,
        layer_stop=stop,
        split=TensorSplit(
            device_ids=tuple(device.id for device in devices),
            q_heads=(model.q_heads // size,) * size,
            kv_heads=(model.kv_heads // size,) * size,
            ffn_columns=(model.ffn_columns // size,) * size,
            vocab_rows=tuple(after - before for before, after in pairwise(row_stops)),
        ),
        weight_format=problem.formats.weights,
        activation_format=problem.activation_format,
        kv_format=problem.kv_format,
        has_embedding=start == 0,
        has_head=stop == model.num_layers,
    )


def needed_bytes(problem: Problem, device: Device, start: int, stop: int) -> int:
    """What layers `[start, stop)` take on the device, all that it keeps in reserve included."""
    stage = even_stage(problem, (device,), start, stop)
    return stages_memory(problem.model, problem.cluster, [stage], problem.capacity)[device.id].total_bytes


def most_layers(problem: Problem, device: Device, start: int) -> int:
    """How many layers from `start` on fit on the device; with the last one comes the head."""
    stop = start
    while stop < problem.model.num_layers:
        if needed_bytes(problem, device, start, stop + 1) > device.memory_bytes:
            break
        stop += 1
    return stop - start


def most_last_layers(problem: Problem, device: Device) -> int:
    """How many of the last layers fit on the device, with the head."""
    num_layers = problem.model.num_layers
    count = 0
    while count < num_layers:
        if needed_bytes(problem, device, num_layers - count - 1, num_layers) > device.memory_bytes:
            break
        count += 1
    return count
