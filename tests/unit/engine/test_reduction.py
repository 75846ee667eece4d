"""A worker's all-reduce as an operation of a table, over shared memory and real sockets, one thread per member."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from apportion.engine.pacing import Pacer
from apportion.engine.reduction import CompiledPacedAllReduce, PacedAllReduce, paced_all_reduce
from apportion.model.kernels import layer as lean_kernels
from apportion.model.kernels.op_code import ROW_WORDS
from apportion.model.kernels.team import Team
from apportion.transport.group import TensorGroup
from apportion.transport.pairs import PeerLostError
from apportion.transport.shared import can_share_memory
from apportion.types.layout import EXCHANGE_PIECE_BYTES

pytestmark = pytest.mark.skipif(not can_share_memory(), reason="shares no memory between processes")
SUMS = 10


def in_group(
    tmp_path: Path, speeds: list[float], body: Callable[[CompiledPacedAllReduce, int], None]
) -> None:
    """`body` of each member's all-reduce and rank; raises its error."""
    errors: list[BaseException] = []

    def member(rank: int) -> None:
        group = TensorGroup(tmp_path, "g", rank, len(speeds), spin_s=0)
        try:
            all_reduce = paced_all_reduce(group, Pacer(speeds[rank]), SUMS)
            assert isinstance(all_reduce, CompiledPacedAllReduce)
            body(all_reduce, rank)
        except BaseException as error:
            errors.append(error)
        finally:
            group.close()

    threads = [threading.Thread(target=member, args=(rank,)) for rank in range(len(speeds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    for error in errors:
        raise error


def table_of(all_reduce: CompiledPacedAllReduce, x: torch.Tensor, times: int) -> np.ndarray:
    table_OW = np.zeros((times, ROW_WORDS), np.int64)
    operands = {"function": all_reduce.function, "context": all_reduce.context, "width": x.shape[1]}
    for row_W in table_OW:
        lean_kernels.reduce.fill(row_W, rows=len(x), x=x.data_ptr(), **operands)
    return table_OW


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("columns", [7, EXCHANGE_PIECE_BYTES // 4 + 5], ids=["small", "in pieces"])
@pytest.mark.parametrize("size", [2, 3])
def test_sums_follow_each_other_in_one_call(tmp_path: Path, size: int, columns: int, num_threads: int):
    parts_R3H = torch.arange(size * 3.0 * columns).remainder(17).view(size, 3, columns)

    def body(all_reduce: CompiledPacedAllReduce, rank: int) -> None:
        x = parts_R3H[rank].clone()
        Team(num_threads).run_ops(table_of(all_reduce, x, SUMS), 0, SUMS)
        all_reduce.check()
        assert torch.equal(x, parts_R3H.sum(0) * size ** (SUMS - 1))
        spans = all_reduce.take_spans()
        assert len(spans) == SUMS
        assert all(begun <= ended for begun, ended in spans)
        assert spans == sorted(spans)
        assert spans[-1][1] <= time.perf_counter()
        assert all_reduce.take_spans() == []
        sent = {peer: SUMS * x.nbytes for peer in range(size) if peer != rank}
        assert all_reduce._group.sent_bytes == sent

    in_group(tmp_path, [1.0] * size, body)


def test_a_lost_member_ends_the_call_of_the_others(tmp_path: Path):
    def body(all_reduce: CompiledPacedAllReduce, rank: int) -> None:
        x = torch.ones(1, 9)
        times = 3 if rank == 1 else SUMS
        Team(1).run_ops(table_of(all_reduce, x, times), 0, times)
        if rank == 1:
            all_reduce.check()
            return
        with pytest.raises(PeerLostError, match="rank 1"):
            all_reduce.check()
        with pytest.raises(PeerLostError, match="rank 1"):
            all_reduce(x)

    in_group(tmp_path, [1.0, 1.0], body)


def test_a_slow_member_sleeps_before_it_exchanges(tmp_path: Path):
    """20 ms of computing take 80; the fast member waits for it, and neither's wait is computing."""
    computed_s = 0.02

    def body(all_reduce: CompiledPacedAllReduce, rank: int) -> None:
        all_reduce._pacer.start()
        x = torch.ones(1, 9)
        begun_s = time.perf_counter()
        stop_s = time.thread_time() + computed_s
        while rank == 1 and time.thread_time() < stop_s:
            pass
        Team(1).run_ops(table_of(all_reduce, x, SUMS), 0, SUMS)
        assert time.perf_counter() - begun_s == pytest.approx(4 * computed_s, rel=0.3)
        exchanged_s = sum(ended - begun for begun, ended in all_reduce.take_spans())
        assert exchanged_s < 0.01 if rank == 1 else exchanged_s > 3 * computed_s

    in_group(tmp_path, [1.0, 0.25], body)


def test_only_emulated_devices_pause(tmp_path: Path):
    def body(all_reduce: CompiledPacedAllReduce, rank: int) -> None:
        assert (all_reduce.pause is None) == (rank == 0)

    in_group(tmp_path, [1.0, 0.5], body)


def test_elsewhere_sums_go_through_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("apportion.transport.group.can_share_memory", lambda: False)
    totals: dict[int, float] = {}

    def member(rank: int) -> None:
        group = TensorGroup(tmp_path, "g", rank, 2, spin_s=0)
        all_reduce = paced_all_reduce(group, Pacer(1.0), SUMS)
        assert type(all_reduce) is PacedAllReduce
        totals[rank] = float(all_reduce(torch.tensor([rank + 1.0])))
        assert len(all_reduce.take_spans()) == 1
        group.close()

    threads = [threading.Thread(target=member, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert totals == {0: 3.0, 1: 3.0}
