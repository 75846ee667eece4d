"""A batch comes out as it went in, and carries only what the stages do not know yet."""

from collections.abc import Sequence

from apportion.transport.batches import BatchPacker, BatchUnpacker
from apportion.types.request import BlockMove, Chunk, Draw, SamplingParams, ScheduledBatch

SAMPLING = SamplingParams(max_tokens=3, temperature=0.5, top_p=0.9, seed=2**40, return_logits=True)


def sizes(batches: Sequence[ScheduledBatch]) -> list[int]:
    """Packed bytes of each, having compared what is unpacked."""
    packer, unpacker = BatchPacker(), BatchUnpacker()
    packed = [packer.pack(batch) for batch in batches]
    assert [unpacker.unpack(data) for data in packed] == list(batches)
    return [len(data) for data in packed]


def decode(
    step_id: int, table: tuple[int, ...], sampling: SamplingParams | None = SAMPLING
) -> ScheduledBatch:
    return ScheduledBatch(step_id=step_id, chunks=(Chunk(7, step_id, (5,), table, sampling),))


def test_tables_and_sampling_travel_once():
    table = tuple(range(1000, 1200))
    longer = (*table, 3)
    first, second, third = sizes([decode(1, table), decode(2, table), decode(3, longer)])
    assert first > 600
    assert second < 15
    assert second < third < 20


def test_a_replaced_block_does_not_send_the_rest():
    table = tuple(range(1000, 1200))
    copied = (*table[:-1], 5)
    other = tuple(range(300, 320))
    _, tail, _, again = sizes([decode(1, table), decode(2, copied), decode(3, other), decode(4, table)])
    assert tail < 25
    assert again > 600


def test_every_part_of_a_batch_travels():
    forks = (Draw(8, SamplingParams(max_tokens=3, seed=9)), Draw(9, SAMPLING))
    batches = [
        ScheduledBatch(
            step_id=1,
            chunks=(Chunk(7, 0, (1, 2), (4, 2), SAMPLING, forks), Chunk(3, 5, (9,), (6,), None)),
            moves=(BlockMove("swap out", 3, 0), BlockMove("copy", 1, 2), BlockMove("swap in", 0, 5)),
        ),
        ScheduledBatch(
            step_id=2, chunks=(Chunk(8, 2, (1,), (4, 5), forks[0].sampling),), ended=(7, 11), moves=()
        ),
        ScheduledBatch(step_id=3, chunks=(Chunk(7, 0, (1, 2, 3), (2,), SAMPLING, num_drafts=2),)),
    ]
    sizes(batches)


def test_what_ended_is_forgotten():
    packer, unpacker = BatchPacker(), BatchUnpacker()
    ending = ScheduledBatch(step_id=2, chunks=(), ended=(7,))
    for batch in (decode(1, (1, 2)), ending):
        unpacker.unpack(packer.pack(batch))
    for end in (packer, unpacker):
        assert not any(getattr(end, name) for name in vars(end))
