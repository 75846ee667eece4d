"""Several pipelines of one model on disjoint devices, with the sequences shared out among them."""

from collections.abc import Callable
from dataclasses import dataclass

from apportion.types.cluster import Cluster
from apportion.types.constraints import UNCONSTRAINED, Constraints
from apportion.types.model import ModelSpec
from apportion.types.plan import Certificate, Plan
from apportion.types.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicatedPlan:
    """Each replica is a plan of its own, for its part of the cluster and of the sequences, with its own coordinator on
    the host of its first device. `certificate` is over every choice of disjoint devices and of their sequences; its
    seconds are per output token of all replicas together."""

    version: int
    cluster: Cluster
    workload: Workload
    """Of all replicas together."""
    num_asked: int | None
    """Replicas that were asked for; None where the planner chose their number."""
    replicas: tuple[Plan, ...]
    certificate: Certificate
    constraints: Constraints = UNCONSTRAINED
    """Of all replicas together; each has them for its own part of the cluster."""

    @property
    def model(self) -> ModelSpec:
        return self.replicas[0].model

    @property
    def device_ids(self) -> tuple[str, ...]:
        """Devices in use, replica by replica."""
        return tuple(device_id for replica in self.replicas for device_id in replica.device_ids)

    @property
    def tokens_per_s(self) -> float:
        return sum(replica.estimate.tokens_per_s for replica in self.replicas)

    @property
    def ttft_s(self) -> float:
        """Mean over all sequences."""
        return self._mean(lambda replica: replica.estimate.ttft_s)

    @property
    def tpot_s(self) -> float:
        """Mean over all sequences."""
        return self._mean(lambda replica: replica.estimate.tpot_s)

    def _mean(self, figure: Callable[[Plan], float]) -> float:
        sequences = [replica.workload.concurrency for replica in self.replicas]
        total = sum(count * figure(one) for count, one in zip(sequences, self.replicas, strict=True))
        return total / sum(sequences)
