"""Against llama.cpp's RPC mode: `python benchmarks/speed_llama_cpp.py FOLDER`, where FOLDER has its programs
(`ggml-rpc-server` or `rpc-server`, and `llama-batched-bench`), built with `-DGGML_RPC=ON`.

Theirs: two RPC servers of one thread on one core each. Ours: two devices of one core each. Both run the same shapes
with the same noise, f16 against fp16 and q8_0 against int8; rounds are interleaved.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from speed_model import Engines, devices, heading, medians, planned, ratio

ROUNDS = 2
OUTPUT_TOKENS = 20
PROMPT_TOKENS = 8
PORTS = (50191, 50192)
FORMATS = {"fp16": "f16", "int8": "q8_0"}
TARGETS = {"fp16": (2, 1.7, 1), "int8": (2.5, 1.7, 1)}


def server_program(folder: Path) -> Path | None:
    found = [folder / name for name in ("ggml-rpc-server", "rpc-server") if (folder / name).is_file()]
    return found[0] if found and (folder / "llama-batched-bench").is_file() else None


@contextmanager
def servers(program: Path) -> Iterator[None]:
    with ExitStack() as exit_stack:
        for core, port in enumerate(PORTS):
            command = ["taskset", "-c", str(core), program, "-H", "127.0.0.1", "-p", str(port), "-t", "1"]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            exit_stack.callback(process.wait)
            exit_stack.callback(process.kill)
        time.sleep(1)
        yield


def theirs(
    folder: Path, file: Path, sequences: int, prompt_tokens: int, output_tokens: int, key: str
) -> float:
    """`key` of the last line of llama-batched-bench: tokens per second of prefill or decoding."""
    command = [folder / "llama-batched-bench", "-m", file, "-c", "4096", "-b", "512", "-ub", "512", "-t", "1"]
    command += ["-ngl", "99", "--rpc", ",".join(f"127.0.0.1:{port}" for port in PORTS)]
    command += ["-npp", str(prompt_tokens), "-ntg", str(output_tokens), "-npl", str(sequences)]
    command += ["--output-format", "jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])[key]


def cases(engines: Engines, folder: Path, file: Path, weights: str) -> dict[str, Callable[[], float]]:
    def decode(sequences: int) -> Callable[[], float]:
        return lambda: theirs(folder, file, sequences, PROMPT_TOKENS, OUTPUT_TOKENS, "speed_tg")

    quantised = FORMATS[weights]
    return {
        f"llama.cpp {quantised}, 16 sequences, tokens/s": decode(16),
        f"apportion {weights}, 16 sequences, tokens/s": lambda: engines.decode(weights, 16, OUTPUT_TOKENS),
        f"llama.cpp {quantised}, prefill of 512, tokens/s": lambda: theirs(
            folder, file, 1, 512, 1, "speed_pp"
        ),
        f"apportion {weights}, prefill of 512, tokens/s": lambda: engines.prefill(f"{weights} alone", 512),
        f"llama.cpp {quantised}, single stream, tokens/s": decode(1),
        f"apportion {weights}, single stream, tokens/s": lambda: engines.decode(
            f"{weights} alone", 1, OUTPUT_TOKENS
        ),
    }


def compare(folder: Path, program: Path, weights: str) -> None:
    from llama_cpp_model import write_gguf

    plans = {
        weights: planned(
            devices(1, 1), concurrency=16, prompt_tokens=32, output_tokens=64, weight_format=weights
        ),
        f"{weights} alone": planned(
            devices(1, 1),
            concurrency=1,
            objective="latency",
            prompt_tokens=512,
            output_tokens=OUTPUT_TOKENS,
            weight_format=weights,
        ),
    }
    with tempfile.TemporaryDirectory() as scratch, servers(program), Engines(plans) as engines:
        file = Path(scratch) / "model.gguf"
        write_gguf(file, FORMATS[weights])
        seen = list(medians(cases(engines, folder, file, weights), ROUNDS).values())
    labels = ("16 sequences", "prefill of 512", "single stream")
    for label, target, them, us in zip(labels, TARGETS[weights], seen[::2], seen[1::2], strict=True):
        ratio(f"{weights} against {FORMATS[weights]}, {label}", us / them, target)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
    program = server_program(folder)
    if program is None:
        print(
            f"skipped: {folder} has no RPC server and llama-batched-bench; build llama.cpp with -DGGML_RPC=ON"
        )
        return
    for weights in sys.argv[2:] or FORMATS:
        heading(f"Against llama.cpp's RPC mode, {weights}")
        compare(folder, program, weights)


if __name__ == "__main__":
    main()
