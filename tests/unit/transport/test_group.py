"""Collectives and messages over real sockets, one thread per member."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from apportion.transport.group import TensorGroup
from apportion.transport.links import Inbox, Outbox
from apportion.transport.pairs import PeerLostError
from apportion.transport.shared import can_share_memory
from apportion.transport.wire import Kind, pack_result, unpack_result
from apportion.types.request import StepResult


@pytest.fixture(params=["shared memory", "sockets"], autouse=True)
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "sockets":
        monkeypatch.setattr("apportion.transport.group.can_share_memory", lambda: False)
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
    results = in_group(tmp_path, size, lambda group: group.all_reduce(parts[group.rank].clone()))
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
                assert torch.equal(group.all_reduce(parts_RNV[group.rank].clone()), parts_RNV.sum(0))
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
    for total, _ in in_group(tmp_path, 2, lambda group: group.all_reduce(part.clone())):
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
    inbox, outbox = Inbox(tmp_path, "a"), Outbox(tmp_path, "a")
    assert inbox.receive(0.01) is None
    payloads = [bytes([i]) * (i * 700) for i in range(50)]  # from those in a packet to those beside it
    for i, payload in enumerate(payloads):
        outbox.send(Kind.STEP, bytes([i]), payload)
    for i, payload in enumerate(payloads):
        message = inbox.receive(5)
        assert message is not None
        assert (message.kind, message.header, bytes(message.payload)) == (Kind.STEP, bytes([i]), payload)
    assert outbox.sent_bytes == sum(map(len, payloads))
    inbox.close()
    outbox.close()


def test_a_segment_is_used_again_once_it_has_been_read(tmp_path: Path):
    inbox, outbox = Inbox(tmp_path, "a"), Outbox(tmp_path, "a")
    payload = memoryview(bytearray(10_000))
    for i in range(20):
        payload[0] = i
        outbox.send(Kind.STEP, b"", payload)
        message = inbox.receive(5)
        assert message is not None
        assert message.payload == payload
    assert len(outbox._segments) == 2  # of which one is being read while the other is written
    inbox.close()
    outbox.close()


def test_a_receiver_that_is_slow_or_gone_blocks_nobody(tmp_path: Path):
    inbox, outbox = Inbox(tmp_path, "a"), Outbox(tmp_path, "a")
    for _ in range(64):
        outbox.send(Kind.STEP, b"header", bytes(2**16))
    inbox.close()
    outbox.send(Kind.STEP, b"header", b"lost")
    outbox.close()
    never_bound = Outbox(tmp_path, "b")
    never_bound.send(Kind.STOP)
    never_bound.close()


def test_what_was_sent_before_the_end_arrives(tmp_path: Path):
    inbox = Inbox(tmp_path, "a")
    senders = [Outbox(tmp_path, "a") for _ in range(3)]
    for i, sender in enumerate(senders):
        sender.send(Kind.FAILED, bytes([i]), bytes(5000))
        sender.close()
    assert sorted(message.header for _ in senders if (message := inbox.receive(5))) == [b"\0", b"\1", b"\2"]
    assert inbox.receive(0.01) is None
    inbox.close()


def test_results_round_trip():
    result = StepResult(step_id=11, token_ids={7: [42, 3]}, logits={7: [b"\0\1", b"\2"]})
    assert unpack_result(pack_result(result)) == result
