"""What the coordinator does for each step, timed without workers: schedule and pack; unpack and complete.

    python benchmarks/coordinator.py [--sequences 64] [--context 512] [--steps 400]

Every sequence decodes; results come back in order as soon as all microbatches are out. The last line is JSON.
"""

import argparse
import json
import random
import statistics
import time

from apportion.scheduler.limits import SchedulerLimits
from apportion.scheduler.scheduler import Scheduler
from apportion.transport.batches import BatchPacker, BatchUnpacker
from apportion.transport.wire import pack_result, unpack_result
from apportion.types.request import Request, SamplingParams, ScheduledBatch, StepResult
from apportion.types.step_costs import even_costs

BLOCK_TOKENS = 16


def drawn(batch: ScheduledBatch) -> bytes:
    """The last stage's answer, as it would arrive."""
    token_ids = {chunk.sequence_id: (7,) for chunk in batch.chunks if chunk.sampling is not None}
    return pack_result(StepResult(step_id=batch.step_id, token_ids=token_ids, logits={}))


def make_scheduler(num_sequences: int, context: int, steps: int, microbatches: int) -> Scheduler:
    longest = context + steps + 2
    limits = SchedulerLimits(
        num_kv_blocks=num_sequences * -(-longest // BLOCK_TOKENS),
        block_tokens=BLOCK_TOKENS,
        max_sequences=num_sequences,
        max_context_tokens=longest,
        microbatches=microbatches,
        max_in_flight=microbatches + 1,
        chunk_tokens=512,
    )
    scheduler = Scheduler(limits, [], even_costs(microbatches))
    draw = random.Random(0)
    for i in range(num_sequences):
        prompt = tuple(draw.randrange(32000) for _ in range(context))
        sampling = SamplingParams(max_tokens=steps + 1, temperature=0.8, ignore_eos=True)
        scheduler.add(Request(id=i, prompt_ids=prompt, sampling=sampling))
    return scheduler


def measure(num_sequences: int, context: int, steps: int, microbatches: int) -> dict[str, float]:
    """Medians over decode steps of all sequences: milliseconds of the coordinator, of which to schedule, and of a stage
    that unpacks its message."""
    scheduler = make_scheduler(num_sequences, context, steps, microbatches)
    packer, unpacker = BatchPacker(), BatchUnpacker()
    in_flight: list[tuple[bytes, bool]] = []
    coordinator_ms: list[float] = []
    schedule_ms: list[float] = []
    unpack_ms: list[float] = []
    sizes: list[int] = []
    spent_s = 0.0
    fullest = num_sequences // microbatches
    while scheduler.num_unfinished:
        begun_s = time.perf_counter()
        batch = scheduler.schedule()
        scheduled_s = time.perf_counter()
        header = packer.pack(batch) if batch is not None else b""
        spent_s += time.perf_counter() - begun_s
        if batch is not None:
            unpacking_s = time.perf_counter()
            unpacker.unpack(header)
            full = len(batch.chunks) >= fullest and all(len(chunk.token_ids) == 1 for chunk in batch.chunks)
            if full:
                schedule_ms.append(1e3 * (scheduled_s - begun_s))
                unpack_ms.append(1e3 * (time.perf_counter() - unpacking_s))
                sizes.append(len(header))
            in_flight.append((drawn(batch), full))
            continue
        result, full = in_flight.pop(0)
        begun_s = time.perf_counter()
        scheduler.complete(unpack_result(result))
        spent_s += time.perf_counter() - begun_s
        if full:
            coordinator_ms.append(1e3 * spent_s)
        spent_s = 0.0
    return {
        "microbatches": microbatches,
        "coordinator_ms": round(statistics.median(coordinator_ms), 4),
        "schedule_ms": round(statistics.median(schedule_ms), 4),
        "unpack_ms": round(statistics.median(unpack_ms), 4),
        "header_bytes": statistics.median(sizes),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=400)
    given = parser.parse_args()
    rows = [measure(given.sequences, given.context, given.steps, count) for count in (1, 2, 4)]
    print(f"{given.sequences} sequences of {given.context} tokens, medians of a decode step")
    print("microbatches  coordinator ms     schedule ms    unpacking ms  bytes")
    for row in rows:
        figures = (row[name] for name in ("coordinator_ms", "schedule_ms", "unpack_ms"))
        print(
            f"{row['microbatches']:12}  "
            + "  ".join(f"{ms:14.3f}" for ms in figures)
            + f"  {row['header_bytes']:5.0f}"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
