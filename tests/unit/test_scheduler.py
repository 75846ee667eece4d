"""The scheduler driven by a fake executor whose next token depends on the tokens before it, and on nothing else."""

import hashlib

import pytest

from apportion.scheduler.scheduler import Scheduler, SchedulerLimits
from apportion.types.errors import UsageError
from apportion.types.request import Request, SamplingParams, ScheduledBatch, StepResult

EOS = 999


def limits(**changes: int) -> SchedulerLimits:
    values = {
        "num_kv_blocks": 64,
        "block_tokens": 4,
        "max_sequences": 8,
        "max_context_tokens": 64,
        "microbatches": 3,
        "max_in_flight": 3,
        "chunk_tokens": 16,
    }
    return SchedulerLimits(**(values | changes))


def request(request_id: int, num_prompt: int, max_tokens: int = 8) -> Request:
    prompt = tuple((request_id * 31 + i) % 500 for i in range(num_prompt))
    return Request(id=request_id, prompt_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens))


def next_token(token_ids: list[int]) -> int:
    return int.from_bytes(hashlib.sha256(str(token_ids).encode()).digest()[:2], "big") % 500


class FakePipeline:
    """Remembers what was written to every KV slot, as a stage would, and finishes steps in order."""

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.slots: dict[int, tuple[int, int]] = {}
        self.queue: list[ScheduledBatch] = []

    def finish_first(self) -> StepResult:
        batch = self.queue.pop(0)
        drawn: dict[int, int] = {}
        for chunk in batch.chunks:
            table = [b * self.block_tokens + i for b in chunk.block_ids for i in range(self.block_tokens)]
            for offset, token in enumerate(chunk.token_ids):
                self.slots[table[chunk.start + offset]] = (chunk.sequence_id, token)
            context = [self.slots[slot] for slot in table[: chunk.stop]]
            assert {owner for owner, _ in context} == {chunk.sequence_id}
            if chunk.sampling is not None:
                drawn[chunk.sequence_id] = next_token([token for _, token in context])
        return StepResult(step_id=batch.step_id, token_ids=drawn, logits={})


def run(scheduler: Scheduler, arrivals: dict[int, list[Request]]) -> dict[int, list[int]]:
    """Outputs by request; `arrivals` maps a step to the requests that come then."""
    pipeline = FakePipeline(scheduler.limits.block_tokens)
    outputs: dict[int, list[int]] = {}
    step = 0
    while scheduler.num_unfinished or step <= max(arrivals):
        for arriving in arrivals.get(step, []):
            scheduler.add(arriving)
        while (batch := scheduler.schedule()) is not None:
            assert batch.num_tokens <= scheduler.limits.chunk_tokens
            pipeline.queue.append(batch)
        assert len(pipeline.queue) <= scheduler.limits.max_in_flight
        if pipeline.queue:
            for event in scheduler.complete(pipeline.finish_first()):
                outputs.setdefault(event.request_id, []).append(event.token_id)
        step += 1
        assert step < 5000, "no progress"
    return outputs


def expected(request: Request) -> list[int]:
    token_ids = list(request.prompt_ids)
    for _ in range(request.sampling.max_tokens):
        token_ids.append(next_token(token_ids))
    return token_ids[len(request.prompt_ids) :]


ARRIVALS = {0: [request(0, 3), request(1, 30)], 2: [request(2, 17)], 5: [request(3, 1), request(4, 40)]}
REQUESTS = [r for arriving in ARRIVALS.values() for r in arriving]


def test_each_request_gets_its_own_tokens():
    scheduler = Scheduler(limits(), eos_token_ids=[])
    outputs = run(scheduler, ARRIVALS)
    assert outputs == {r.id: expected(r) for r in REQUESTS}
    assert scheduler.num_preemptions == 0
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks


def test_preempted_requests_are_answered_identically():
    scheduler = Scheduler(limits(num_kv_blocks=16), eos_token_ids=[])
    outputs = run(scheduler, ARRIVALS)
    assert scheduler.num_preemptions > 0
    assert outputs == {r.id: expected(r) for r in REQUESTS}
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks


def test_chunks_of_one_prompt_fill_the_pipeline():
    scheduler = Scheduler(limits(), eos_token_ids=[])
    scheduler.add(request(0, 40))
    spans = [(b.chunks[0].start, b.chunks[0].stop) for b in iter(scheduler.schedule, None)]
    assert spans == [(0, 16), (16, 32), (32, 40)]


def test_decode_is_spread_over_the_microbatches():
    scheduler = Scheduler(limits(microbatches=2, max_in_flight=2), eos_token_ids=[])
    for i in range(6):
        scheduler.add(request(i, 1))
    sizes = [len(batch.chunks) for batch in iter(scheduler.schedule, None)]
    assert sizes == [3, 3]


def test_stop_token_ends_a_sequence_unless_ignored():
    for ignore_eos, reason in ((False, "stop"), (True, None)):
        scheduler = Scheduler(limits(), eos_token_ids=[EOS])
        sampling = SamplingParams(max_tokens=4, ignore_eos=ignore_eos)
        scheduler.add(Request(id=0, prompt_ids=(1,), sampling=sampling))
        batch = scheduler.schedule()
        assert batch is not None
        result = StepResult(step_id=batch.step_id, token_ids={0: EOS}, logits={})
        assert [event.finish_reason for event in scheduler.complete(result)] == [reason]


def test_output_ends_at_the_context():
    scheduler = Scheduler(limits(max_context_tokens=10), eos_token_ids=[])
    assert len(run(scheduler, {0: [request(0, 6, max_tokens=50)]})[0]) == 4


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "message"),
    [(64, 1, "64 tokens and the context is 64"), (0, 1, "no tokens"), (3, 0, "asks for 0 tokens")],
)
def test_impossible_requests_are_refused(num_prompt: int, max_tokens: int, message: str):
    scheduler = Scheduler(limits(), eos_token_ids=[])
    with pytest.raises(UsageError, match=message):
        scheduler.add(request(0, num_prompt, max_tokens))
