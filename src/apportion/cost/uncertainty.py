"""How far an estimate may be off: shown beside its figures, and used for nothing else."""

from collections.abc import Sequence

from apportion.types.cluster import Cluster
from apportion.types.plan import Stage, Uncertainty


def uncertainty(cluster: Cluster, stages: Sequence[Stage], prefill_part: float) -> Uncertainty:
    """`prefill_part` of the whole time is prefill's, the rest decode's; errors are taken to go the same way."""
    spreads = [cluster.device(device_id).spread for stage in stages for device_id in stage.split.device_ids]
    widest = max(spreads, key=lambda spread: spread.decode)
    prefill = max(spread.prefill for spread in spreads)
    return Uncertainty(
        ttft=prefill,
        tpot=widest.decode,
        tokens_per_s=prefill_part * prefill + (1 - prefill_part) * widest.decode,
        source=widest.source,
    )
