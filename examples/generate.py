"""Generate text with a model that none of the devices could hold alone."""

from apportion import LLM, SamplingParams


def main() -> None:
    with LLM("demo", devices="laptop=cpu:12MiB@0.5, desk=cpu:13MiB", context=64, concurrency=3) as llm:
        prompts = ["ROMEO:", "JULIET:", "First Citizen:"]
        for output in llm.generate(prompts, SamplingParams(max_tokens=20, temperature=0.8, seed=3)):
            print(f"{output.prompt}{output.outputs[0].text}\n")


if __name__ == "__main__":
    main()
