"""Scheduled batches on the wire, by what is new in them.

Both ends remember every sequence's block table and sampling parameters: a table travels as how many of its leading
blocks stay and which follow them, nothing where it is unchanged; sampling parameters travel with the first draw.
Every packed batch must therefore be unpacked, in order, by each stage that takes part.
"""

from itertools import takewhile
from typing import Any

from apportion.transport.wire import pack, unpack
from apportion.types.request import BlockMove, Chunk, Draw, MoveKind, SamplingParams, ScheduledBatch

_SAMPLING_FIELDS = tuple(SamplingParams.__dataclass_fields__)
_MOVES: tuple[MoveKind, ...] = ("copy", "swap out", "swap in")
_MOVE_CODES = {kind: code for code, kind in enumerate(_MOVES)}
_NO_DRAW, _KNOWN = 0, 1
"""Instead of sampling parameters."""


_NEITHER: tuple[tuple[Draw, ...], int] = ((), 0)
"""Forks, and the number of drafts."""


class BatchPacker:
    """The coordinator's end."""

    def __init__(self) -> None:
        self._tables: dict[int, tuple[int, ...]] = {}
        self._drawing: set[int] = set()

    def pack(self, batch: ScheduledBatch) -> bytes:
        chunks = [
            (
                chunk.sequence_id,
                chunk.start,
                chunk.token_ids,
                self._table(chunk.sequence_id, chunk.block_ids),
                self._sampling(chunk.sequence_id, chunk.sampling),
                chunk.num_drafts or [(draw.sequence_id, self._sampling(*draw)) for draw in chunk.forks],
            )
            for chunk in batch.chunks
        ]
        moves = [(_MOVE_CODES[move.kind], move.src, move.dst) for move in batch.moves]
        for sequence_id in batch.ended:
            self._tables.pop(sequence_id, None)
            self._drawing.discard(sequence_id)
        return pack((batch.step_id, chunks, moves, batch.ended))

    def _table(self, sequence_id: int, block_ids: tuple[int, ...]) -> tuple[int, tuple[int, ...]] | None:
        """(leading blocks that stay, those that follow), None where nothing changed."""
        known = self._tables.get(sequence_id, ())
        if known is block_ids:  # the scheduler makes a new tuple for every change
            return None
        self._tables[sequence_id] = block_ids
        if block_ids[: len(known)] == known:
            return len(known), block_ids[len(known) :]
        same = takewhile(lambda pair: pair[0] == pair[1], zip(known, block_ids, strict=False))
        kept = sum(1 for _ in same)
        return kept, block_ids[kept:]

    def _sampling(self, sequence_id: int, sampling: SamplingParams | None) -> int | list[Any]:
        if sampling is None:
            return _NO_DRAW
        if sequence_id in self._drawing:
            return _KNOWN
        self._drawing.add(sequence_id)
        return [getattr(sampling, name) for name in _SAMPLING_FIELDS]


class BatchUnpacker:
    """A stage's end."""

    def __init__(self) -> None:
        self._tables: dict[int, tuple[int, ...]] = {}
        self._sampling: dict[int, SamplingParams] = {}

    def unpack(self, data: bytes) -> ScheduledBatch:
        step_id, chunks, moves, ended = unpack(data)
        batch = ScheduledBatch(
            step_id=step_id,
            chunks=tuple(
                Chunk(
                    sequence_id,
                    start,
                    tuple(token_ids),
                    self._table(sequence_id, table),
                    self._draw(sequence_id, sampling),
                    *(self._forks_or_drafts(more) if more else _NEITHER),
                )
                for sequence_id, start, token_ids, table, sampling, more in chunks
            ),
            moves=tuple(BlockMove(_MOVES[code], src, dst) for code, src, dst in moves),
            ended=tuple(ended),
        )
        for sequence_id in ended:
            self._tables.pop(sequence_id, None)
            self._sampling.pop(sequence_id, None)
        return batch

    def _table(self, sequence_id: int, change: list[Any] | None) -> tuple[int, ...]:
        if change is not None:
            kept, block_ids = change
            self._tables[sequence_id] = (*self._tables.get(sequence_id, ())[:kept], *block_ids)
        return self._tables[sequence_id]

    def _draw(self, sequence_id: int, sampling: int | list[Any]) -> SamplingParams | None:
        if sampling == _NO_DRAW:
            return None
        if sampling != _KNOWN:
            assert isinstance(sampling, list)
            given = dict(zip(_SAMPLING_FIELDS, sampling, strict=True))
            self._sampling[sequence_id] = SamplingParams(**given)
        return self._sampling[sequence_id]

    def _forks_or_drafts(self, more: int | list[Any]) -> tuple[tuple[Draw, ...], int]:
        """No chunk has both: forks begin where a prompt ends."""
        if isinstance(more, int):
            return (), more
        return tuple(self._fork(*fork) for fork in more), 0

    def _fork(self, sequence_id: int, sampling: int | list[Any]) -> Draw:
        drawn = self._draw(sequence_id, sampling)
        assert drawn is not None
        return Draw(sequence_id, drawn)
