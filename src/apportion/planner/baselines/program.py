# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false, reportArgumentType=false
# scipy has no type stubs.
"""The integer program of prima.cpp, without its disks: layers per device for the least sum of layer times.

Source: prima.cpp's scheduler Halda (Li et al., "PRIMA.CPP: Speeding Up 70B-Scale LLM Inference on Low-Resource
Everyday Home Clusters", 2025): token latency as the sum of the devices' times, under memory. What links take is a
constant of each device there, and nothing here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp

from apportion.cost.estimate import stage_timing
from apportion.cost.memory import stages_memory
from apportion.planner.baselines.stages import even_stage, pipeline
from apportion.planner.problem import Problem
from apportion.types.cluster import Device
from apportion.types.errors import InfeasibleError
from apportion.types.plan import DeviceMemory, Stage

LAYERS, USED, FIRST, LAST, ALONE = range(VARIABLES := 5)
"""A device's variables: its layers, whether it takes part, whether it is the first to, whether the last, and both."""
Terms = dict[tuple[int, int], float]
"""Coefficients by (device, variable)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What each of a device's variables costs, in the order of the variables."""

    seconds: tuple[float, ...]
    bytes: tuple[float, ...]


def layer_times(problem: Problem) -> tuple[Stage, ...]:
    """Layers on each device, in the cluster's order, for the least time of a decoded token but for links.

    Source: prima.cpp, Halda.
    """
    devices, num_layers = problem.cluster.devices, problem.model.num_layers
    figures = [_figures(problem, device) for device in devices]
    found: OptimizeResult = milp(
        np.concatenate([figure.seconds for figure in figures]),
        integrality=np.ones(VARIABLES * len(devices)),
        bounds=Bounds(0, np.tile([num_layers, 1, 1, 1, 1], len(devices))),
        constraints=[
            _constraint(len(devices), *one)
            for one in (*_limits(problem, figures), *_order(len(devices), num_layers))
        ],
    )
    if found.x is None:
        raise InfeasibleError("no number of layers for each device fits")
    layers = [round(count) for count in found.x[LAYERS::VARIABLES]]
    return pipeline(problem, zip(devices, layers, strict=True))


def _figures(problem: Problem, device: Device) -> Figures:
    """Mean layer times, and the largest layer's memory: the program does not tell layers apart."""
    model, steps = problem.model, problem.steps(1)
    whole = even_stage(problem, (device,), 0, model.num_layers)
    bare = replace(whole, has_embedding=False, has_head=False)

    def decode_s(stage: Stage) -> float:
        return stage_timing(model, problem.cluster, stage, steps).decode_s

    def memory(stage: Stage) -> DeviceMemory:
        return stages_memory(model, problem.cluster, [stage], problem.capacity)[device.id]

    singles = [
        memory(replace(bare, layer_start=layer, layer_stop=layer + 1)) for layer in range(model.num_layers)
    ]
    layer_bytes = max(single.weights_bytes + single.kv_bytes for single in singles)
    fixed_bytes = max(single.total_bytes - single.weights_bytes - single.kv_bytes for single in singles)
    bare_s, bare_bytes = decode_s(bare), memory(bare).total_bytes
    first_bytes = memory(replace(bare, has_embedding=True)).total_bytes - bare_bytes
    last_bytes = memory(replace(bare, has_head=True)).total_bytes - bare_bytes
    # Tied tables are one where both ends are together.
    alone_bytes = memory(whole).total_bytes - bare_bytes - first_bytes - last_bytes
    return Figures(
        seconds=(
            (bare_s - device.step_overhead_s) / model.num_layers,
            device.step_overhead_s,
            0.0,
            decode_s(replace(bare, has_head=True)) - bare_s,
            0.0,
        ),
        bytes=(layer_bytes, fixed_bytes, first_bytes, last_bytes, alone_bytes),
    )


def _limits(problem: Problem, figures: list[Figures]) -> Iterator[tuple[Terms, float, float]]:
    """All layers, one first and one last device, and everyone's memory: (terms, least, most)."""
    for variable, total in ((LAYERS, problem.model.num_layers), (FIRST, 1), (LAST, 1)):
        yield {(index, variable): 1.0 for index in range(len(figures))}, total, total
    for index, (device, figure) in enumerate(zip(problem.cluster.devices, figures, strict=True)):
        yield {(index, variable): size for variable, size in enumerate(figure.bytes)}, 0, device.memory_bytes


def _order(num_devices: int, num_layers: int) -> Iterator[tuple[Terms, float, float]]:
    """Who has layers takes part; the first and the last do, and nobody before or after them."""
    for index in range(num_devices):
        yield {(index, LAYERS): 1.0, (index, USED): -num_layers}, -inf, 0
        for variable in (LAYERS, USED):
            for end in (FIRST, LAST):
                yield {(index, end): 1.0, (index, variable): -1.0}, -inf, 0
        yield {(index, USED): 1.0, (index, LAYERS): -1.0}, -inf, 0
        for end in (FIRST, LAST):
            yield {(index, ALONE): 1.0, (index, end): -1.0}, -inf, 0
        for before in range(index):
            yield {(before, USED): 1.0, (index, FIRST): 1.0}, -inf, 1
            yield {(before, LAST): 1.0, (index, USED): 1.0}, -inf, 1


def _constraint(num_devices: int, terms: Terms, least: float, most: float) -> LinearConstraint:
    row = np.zeros(VARIABLES * num_devices)
    for (index, variable), coefficient in terms.items():
        row[VARIABLES * index + variable] = coefficient
    scale = np.abs(row).max()  # bytes would otherwise dwarf the solver's tolerances
    return LinearConstraint(row / scale, least / scale, most / scale)
