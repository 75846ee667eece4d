"""Messages between coordinator and workers: frames [kind, msgpack header, tensor bytes, time sent]; never pickle.

A step's header is its ScheduledBatch (see transport/batches.py), which travels from stage to stage; between stages the
hidden states come with it.
"""

from enum import Enum
from typing import Any

import msgpack

from apportion.types.request import StepResult


class Kind(Enum):
    LOAD = b"load"
    """Coordinator -> worker: leave the place held so far and take this one; header: a WorkerPlace, or None for none."""
    STEP = b"step"
    """Coordinator -> first stage -> ... -> last stage: a batch, from the second stage on with its hidden states."""
    REPORT = b"report"
    """Coordinator -> worker: report and go on."""
    REPORTED = b"reported"
    """Worker -> coordinator: the answer to REPORT; header: a WorkerReport."""
    ASK = b"ask"
    """Coordinator -> worker: give a sign of life."""
    HERE = b"here"
    """Worker -> coordinator: once it listens, and as the answer to ASK; header: its device's id."""
    STOP = b"stop"
    """Coordinator -> worker: report and exit."""
    READY = b"ready"
    """Worker -> coordinator: the stage is loaded; header: a WorkerReport."""
    RESULT = b"result"
    """Last stage -> coordinator; header: a StepResult."""
    FAILED = b"failed"
    """Worker -> coordinator: header names the error; the worker exits."""
    STOPPED = b"stopped"
    """Worker -> coordinator: the answer to STOP; header: a WorkerReport."""


def pack(header: Any) -> bytes:
    data = msgpack.packb(header)
    assert data is not None
    return data


def unpack(data: bytes) -> Any:
    return msgpack.unpackb(data, strict_map_key=False)


def pack_result(result: StepResult) -> bytes:
    return pack((result.step_id, result.token_ids, result.logits))


def unpack_result(data: bytes) -> StepResult:
    step_id, token_ids, logits = unpack(data)
    return StepResult(step_id=step_id, token_ids=token_ids, logits=logits)
