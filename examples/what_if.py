"""What each change would do to a plan: a device less, memory kept free, a longer context."""

from apportion import Changes, InfeasibleError, plan, what_if


def main() -> None:
    devices = "tower: rtx-3090 + rtx-3060-12gb; laptop: rtx-4060-laptop"
    before = plan("llama-3.1-8b", devices=devices, stream="never", concurrency=4)
    print(f"as it is: {before.estimate.tokens_per_s:.1f} tokens/s on {', '.join(before.device_ids)}")
    for name, changes in {
        "without the 3090": Changes(remove=("rtx-3090",), streaming=False),
        "without the 3090 and the laptop": Changes(remove=("rtx-3090", "rtx-4060-laptop")),  # may stream
        "16 GiB of the 3090 kept free": Changes(reserve=(("rtx-3090", 16 * 2**30),)),
        "a context of 64k": Changes(context_tokens=65536),
    }.items():
        try:
            after = what_if(before, changes)
            print(f"{name}: {after.estimate.tokens_per_s:.1f} tokens/s on {', '.join(after.device_ids)}")
        except InfeasibleError as error:
            print(f"{name}: {error}")


if __name__ == "__main__":
    main()
