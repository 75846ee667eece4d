"""Tensor-parallel groups, single stream, fp16: two equal devices against one; 3:1 shares on speeds 0.75 and
0.25 against their sum."""

from speed_model import Engines, by_hand, devices, heading, medians, memory_ceiling, model, ratio

ROUNDS = 5
OUTPUT_TOKENS = 32


def main() -> None:
    heading("Tensor-parallel groups, one sequence, fp16")
    layers = [model().num_layers]
    one = {"concurrency": 1, "context": 128, "weight_format": "fp16"}
    plans = {
        "one": by_hand([[1]], layers, devices(1), **one),
        "equal group": by_hand([[1, 1]], layers, devices(1, 1), **one),
        "3:1 group": by_hand([[3, 1]], layers, devices(0.75, 0.25), **one),
    }
    with Engines(plans) as engines:
        memory_ceiling()
        seen = medians(
            {f"{name}, tokens/s": lambda name=name: engines.decode(name, 1, OUTPUT_TOKENS) for name in plans},
            ROUNDS,
        )
        memory_ceiling()
    alone, equal, uneven = seen.values()
    ratio("two equal devices against one", equal / alone, 1.6)
    ratio("3:1 of speeds 0.75 and 0.25, of their sum", uneven / alone, 0.85)


if __name__ == "__main__":
    main()
