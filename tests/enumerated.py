"""What a plan chooses among, written out without the planner: brute force goes through all of it."""

from apportion.types.workload import Workload

CHUNK_TOKENS = (16, 32, 64, 128, 256)


def every_microbatches(workload: Workload, num_devices: int) -> range:
    """All numbers with a sequence for each microbatch and messages for all: two to a device."""
    if workload.objective == "latency":  # of one request alone, to which the number makes no difference
        return range(1, 2)
    return range(1, min(workload.concurrency, 2 * num_devices) + 1)


def every_chunk(workload: Workload) -> tuple[int, ...]:
    """All sizes up to the context, or the smallest."""
    return tuple(size for size in CHUNK_TOKENS if size <= workload.max_context_tokens) or CHUNK_TOKENS[:1]
