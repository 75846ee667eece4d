"""The usual rules for dividing a model, each from a problem to stages. None looks at links.

Devices and hosts keep the cluster's order, as the engines keep the order in which they were given them. A rule that
has no division to offer raises InfeasibleError.
"""

from collections.abc import Callable
from dataclasses import replace

from apportion.cost.memory import parameters
from apportion.planner.baselines.stages import (
    at_least_one,
    even_share,
    even_stage,
    joined,
    largest_remainder,
    most_last_layers,
    most_layers,
    pipeline,
)
from apportion.planner.problem import Problem
from apportion.types.cluster import Device
from apportion.types.errors import InfeasibleError
from apportion.types.plan import Stage

Rule = Callable[[Problem], tuple[Stage, ...]]
BALANCED_SLACK_LAYERS = 1.25
"""What accelerate adds to an even share of the weights, in layers."""


def even_layers(problem: Problem) -> tuple[Stage, ...]:
    """As many layers on every device.

    Source: vLLM, pipeline parallelism (`get_pp_indices`, vllm/distributed/utils.py).
    """
    devices = problem.cluster.devices
    return pipeline(problem, zip(devices, even_share(problem.model.num_layers, len(devices)), strict=True))


def memory_proportional(problem: Problem) -> tuple[Stage, ...]:
    """Layers in the ratio of the devices' memory, at least one each.

    Source: exo, `allocate_layers_proportionally` (src/exo/master/placement_utils.py); llama.cpp's default
    `--tensor-split` ("by free memory", src/llama-model.cpp) differs in rounding alone.
    """
    devices, num_layers = problem.cluster.devices, problem.model.num_layers
    if num_layers < len(devices):
        raise InfeasibleError(f"{num_layers} layers are fewer than {len(devices)} devices")
    weights = [float(device.usable_bytes) for device in devices]
    shares = largest_remainder(num_layers, weights, [num_layers] * len(devices))
    return pipeline(problem, zip(devices, at_least_one(shares), strict=True))


def compute_proportional(problem: Problem) -> tuple[Stage, ...]:
    """Layers in the ratio of FLOP/s, no device beyond its memory: what it cannot hold goes to the others.

    Source: Parallax, `adjust_pipeline_layers` (water-filling, src/scheduling/layer_allocation.py); cake,
    `compute_layer_assignments` (TFLOPS capped by VRAM, cake-core/src/cake/setup.rs).
    """
    num_layers = problem.model.num_layers
    devices = [device for device in problem.cluster.devices if most_layers(problem, device, num_layers // 2)]
    if not devices:
        raise InfeasibleError("no device holds a single layer")
    caps = [most_layers(problem, device, 1) for device in devices]
    # The ends are reserved as Parallax does: the embedding on the first device, the head on the last.
    caps[-1] = most_last_layers(problem, devices[-1])
    caps[0] = min(most_layers(problem, devices[0], 0), caps[0] if len(devices) > 1 else num_layers)
    if sum(caps) < num_layers:
        raise InfeasibleError(f"the devices hold {sum(caps)} of {num_layers} layers")
    rates = [device.rate(problem.formats.weights) or 0.0 for device in devices]
    return pipeline(problem, zip(devices, largest_remainder(num_layers, rates, caps), strict=True))


def greedy_fill(problem: Problem) -> tuple[Stage, ...]:
    """Each device filled before the next is touched.

    Source: accelerate, `infer_auto_device_map` with `device_map="sequential"`.
    """
    return _fill(problem, lambda _: problem.model.num_layers)


def balanced_fill(problem: Problem) -> tuple[Stage, ...]:
    """As `greedy_fill`, each device but the last only up to an even share of the weights and 1.25 layers.

    Source: accelerate, `get_balanced_memory`, which `device_map="auto"` uses.
    """
    model, devices = problem.model, problem.cluster.devices
    whole = parameters(model, _stage(problem, 0, model.num_layers), 0)
    # The largest layer without what comes with it at the ends.
    layers = [
        replace(_stage(problem, layer, layer + 1), has_embedding=False, has_head=False)
        for layer in range(model.num_layers)
    ]
    share = whole / len(devices) + BALANCED_SLACK_LAYERS * max(
        parameters(model, layer, 0) for layer in layers
    )

    def within_share(start: int) -> int:
        stops = range(start + 1, model.num_layers + 1)
        return sum(parameters(model, _stage(problem, start, stop), 0) <= share for stop in stops)

    return _fill(problem, within_share)


def _stage(problem: Problem, start: int, stop: int) -> Stage:
    """Of any one device."""
    return even_stage(problem, problem.cluster.devices[:1], start, stop)


def _fill(problem: Problem, cap: Callable[[int], int]) -> tuple[Stage, ...]:
    """Device by device what fits, up to `cap(first layer)`; the last device has no cap."""
    devices, num_layers = problem.cluster.devices, problem.model.num_layers
    counts: list[int] = []
    for device in devices:
        start = sum(counts)
        fitting = most_layers(problem, device, start)
        counts.append(fitting if device is devices[-1] or start == num_layers else min(fitting, cap(start)))
    if sum(counts) < num_layers:
        raise InfeasibleError(f"the devices are full after {sum(counts)} of {num_layers} layers")
    return pipeline(problem, zip(devices, counts, strict=True))


def even_tensor(problem: Problem) -> tuple[Stage, ...]:
    """Equal shares of every layer on all devices of a host; hosts follow each other with as many layers each.

    Source: vLLM, tensor parallelism, which needs heads that divide; with several nodes its documentation joins
    tensor parallelism inside a node by pipeline parallelism across nodes.
    """
    hosts: dict[str, list[Device]] = {}
    for device in problem.cluster.devices:
        hosts.setdefault(device.host, []).append(device)
    for host, devices in hosts.items():
        _check_group(problem, host, devices)
    layers = even_share(problem.model.num_layers, len(hosts))
    return joined(problem, list(zip(hosts.values(), layers, strict=True)))


def _check_group(problem: Problem, host: str, devices: list[Device]) -> None:
    model, size = problem.model, len(devices)
    if model.kv_heads % size or model.ffn_columns % size:
        raise InfeasibleError(
            f"{model.kv_heads} KV heads and {model.ffn_columns} FFN columns do not divide by {host}'s {size} devices"
        )
    cpus = [device for device in devices if device.kind == "cpu"]
    num_threads = sum(device.num_threads for device in cpus)
    cores = cpus[0].host_cores if len(cpus) > 1 else None
    if cores is not None and num_threads > cores:
        raise InfeasibleError(f"{host} has {cores} cores for a group of {num_threads} threads")
