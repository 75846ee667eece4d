"""What any implementation of `transport/protocol.py` must do; each of CHECKS takes a function that makes its links.

In the manner of trio's `testing/_check_streams.py`: every check makes links of its own.
"""

import hashlib
import multiprocessing
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from apportion.transport.protocol import Inbox, Message, Outbox
from apportion.transport.wire import Kind

LARGE_BYTES = 24 * 2**20
SOON_S = 20.0


@dataclass(frozen=True)
class Made:
    """An inbox, and a function that opens an outbox to it, in another process too (it is pickled)."""

    inbox: Inbox
    connect: Callable[[], Outbox]


Make = Callable[[], Made]


def take(inbox: Inbox) -> Message:
    message = inbox.receive(SOON_S)
    assert message is not None
    return message


def check_order_and_counts(make: Make) -> None:
    """From empty payloads to large ones, of two senders at once, each in order and whole."""
    made = make()
    sizes = [0, 1, 700, 4096, 5000, 70_000, 0, LARGE_BYTES, 3]
    outboxes = [made.connect() for _ in range(2)]

    def send(number: int) -> None:
        for index, size in enumerate(sizes):
            outboxes[number].send(Kind.STEP, bytes([number, index]), bytes([number + index]) * size)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    seen: dict[int, list[int]] = {0: [], 1: []}
    for _ in range(2 * len(sizes)):
        message = take(made.inbox)
        number, index = message.header
        assert message.kind is Kind.STEP
        assert message.payload == bytes([number + index]) * sizes[index]
        seen[number].append(index)
    assert seen == {0: list(range(len(sizes))), 1: list(range(len(sizes)))}
    for thread in threads:
        thread.join()
    assert [outbox.sent_bytes for outbox in outboxes] == [sum(sizes)] * 2
    assert made.inbox.receive(0.0) is None
    _close(made, *outboxes)


def check_generation_comes_with_every_message(make: Make) -> None:
    """That of its sender when it was sent, 0 before any is set."""
    made = make()
    outboxes = [made.connect() for _ in range(2)]
    for size in (0, LARGE_BYTES, 9):
        outboxes[0].send(Kind.STEP, b"", bytes(size))
        outboxes[0].generation += 1 + 2**30
    outboxes[1].send(Kind.STOP, b"other")
    found = [take(made.inbox) for _ in range(4)]
    assert [one.generation for one in found if one.header == b""] == [0, 1 + 2**30, 2 + 2**31]
    assert [one.generation for one in found if one.header == b"other"] == [0]
    _close(made, *outboxes)


def check_payload_is_the_senders_again(make: Make) -> None:
    made = make()
    outbox = made.connect()
    data = bytearray(LARGE_BYTES)
    for value in range(3):
        data[:] = bytes([value]) * LARGE_BYTES
        outbox.send(Kind.STEP, b"", memoryview(data))
    for value in range(3):
        payload = take(made.inbox).payload
        assert hashlib.sha256(payload).digest() == hashlib.sha256(bytes([value]) * LARGE_BYTES).digest()
    _close(made, outbox)


def check_a_slow_receiver_blocks_no_sender(make: Make) -> None:
    made = make()
    outbox = made.connect()
    begun_s = time.monotonic()
    for number in range(12):
        outbox.send(Kind.STEP, bytes([number]), bytes(2**20))
    assert time.monotonic() - begun_s < SOON_S / 2
    assert [take(made.inbox).header for _ in range(12)] == [bytes([number]) for number in range(12)]
    _close(made, outbox)


def check_what_was_sent_before_the_end_comes(make: Make) -> None:
    made = make()
    for number in range(3):
        outbox = made.connect()
        outbox.send(Kind.FAILED, bytes([number]), bytes(5000))
        outbox.close()
    assert sorted(take(made.inbox).header for _ in range(3)) == [b"\0", b"\1", b"\2"]
    assert made.inbox.receive(0.0) is None
    _close(made)


def check_a_receiver_that_is_gone_loses_messages_alone(make: Make) -> None:
    made = make()
    outbox, late = made.connect(), made.connect()
    outbox.send(Kind.STEP, b"before")
    made.inbox.close()
    for _ in range(20):
        outbox.send(Kind.STEP, b"after", bytes(2**16))
        late.send(Kind.STEP, b"after")
    outbox.close()
    late.close()


def check_a_sender_that_dies_disturbs_no_other(make: Make) -> None:
    """Killed while it writes: what comes of it is whole, and the others go on."""
    made = make()
    context = multiprocessing.get_context("spawn")
    victim = context.Process(target=_send_for_ever, args=(made.connect,), daemon=True)
    victim.start()
    for _ in range(3):
        assert take(made.inbox).header == b"victim"
    other = made.connect()
    victim.kill()
    victim.join()
    other.send(Kind.STEP, b"other", bytes(2**20))
    deadline_s = time.monotonic() + SOON_S
    while (message := take(made.inbox)).header != b"other":
        assert message.payload == bytes([7]) * LARGE_BYTES
        assert time.monotonic() < deadline_s
    assert message.payload == bytes(2**20)
    assert made.inbox.receive(0.05) is None
    _close(made, other)


def _send_for_ever(connect: Callable[[], Outbox]) -> None:
    outbox = connect()
    while True:
        outbox.send(Kind.STEP, b"victim", bytes([7]) * LARGE_BYTES)
        time.sleep(0.01)


def check_waits_end(make: Make) -> None:
    """After the time that was given, at once for a message, and when woken, also before the wait begins."""
    made = make()
    assert made.inbox.receive(0.0) is None
    begun_s = time.monotonic()
    assert made.inbox.receive(0.05) is None
    assert 0.04 < time.monotonic() - begun_s < SOON_S / 2
    made.inbox.wake()
    made.inbox.wake()
    assert made.inbox.receive(SOON_S) is None
    timer = threading.Timer(0.05, made.inbox.wake)
    timer.start()
    begun_s = time.monotonic()
    assert made.inbox.receive(SOON_S) is None
    assert time.monotonic() - begun_s < SOON_S / 2
    timer.join()
    outbox = made.connect()
    made.inbox.wake()
    outbox.send(Kind.STOP)
    while (message := made.inbox.receive(SOON_S)) is None:
        pass
    assert (message.kind, message.header, len(message.payload)) == (Kind.STOP, b"", 0)
    _close(made, outbox)


CHECKS: tuple[Callable[[Make], None], ...] = (
    check_order_and_counts,
    check_generation_comes_with_every_message,
    check_payload_is_the_senders_again,
    check_a_slow_receiver_blocks_no_sender,
    check_what_was_sent_before_the_end_comes,
    check_a_receiver_that_is_gone_loses_messages_alone,
    check_a_sender_that_dies_disturbs_no_other,
    check_waits_end,
)


def _close(made: Made, *outboxes: Any) -> None:
    for outbox in outboxes:
        outbox.close()
    made.inbox.close()
