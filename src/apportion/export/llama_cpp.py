"""A plan as llama.cpp's arguments, and the RPC servers that stand for other hosts' devices.

Looked at: tools/rpc/README.md at 038514c and tools/server/README.md at 00dc805 (names and defaults); as copies of 2026
up to b11160 and in llama-cpp-python 0.3.36, common/arg.cpp (names), src/llama-model.cpp (`load_tensors`: the last
`n-gpu-layers` of num_layers + 1 "layers", of which the output is the last, go to devices by the running sums of
`tensor-split`, their KV with them; the embedding stays on the main host's CPU; split mode "tensor" cuts every tensor at
those sums, rounded down) and src/llama.cpp (RPC devices come before local ones unless `--device` orders them).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from apportion.cost.traffic import coordinator_host
from apportion.export.accelerators import LLAMA_CPP_NAMES, VISIBLE, numbers_note, ordinal, visible
from apportion.export.experts import ExpertSplit
from apportion.export.kv_formats import kv_name
from apportion.export.launch import MODEL, EngineDivision, Export, Launch
from apportion.export.weights import is_gguf, one_weight_format, weight_notes
from apportion.types.cluster import Device
from apportion.types.plan import Plan, Stage

RPC_PORT = 50052
ONLY_ROUTED = frozenset({"mixtral", "qwen3_moe", "gpt_oss", "olmoe", "phimoe", "granitemoe", "minimax_m2"})
"""Families without experts that every token is routed to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a stage's layers go: the main host's CPU, or a device of llama.cpp's list by name."""

    stage: Stage
    device: Device
    name: str | None


def to_llama_cpp(plan: Plan) -> Export:
    if plan.stages[0].split.size > 1:
        return group_export(plan, plan.stages[0].split.ffn_columns)
    return _layer_split(plan)


def group_export(plan: Plan, ratio: Sequence[int]) -> Export:
    """One group of the main host's GPUs, of which all is cut at this ratio."""
    members = [plan.cluster.device(name) for name in plan.device_ids]
    main = coordinator_host(plan.cluster)
    placement = ("--split-mode", "tensor", "--tensor-split", joined(ratio))
    offload = ("--n-gpu-layers", str(plan.model.num_layers + 1), *placement)
    return Export(
        launches=(server(plan, main, members, offload),),
        device_map=None,
        division=EngineDivision(stages=plan.stages, microbatches=1, pipelined_prefill=False),
        notes=(
            "llama.cpp cuts heads, FFN and vocabulary at one ratio, rounded to whole quantisation blocks",
            *common_notes(plan, main),
        ),
    )


def _layer_split(plan: Plan) -> Export:
    main = coordinator_host(plan.cluster)
    placements = _placements(plan, main)
    servers = [place for place in placements if place.name is not None and place.name.startswith("RPC")]
    local = [place.device for place in placements if place.name is not None and place not in servers]
    on_cpu = placements[0].name is None
    return Export(
        launches=(
            *(_rpc_server(place.device, _port(servers, place)) for place in servers),
            server(plan, main, local, (*_rpc(servers), *_offload(plan, placements))),
        ),
        device_map=None,
        division=EngineDivision(
            stages=plan.stages,
            microbatches=1,
            pipelined_prefill=not servers and not on_cpu and len(local) > 1,
        ),
        notes=(
            *_layer_notes(placements, servers),
            *common_notes(plan, main),
        ),
    )


def _placements(plan: Plan, main: str) -> list[Placement]:
    placements: list[Placement] = []
    num: Counter[str] = Counter()
    for stage in plan.stages:
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
    offloaded = [place for place in placements if place.name is not None]
    names = [place.name or "" for place in offloaded]
    if not names:
        return ("--n-gpu-layers", "0")
    kept = sum(place.stage.num_layers for place in placements if place.name is None)
    counts = [place.stage.num_layers + place.stage.has_head for place in offloaded]
    words = ["--n-gpu-layers", str(plan.model.num_layers + 1 - kept), "--split-mode", "layer"]
    makes = {name.rstrip("0123456789") for name in names} - {"RPC"}
    if len(makes) > 1 or names != sorted(names, key=lambda name: not name.startswith("RPC")):
        words += ["--device", ",".join(names)]
    return (*words, "--tensor-split", joined(counts))


def expert_export(plan: Plan, split: ExpertSplit) -> Export:
    """All layers on the main host's GPUs but for the experts of the first."""
    main = coordinator_host(plan.cluster)
    gpus = [gpu for gpu, _, _ in split.runs]
    counts = [stop - start + (stop == plan.model.num_layers) for _, start, stop in split.runs]
    words = ["--n-gpu-layers", str(plan.model.num_layers + 1)]
    words += ["--split-mode", "layer", "--tensor-split", joined(counts)] if len(counts) > 1 else []
    words += shared_experts_override(plan, split.num_on_cpu)
    words += ["--n-cpu-moe", str(split.num_on_cpu)]
    return Export(
        launches=(server(plan, main, gpus, words),),
        device_map=None,
        division=None,
        notes=(
            *numbers_note(gpus),
            *weight_notes(plan, "llama.cpp"),
            f"the embedding table stays in the memory of {main}'s CPU",
        ),
    )


def shared_experts_override(plan: Plan, num_layers: int) -> list[str]:
    """`--n-cpu-moe` leaves shared experts on the GPU; the plan counts them with the others."""
    if plan.model.family in ONLY_ROUTED:
        return []
    layers = "|".join(str(layer) for layer in range(num_layers))
    return ["--override-tensor", rf"blk\.({layers})\.ffn_(up|gate|down)_shexp=CPU"]


def server(plan: Plan, main: str, gpus: Sequence[Device], offload: Sequence[str]) -> Launch:
    return Launch(
        host=main,
        variables=visible(gpus),
        command=("llama-server", "--model", MODEL, *offload, *_sizes(plan)),
    )


def _sizes(plan: Plan) -> list[str]:
    workload, cache = plan.workload, kv_name(plan, "llama.cpp")
    assert plan.constraints.engine is not None
    options = {
        "--ctx-size": context_tokens(plan),
        "--parallel": workload.concurrency,
        "--ubatch-size": plan.constraints.engine.step_tokens,
        "--cache-type-k": cache,
        "--cache-type-v": cache,
    }
    words = [str(word) for pair in options.items() for word in pair]
    # A quantised cache of values needs flash attention.
    words += ["--flash-attn", "on"] if cache != "f16" else []
    return words + (["--kv-unified"] if workload.kv_tokens is not None else [])


def context_tokens(plan: Plan) -> int:
    """Of all slots together."""
    if plan.workload.kv_tokens is None:
        return plan.workload.concurrency * plan.workload.max_context_tokens
    return plan.num_kv_blocks * plan.block_tokens


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


def _layer_notes(placements: Sequence[Placement], servers: Sequence[Placement]) -> list[str]:
    notes: list[str] = []
    if placements[0].name is None and len(placements) > 1:
        first = placements[0]
        notes.append(
            f"the first {first.stage.num_layers} layers, with their KV, stay in the memory of {first.device.id}"
        )
    if len(placements) > 1:
        notes.append("llama.cpp decodes one batch at a time: stages wait for each other")
    if servers:
        notes.append(
            "ggml-rpc-server (rpc-server in older builds) has no authentication: run it on a network of your own only"
        )
    return notes


def common_notes(plan: Plan, main: str) -> list[str]:
    notes = [
        *numbers_note([plan.cluster.device(name) for name in plan.device_ids]),
        *weight_notes(plan, "llama.cpp"),
    ]
    if not is_gguf(plan):
        counted = f"llama.cpp's weights are as in the GGUF file; the plan counts {one_weight_format(plan)}"
        notes = [counted, *notes]
    first = plan.cluster.device(plan.stages[0].split.device_ids[0])
    if first.kind != "cpu" or first.host != main:
        notes.append(f"the embedding table stays in the memory of {main}'s CPU, not on {first.id}")
    return notes


def joined(shares: Sequence[int]) -> str:
    return ",".join(str(share) for share in shares)
