"""Two equal devices against one: decoding of 32 and of 16 sequences, and the prefill of one 512-token prompt.

python benchmarks/speed_devices.py [fp32|fp16|int8]
"""

import sys

from speed_model import Engines, devices, heading, medians, memory_ceiling, planned, ratio

ROUNDS = 5
OUTPUT_TOKENS = 48


def main() -> None:
    weights = sys.argv[1] if len(sys.argv) > 1 else "fp16"
    heading(f"Two equal devices against one, {weights}")
    plans = {
        "one": planned(devices(1), concurrency=16, prompt_tokens=32, output_tokens=64, weight_format=weights),
        "two": planned(
            devices(1, 1), concurrency=32, prompt_tokens=32, output_tokens=64, weight_format=weights
        ),
        "one, prompt": planned(
            devices(1),
            concurrency=1,
            objective="latency",
            prompt_tokens=512,
            output_tokens=8,
            weight_format=weights,
        ),
        "two, prompt": planned(
            devices(1, 1),
            concurrency=1,
            objective="latency",
            prompt_tokens=512,
            output_tokens=8,
            weight_format=weights,
        ),
    }
    with Engines(plans) as engines:
        memory_ceiling()
        seen = medians(
            {
                "one, 16 sequences, tokens/s": lambda: engines.decode("one", 16, OUTPUT_TOKENS),
                "two, 32 sequences, tokens/s": lambda: engines.decode("two", 32, OUTPUT_TOKENS),
                "two, 16 sequences, tokens/s": lambda: engines.decode("two", 16, OUTPUT_TOKENS),
                "one, prefill of 512, tokens/s": lambda: engines.prefill("one, prompt", 512),
                "two, prefill of 512, tokens/s": lambda: engines.prefill("two, prompt", 512),
            },
            ROUNDS,
        )
    one_decode, two_32, two_16, one_prefill, two_prefill = seen.values()
    ratio("32 sequences on two against 16 on one", two_32 / one_decode, 1.9)
    ratio("16 sequences on two against 16 on one", two_16 / one_decode, 1.6)
    ratio("prefill of one 512-token prompt, two against one", two_prefill / one_prefill, 1.7)


if __name__ == "__main__":
    main()
