"""What a worker tells of itself when it is ready and when it stops."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """`sent_bytes` counts tensor bytes by receiving device; `busy_s` is wall time in steps."""

    device_id: str
    parameters: int
    read_bytes: int
    peak_bytes: int
    busy_s: float
    num_steps: int
    sent_bytes: dict[str, int]
