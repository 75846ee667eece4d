"""Time of one hop between two stages on one host, from before the send until the hidden states are a tensor in the
next worker: by way and message size, on an idle machine and with a computing process on every core beside."""

import json
import multiprocessing
import os
import struct
import tempfile
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import median
from typing import Any

import torch
import zmq

from apportion.transport.links import Inbox, Outbox
from apportion.transport.protocol import Message
from apportion.transport.tensors import tensor_bytes, tensor_from_bytes
from apportion.transport.wire import Kind

SIZES = {"decode": (16, 1024), "prefill": (256, 1024)}
MESSAGES = 150
HEADER = bytes(500)


class ZmqInbox:
    def __init__(self, run_dir: Path, name: str) -> None:
        self._socket = zmq.Context.instance().socket(zmq.PULL)
        self._socket.bind(f"ipc://{run_dir}/{name}")

    def receive(self, _timeout_s: float) -> Message:
        kind, header, payload, sent = self._socket.recv_multipart()
        return Message(Kind(kind), 0, header, memoryview(payload), *struct.unpack("<d", sent))


class ZmqOutbox:
    def __init__(self, run_dir: Path, name: str) -> None:
        self._socket = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.connect(f"ipc://{run_dir}/{name}")

    def send(self, kind: Kind, header: bytes, payload: memoryview) -> None:
        self._socket.send_multipart([kind.value, header, payload, struct.pack("<d", time.perf_counter())])

    def close(self) -> None:
        self._socket.close()


WAYS: dict[str, tuple[Any, Any]] = {"zmq": (ZmqInbox, ZmqOutbox), "direct": (Inbox, Outbox)}


def pin(rank: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)


def compute(seconds: float) -> None:
    stop_s = time.perf_counter() + seconds
    a = torch.ones(256, 256)
    while time.perf_counter() < stop_s:
        a @ a


def first(way: str, run_dir: Path, shape: tuple[int, int], ready: Event, busy: bool) -> None:
    """Sends a microbatch and computes the next, as a stage of a full pipeline does; else waits."""
    outbox = WAYS[way][1](run_dir, "second")
    pin(0)
    ready.wait()
    hidden_TD = torch.randn(shape)
    for _ in range(MESSAGES):
        outbox.send(Kind.STEP, HEADER, tensor_bytes(hidden_TD))
        compute(0.004) if busy else time.sleep(0.004)
    outbox.close()
    time.sleep(1)


def second(way: str, run_dir: Path, ready: Event, results: Any) -> None:
    """Waits for each message: the time from its send to the tensor is the hop's."""
    inbox = WAYS[way][0](run_dir, "second")
    pin(1)
    ready.set()
    seconds = []
    for _ in range(MESSAGES):
        message = inbox.receive(20)
        tensor_from_bytes(message.payload, torch.float32, (-1, 1024))
        seconds.append(time.perf_counter() - message.sent_s)
    results.put(sorted(seconds[20:]))


def load(rank: int, stop: Event) -> None:
    pin(rank)
    while not stop.is_set():
        compute(0.01)


def hop_s(way: str, shape: tuple[int, int], others: int, busy: bool) -> tuple[float, float]:
    """(median, nine tenths) over messages."""
    context = multiprocessing.get_context("fork")
    results, ready, stop = context.Queue(), context.Event(), context.Event()
    with tempfile.TemporaryDirectory() as run_dir:
        place = (way, Path(run_dir))
        loads = [context.Process(target=load, args=(rank, stop)) for rank in range(others)]
        members = [
            context.Process(target=second, args=(*place, ready, results)),
            context.Process(target=first, args=(*place, shape, ready, busy)),
        ]
        for process in (*loads, *members):
            process.start()
        seconds = results.get()
        stop.set()
        for process in (*loads, *members):
            process.join()
    return median(seconds), seconds[len(seconds) * 9 // 10]


def main() -> None:
    rows = []
    for load_name, others, busy in (
        ("idle", 0, False),
        ("sender computes", 0, True),
        ("all cores busy", 2, True),
    ):
        for phase, shape in SIZES.items():
            for way in WAYS:
                middle, high = hop_s(way, shape, others, busy)
                print(
                    f"{load_name:16} {phase:8} {way:6} {middle * 1e6:7.0f} µs, nine tenths {high * 1e6:7.0f}"
                )
                rows.append(
                    {"load": load_name, "phase": phase, "way": way, "median_s": middle, "p90_s": high}
                )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
