"""A plan as the `device_map` that accelerate and transformers' `from_pretrained` take.

Looked at: accelerate 1.15.0, accelerate/big_modeling.py (`dispatch_model`: a module name means everything below it;
a forward pass runs through the devices one after the other) and transformers 5.23, whose models of every family in
catalog/families.py have the five names used here.
"""

from apportion.export.accelerators import VISIBLE, numbers_note, ordinal
from apportion.export.kv_formats import kv_name
from apportion.export.launch import EngineDivision, Export
from apportion.export.weights import weight_notes
from apportion.types.cluster import Device
from apportion.types.plan import Plan


def to_accelerate(plan: Plan) -> Export:
    kv_name(plan, "accelerate")
    notes = [
        *numbers_note([plan.cluster.device(name) for name in plan.device_ids]),
        *weight_notes(plan, "accelerate"),
        "accelerate works on one batch at a time: stages wait for each other, KV is not paged, and no device's "
        "memory is limited to its budget",
    ]
    if plan.model.tied_embeddings and len(plan.stages) > 1:
        notes.append(
            f"accelerate holds tied tables once: the head runs on {plan.device_ids[0]}, beside the "
            "embedding, which the prediction leaves out"
        )
    return Export(
        launches=(),
        device_map=device_map(plan),
        division=EngineDivision(stages=plan.stages, microbatches=1, pipelined_prefill=False),
        notes=tuple(notes),
    )


def device_map(plan: Plan) -> dict[str, int | str]:
    """Module name to a GPU's ordinal or another torch device; every parameter is below exactly one name."""
    names = [_name(plan.cluster.device(stage.split.device_ids[0])) for stage in plan.stages]
    layers = {
        f"model.layers.{layer}": name
        for stage, name in zip(plan.stages, names, strict=True)
        for layer in range(stage.layer_start, stage.layer_stop)
    }
    # The rotary tables are made once, before the first layer, from the embedded tokens.
    first = {"model.embed_tokens": names[0], "model.rotary_emb": names[0]}
    # accelerate keeps one copy of a tied table, so a head that shares the embedding's stands beside it.
    head = names[0] if plan.model.tied_embeddings else names[-1]
    return {**first, **layers, "model.norm": names[-1], "lm_head": head}


def _name(device: Device) -> int | str:
    return ordinal(device) if device.kind in VISIBLE else device.torch_device
