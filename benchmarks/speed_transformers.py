"""Against transformers' `generate`: fp32, 16 sequences, both cores. Ours: two devices of one core each.

Decoding alone on both sides: of transformers, what more output tokens cost than few.
"""

import time

import torch
from speed_model import Engines, config_file, devices, heading, medians, planned, ratio
from transformers import AutoConfig, AutoModelForCausalLM

ROUNDS = 2
SEQUENCES = 16
PROMPT_TOKENS = 8
FEW, MANY = 4, 20
OUTPUT_TOKENS = 48
"""Of ours: enough that all sequences draw at once for a while."""


def main() -> None:
    heading("Against transformers' generate, fp32")
    torch.set_num_threads(2)
    whole = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config_file()), dtype=torch.float32)
    prompts = torch.randint(0, 32000, (SEQUENCES, PROMPT_TOKENS))

    def generate_s(num_tokens: int) -> float:
        begun_s = time.perf_counter()
        whole.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - begun_s

    def generated() -> float:
        few_s = generate_s(FEW)
        return SEQUENCES * (MANY - FEW) / (generate_s(MANY) - few_s)

    plans = {
        weights: planned(
            devices(1, 1),
            concurrency=SEQUENCES,
            prompt_tokens=PROMPT_TOKENS,
            output_tokens=64,
            weight_format=weights,
        )
        for weights in ("fp32", "int8")
    }
    generate_s(2)
    with Engines(plans) as engines:
        seen = medians(
            {
                "transformers, tokens/s": generated,
                "apportion fp32, tokens/s": lambda: engines.decode("fp32", SEQUENCES, OUTPUT_TOKENS),
                "apportion int8, tokens/s": lambda: engines.decode("int8", SEQUENCES, OUTPUT_TOKENS),
            },
            ROUNDS,
        )
    theirs, ours, int8 = seen.values()
    ratio("fp32 against transformers' fp32", ours / theirs, 2)
    ratio("int8 against transformers' fp32", int8 / theirs, 2)


if __name__ == "__main__":
    main()
