"""A plan as the `device_map` that accelerate and transformers' `from_pretrained` take.

Looked at: accelerate 1.15.0, accelerate/big_modeling.py (`dispatch_model`: a module name means everything below it;
a forward pass runs through the devices one after the other) and transformers 5.23, whose models of every family in
catalog/families.py have the five names used here.
"""

from apportion.export.accelerators import VISIBLE, ordinal
from apportion.export.differences import differences
from apportion.export.launch import EngineDivision, Export
from apportion.export.regroup import all_members, regroup
from apportion.export.weights import weight_notes
from apportion.types.cluster import Device
from apportion.types.errors import PlanError
from apportion.types.plan import Plan, Stage


def to_accelerate(plan: Plan) -> Export:
    """Raises PlanError where devices are on several hosts."""
    hosts = dict.fromkeys(plan.cluster.device(device_id).host for device_id in plan.device_ids)
    if len(hosts) > 1:
        raise PlanError(f"accelerate runs on one host, and this plan uses {', '.join(hosts)}; use --to vllm")
    stages = regroup(plan, all_members(plan), 1)
    cpus = [d.id for d in plan.cluster.devices if d.kind == "cpu" and d.id in plan.device_ids]
    notes = [
        *([] if len(cpus) == len(stages) > 1 else differences(plan, stages, "accelerate")),
        *weight_notes(plan, "accelerate"),
        "accelerate works on one batch at a time: stages wait for each other, KV is not paged, and no device's "
        "memory is limited to its budget",
    ]
    if plan.model.tied_embeddings and len(stages) > 1:
        notes.append(
            f"accelerate holds tied tables once: the head runs on {stages[0].split.device_ids[0]}, beside the "
            "embedding, which the prediction leaves out"
        )
    if len(cpus) > 1:
        notes.append(
            f"accelerate knows one 'cpu': {', '.join(cpus)} become one, whose speed the plan does not say"
        )
    division = EngineDivision(stages=stages, microbatches=1, pipelined_prefill=False)
    return Export(
        launches=(),
        device_map=device_map(plan, stages),
        division=division if len(cpus) <= 1 else None,
        notes=tuple(notes),
    )


def device_map(plan: Plan, stages: tuple[Stage, ...]) -> dict[str, int | str]:
    """Module name to a GPU's ordinal or another torch device; every parameter is below exactly one name."""
    names = [_name(plan.cluster.device(stage.split.device_ids[0])) for stage in stages]
    layers = {
        f"model.layers.{layer}": "cpu" if layer in stage.streamed_layers else name
        for stage, name in zip(stages, names, strict=True)
        for layer in range(stage.layer_start, stage.layer_stop)
    }
    # The rotary tables are made once, before the first layer, from the embedded tokens.
    first = {"model.embed_tokens": names[0], "model.rotary_emb": names[0]}
    # accelerate keeps one copy of a tied table, so a head that shares the embedding's stands beside it.
    head = names[0] if plan.model.tied_embeddings else names[-1]
    return {**first, **layers, "model.norm": names[-1], "lm_head": head}


def _name(device: Device) -> int | str:
    return ordinal(device) if device.kind in VISIBLE else device.torch_device
