"""Four emulated devices at speeds 0.4, 0.3, 0.2 and 0.1: against the sum of their speeds times one full device at the
same microbatch, and against the same engine on an even split of the layers.

    python benchmarks/speed_unequal.py FORMAT SEQUENCES

SEQUENCES are those of a microbatch.

The four workers share this machine's cores; emulation counts CPU time, so a shared core is not counted twice.
"""

import sys

from speed_model import Engines, by_hand, devices, heading, medians, model, planned, ratio

SPEEDS = (0.4, 0.3, 0.2, 0.1)
ROUNDS = 3
OUTPUT_TOKENS = 48
PLANNED_TOKENS = 64
"""Output tokens that are planned for: what is timed is decoding alone."""
PROMPT_TOKENS = 8


def main() -> None:
    weights, microbatch = sys.argv[1], int(sys.argv[2])
    heading(f"Four unequal devices, {weights}, microbatches of {microbatch}")
    sequences = microbatch * len(SPEEDS)
    context = PROMPT_TOKENS + OUTPUT_TOKENS
    even = model().num_layers // len(SPEEDS)
    plans = {
        "one full": by_hand(
            [[1]],
            [model().num_layers],
            devices(1),
            concurrency=microbatch,
            context=context,
            weight_format=weights,
        ),
        "planned": planned(
            devices(*SPEEDS),
            concurrency=sequences,
            prompt_tokens=PROMPT_TOKENS,
            output_tokens=PLANNED_TOKENS,
            weight_format=weights,
        ),
        "even split": by_hand(
            [[1]] * len(SPEEDS),
            [even] * len(SPEEDS),
            devices(*SPEEDS),
            concurrency=sequences,
            context=context,
            weight_format=weights,
        ),
    }
    with Engines(plans) as engines:
        seen = medians(
            {
                "one full, tokens/s": lambda: engines.decode(
                    "one full", microbatch, OUTPUT_TOKENS, PROMPT_TOKENS
                ),
                "planned, tokens/s": lambda: engines.decode(
                    "planned", sequences, OUTPUT_TOKENS, PROMPT_TOKENS
                ),
                "even split, tokens/s": lambda: engines.decode(
                    "even split", sequences, OUTPUT_TOKENS // 2, PROMPT_TOKENS
                ),
            },
            ROUNDS,
        )
    full, uneven, split = seen.values()
    ratio("of the sum of speeds", uneven / (sum(SPEEDS) * full), 0.9)
    ratio("planned against an even split", uneven / split, 2)


if __name__ == "__main__":
    main()
