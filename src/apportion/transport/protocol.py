"""What the coordinator and the workers ask of their links, whatever carries them.

`tests/transport/conformance.py` holds an implementation against this.
"""

from typing import NamedTuple, Protocol

from apportion.transport.wire import Kind


class Message(NamedTuple):
    """`payload` is valid until the inbox is asked for the next message. `sent_s` is the sender's `time.perf_counter`,
    None where that is not the receiver's clock. What belongs to an older `generation` than the receiver's is stale."""

    kind: Kind
    generation: int
    header: bytes
    payload: memoryview
    sent_s: float | None


class Inbox(Protocol):
    """Receives from any number of senders. Messages of one sender come whole, once, and in order; those that it sent
    before it ended still come. A sender that ends in the middle of one, or sends what is none, disturbs no other."""

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """The next message; None after `timeout_s` without one, or once woken."""
        ...

    def wake(self) -> None:
        """Ends a wait in `receive`, or the next one, from any thread."""
        ...

    def close(self) -> None: ...


class Outbox(Protocol):
    """Sends to one inbox. It waits for no receiver: what goes to one that is gone is lost, and others tell of that."""

    generation: int
    """Of what is sent from now on: how many plans the run had before; 0 to begin with."""

    @property
    def sent_bytes(self) -> int:
        """Of all payloads so far."""
        ...

    def send(self, kind: Kind, header: bytes = b"", payload: bytes | memoryview = b"") -> None:
        """The payload is the caller's again when this returns."""
        ...

    def close(self) -> None: ...
