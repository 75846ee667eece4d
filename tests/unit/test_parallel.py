"""Collectives and messages over real sockets, one thread per member."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zmq

from apportion.parallel.group import TensorGroup
from apportion.parallel.links import Inbox, Outbox, inbox_address
from apportion.parallel.pairs import PeerLostError
from apportion.parallel.shared import can_share_memory
from apportion.parallel.wire import Kind, pack_result, unpack_result
from apportion.types.request import StepResult


@pytest.fixture(params=["shared memory", "sockets"], autouse=True)
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "sockets":
        monkeypatch.setattr("apportion.parallel.group.can_share_memory", lambda: False)
    elif not can_share_memory():
        pytest.skip("this machine shares no memory between processes")


def in_group(tmp_path: Path, size: int, body: Callable[[TensorGroup], object]) -> list[object]:
    results: list[object] = [None] * size

    def member(rank: int) -> None:
        group = TensorGroup(tmp_path, "g", rank, size, spin_s=0)
        results[rank] = (body(group), dict(group.sent_bytes))
        group.close()

    threads = [threading.Thread(target=member, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


@pytest.mark.parametrize("rows", [5, 30_000], ids=["small", "beyond the sockets' buffers"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_reduce_gives_all_members_the_same_bits(tmp_path: Path, size: int, rows: int):
    parts = [torch.randn(rows, 7, generator=torch.Generator().manual_seed(r)) for r in range(size)]
    results = in_group(tmp_path, size, lambda group: group.all_reduce(parts[group.rank]))
    for rank, (total, sent) in enumerate(results):
        assert torch.equal(total, results[0][0])
        torch.testing.assert_close(total, torch.stack(parts).sum(0))
        assert sent == {peer: rows * 7 * 4 for peer in range(size) if peer != rank}


def test_gather_puts_uneven_columns_in_rank_order(tmp_path: Path):
    whole = torch.randn(3, 9)
    parts = whole.split([2, 6, 1], dim=1)
    results = in_group(tmp_path, 3, lambda group: group.gather_columns(parts[group.rank], [2, 6, 1]))
    assert torch.equal(results[0][0], whole)
    assert [result[0] for result in results[1:]] == [None, None]
    assert results[1][1] == {0: 3 * 6 * 4, 2: 0}


def test_exchanges_of_all_kinds_follow_each_other(tmp_path: Path):
    """Members run ahead of each other as far as the exchange lets them; nothing is overwritten before it is read."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.randint(-9, 9, (60, 3, 40, 1500), generator=generator).float()

    def body(group: TensorGroup) -> bool:
        for i, parts_RNV in enumerate(parts):
            if i % 3:
                assert torch.equal(group.all_reduce(parts_RNV[group.rank]), parts_RNV.sum(0))
                continue
            columns = [1500, 1 + i, 7]
            mine = parts_RNV[group.rank][:, : columns[group.rank]]
            whole = torch.cat([part[:, :n] for part, n in zip(parts_RNV, columns, strict=True)], dim=1)
            gathered = group.gather_columns(mine, columns)
            assert gathered is None if group.rank else torch.equal(gathered, whole)
        return True

    assert [done for done, _ in in_group(tmp_path, 3, body)] == [True] * 3


def test_a_half_precision_sum_keeps_its_format(tmp_path: Path):
    part = torch.randn(4, 6).bfloat16()
    for total, _ in in_group(tmp_path, 2, lambda group: group.all_reduce(part)):
        assert torch.equal(total, part + part)


def test_a_lost_member_is_noticed(tmp_path: Path):
    def body(group: TensorGroup) -> bool:
        if group.rank == 1:
            return True
        with pytest.raises(PeerLostError):
            group.all_reduce(torch.zeros(3))
        return True

    assert [done for done, _ in in_group(tmp_path, 2, body)] == [True, True]


def test_links_keep_order_and_count_payload(tmp_path: Path):
    context = zmq.Context()
    inbox, outbox = (make(context, inbox_address(tmp_path, "a")) for make in (Inbox, Outbox))
    assert inbox.receive(0.01) is None
    for i in range(50):
        outbox.send(Kind.STEP, bytes([i]), b"x" * i)
    assert [inbox.receive(5)[:3] for _ in range(50)] == [(Kind.STEP, bytes([i]), b"x" * i) for i in range(50)]
    assert outbox.sent_bytes == sum(range(50))
    inbox.close()
    outbox.close()
    context.destroy()


def test_results_round_trip():
    result = StepResult(step_id=11, token_ids={7: 42}, logits={7: b"\0\1"})
    assert unpack_result(pack_result(result)) == result
