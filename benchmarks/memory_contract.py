"""Peak of every device against its plan, at all planned sequences × context, on devices with no byte to spare."""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from contract import Case, drive

from apportion.types.units import format_bytes

CASES = {
    "hidden 256, pipeline of 3": Case(
        hidden_size=256,
        weight_format="",
        groups=((1,), (1,), (1,)),
        layers=(4, 7, 5),
        vocab_rows=1024,
        concurrency=2,
        chunk_tokens=16,
    ),
    "hidden 512, 1 + group 3:1": Case(hidden_size=512, weight_format=""),
    "hidden 1024, 1 + group 3:1": Case(hidden_size=1024, weight_format="", vocab_rows=16000, concurrency=8),
    "hidden 1024, pipeline of 3": Case(
        hidden_size=1024, weight_format="", groups=((1,), (1,), (1,)), layers=(1, 4, 3), concurrency=8
    ),
}


def main() -> None:
    shares: list[tuple[int, float]] = []
    print("| model, division | weights | device | planned | peak | peak / planned |")
    print("|---|---|---|---|---|---|")
    for name, case in CASES.items():
        for weight_format in ("fp32", "fp16", "int8"):
            held = drive(replace(case, weight_format=weight_format))
            for device, one in sorted(held.items()):
                shares.append((one.planned_bytes, one.ratio))
                sizes = (
                    f"{format_bytes(one.planned_bytes)} | {format_bytes(one.peak_bytes)} | {one.ratio:.3f}"
                )
                print(f"| {name} | {weight_format} | {device} | {sizes} |", flush=True)
    print(f"\nhighest {max(ratio for _, ratio in shares):.3f}", end="")
    for least_mib in (10, 12, 16):
        lowest = min(ratio for size, ratio in shares if size >= least_mib * 2**20)
        print(f", lowest from {least_mib} MiB {lowest:.3f}", end="")
    print()


if __name__ == "__main__":
    main()
