"""A plan as llama.cpp's arguments, and the RPC servers that stand for other hosts' devices.

Looked at: tools/rpc/README.md at 038514c; as copies of 2026 up to b11160, common/arg.cpp (names), src/llama-model.cpp
(`load_tensors`: the last `n-gpu-layers` of num_layers + 1 "layers", of which the output is the last, go to devices by
the running sums of `tensor-split`; the embedding stays on the main host's CPU; split mode "tensor" cuts every tensor at
those sums, rounded down) and src/llama.cpp (RPC devices come before local ones unless `--device` orders them).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from apportion.cost.traffic import coordinator_host
from apportion.export.accelerators import LLAMA_CPP_NAMES, VISIBLE, ordinal, visible
from apportion.export.differences import differences
from apportion.export.launch import MODEL, EngineDivision, Export, Launch
from apportion.export.price import division_tokens_per_s
from apportion.export.regroup import all_members, cut_down, one_stage, regroup
from apportion.export.weights import is_gguf, one_weight_format, weight_notes
from apportion.types.cluster import Device
from apportion.types.plan import Plan, Stage

RPC_PORT = 50052
CACHE_TYPES = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"} | {
    name: name for name in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a single-device stage's layers go: the main host's CPU, or a device of llama.cpp's list by name."""

    stage: Stage
    device: Device
    name: str | None


def to_llama_cpp(plan: Plan) -> Export:
    main = coordinator_host(plan.cluster)
    members = [plan.cluster.device(device_id) for device_id in plan.device_ids]
    local_gpus = all(device.host == main and device.kind != "cpu" for device in members)
    alike = len({device.kind for device in members}) == 1
    if len(plan.stages) == 1 and len(members) > 1 and local_gpus and alike:
        return _tensor_split(plan, members, main)
    return _layer_split(plan, main)


def _tensor_split(plan: Plan, members: Sequence[Device], main: str) -> Export:
    """One group of the main host's GPUs: the better of the two ratios that the plan uses."""
    split = plan.stages[0].split
    divisions = {
        ratio: EngineDivision(
            stages=one_stage(plan, [Fraction(share) for share in ratio], cut_down),
            microbatches=1,
            pipelined_prefill=False,
        )
        for ratio in (split.kv_heads, split.ffn_columns)
    }
    ratio = max(divisions, key=lambda ratio: division_tokens_per_s(plan, divisions[ratio]))
    placement = ("--split-mode", "tensor", "--tensor-split", _joined(ratio))
    offload = ("--n-gpu-layers", str(plan.model.num_layers + 1), *placement)
    division = divisions[ratio]
    return Export(
        launches=(_server(plan, main, members, offload),),
        device_map=None,
        division=division,
        notes=(
            *differences(plan, division.stages, "llama.cpp"),
            "llama.cpp cuts heads, FFN and vocabulary at one ratio, rounded to whole quantisation blocks",
            *_common_notes(plan, main),
        ),
    )


def _layer_split(plan: Plan, main: str) -> Export:
    stages = regroup(plan, all_members(plan), 1)
    placements = _placements(plan, stages, main)
    servers = [place for place in placements if place.name is not None and place.name.startswith("RPC")]
    local = [place.device for place in placements if place.name is not None and place not in servers]
    cpus = [place for place in placements if place.name is None]
    pipelined = not servers and not cpus and len(local) > 1
    division = EngineDivision(stages=stages, microbatches=1, pipelined_prefill=pipelined)
    return Export(
        launches=(
            *(_rpc_server(place.device, _port(servers, place)) for place in servers),
            _server(plan, main, local, (*_rpc(servers), *_offload(plan, placements))),
        ),
        device_map=None,
        division=division if len(cpus) <= 1 else None,
        notes=(
            *([] if len(cpus) == len(stages) > 1 else differences(plan, stages, "llama.cpp")),
            *_layer_notes(placements, servers, cpus),
            *_common_notes(plan, main),
        ),
    )


def _placements(plan: Plan, stages: Sequence[Stage], main: str) -> list[Placement]:
    placements: list[Placement] = []
    num: Counter[str] = Counter()
    for stage in stages:
        device = plan.cluster.device(stage.split.device_ids[0])
        name = None
        if device.host != main or device.kind != "cpu":
            kind = "RPC" if device.host != main else LLAMA_CPP_NAMES[device.kind]
            name = f"{kind}{num[kind]}"
            num[kind] += 1
        placements.append(Placement(stage=stage, device=device, name=name))
    return placements


def _offload(plan: Plan, placements: Sequence[Placement]) -> tuple[str, ...]:
    """`--n-gpu-layers`, and with several devices `--tensor-split`: whole layers, so the counts are met exactly."""
    names = [place.name for place in placements if place.name is not None]
    first = next((i for i, place in enumerate(placements) if place.name is not None), len(placements))
    kept = sum(place.stage.num_layers for place in placements[:first])
    if not names:
        return ("--n-gpu-layers", "0")
    counts: dict[str, int] = {}
    for place in placements[first:]:
        # Layers of a later CPU stage are counted on the device before it, and overridden below.
        name = place.name or list(counts)[-1]
        counts[name] = counts.get(name, 0) + place.stage.num_layers + place.stage.has_head
    words = ["--n-gpu-layers", str(plan.model.num_layers + 1 - kept), "--split-mode", "layer"]
    makes = {name.rstrip("0123456789") for name in names} - {"RPC"}
    if len(makes) > 1 or names != sorted(names, key=lambda name: not name.startswith("RPC")):
        words += ["--device", ",".join(names)]
    words += ["--tensor-split", _joined(list(counts.values()))]
    overrides = [_override(place.stage) for place in placements[first:] if place.name is None]
    if overrides:
        words += ["--override-tensor", ",".join(overrides)]
    return tuple(words)


def _override(stage: Stage) -> str:
    layers = "|".join(str(layer) for layer in range(stage.layer_start, stage.layer_stop))
    output = ",^output=CPU" if stage.has_head else ""
    return rf"blk\.({layers})\.=CPU{output}"


def _server(plan: Plan, main: str, gpus: Sequence[Device], offload: Sequence[str]) -> Launch:
    workload, cache = plan.workload, CACHE_TYPES[plan.kv_format]
    options = {
        "--ctx-size": workload.concurrency * workload.max_context_tokens
        if workload.kv_tokens is None
        else plan.num_kv_blocks * plan.block_tokens,
        "--parallel": workload.concurrency,
        "--ubatch-size": plan.step_tokens,
        "--cache-type-k": cache,
        "--cache-type-v": cache,
    }
    words = [str(word) for pair in options.items() for word in pair]
    words += ["--kv-unified"] if workload.kv_tokens is not None else []
    return Launch(
        host=main,
        variables=visible(gpus),
        command=("llama-server", "--model", MODEL, *offload, *words),
    )


def _rpc(servers: Sequence[Placement]) -> tuple[str, ...]:
    if not servers:
        return ()
    return ("--rpc", ",".join(f"{place.device.host}:{_port(servers, place)}" for place in servers))


def _rpc_server(device: Device, port: int) -> Launch:
    listen = ("-H", device.host, "-p", str(port))
    if device.kind == "cpu":
        command = ("ggml-rpc-server", "--device", "CPU", "-t", str(device.num_threads), *listen)
        return Launch(host=device.host, command=command)
    # A variable that shows one device makes it number 0; without one its own number tells it apart.
    number = 0 if device.kind in VISIBLE else ordinal(device)
    command = ("ggml-rpc-server", "--device", f"{LLAMA_CPP_NAMES[device.kind]}{number}", *listen)
    return Launch(host=device.host, variables=visible([device]), command=command)


def _port(servers: Sequence[Placement], place: Placement) -> int:
    return RPC_PORT + list(servers).index(place)


def _layer_notes(
    placements: Sequence[Placement], servers: Sequence[Placement], cpus: Sequence[Placement]
) -> list[str]:
    notes: list[str] = []
    if len(cpus) > 1:
        names = ", ".join(place.device.id for place in cpus)
        notes.append(
            f"llama.cpp has one CPU on the main host: {names} become one, whose speed the plan does not say"
        )
    for before, place in pairwise(placements):
        if place.name is None and before.name is not None:
            notes.append(f"the KV of {place.device.id}'s layers stays on {before.device.id}")
    if len(placements) > 1:
        notes.append("llama.cpp decodes one batch at a time: stages wait for each other")
    if servers:
        notes.append(
            "ggml-rpc-server (rpc-server in older builds) has no authentication: run it on a network of your own only"
        )
    return notes


def _common_notes(plan: Plan, main: str) -> list[str]:
    notes = weight_notes(plan, "llama.cpp")
    if not is_gguf(plan):
        counted = f"llama.cpp's weights are as in the GGUF file; the plan counts {one_weight_format(plan)}"
        notes = [counted, *notes]
    first = plan.cluster.device(plan.stages[0].split.device_ids[0])
    if first.kind != "cpu" or first.host != main:
        notes.append(f"the embedding table stays in the memory of {main}'s CPU, not on {first.id}")
    return notes


def _joined(shares: Sequence[int]) -> str:
    return ",".join(str(share) for share in shares)
