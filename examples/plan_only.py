"""Plan a model for devices that are not here: no weights, no torch."""

import apportion


def main() -> None:
    plan = apportion.plan(
        "llama-3.3-70b", devices="rig: rtx-3060-12gb + rtx-3090 + rtx-4090", weights="int4", context=4096
    )
    for stage in plan.stages:
        print(f"layers {stage.layer_start}-{stage.layer_stop - 1} on {', '.join(stage.split.device_ids)}")
    for device_id, memory in plan.memory.items():
        print(f"{device_id}: {memory.total_bytes / 2**30:.1f} GiB")
    print(
        f"{plan.estimate.tokens_per_s:.1f} tokens/s; no division is more than {plan.certificate.gap:.2%} faster"
    )
    apportion.write_plan(plan, "plan.json")


if __name__ == "__main__":
    main()
