"""A division of one model among devices: the only thing that passes from planning to running."""

from dataclasses import dataclass

from apportion.types.cluster import Cluster
from apportion.types.constraints import UNCONSTRAINED, Constraints
from apportion.types.model import ModelSpec
from apportion.types.step_costs import StepCosts
from apportion.types.workload import Workload

PLAN_VERSION = 5


def most_step_tokens(chunk_tokens: int, sequences: int) -> int:
    """In one microbatch: whoever is not being prefilled decodes beside the chunk."""
    return chunk_tokens + sequences - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSplit:
    """The integer shares of a stage's members, in rank order; each tuple sums to the whole of its axis.

    A pipeline stage on one device is a split of one. Member `rank` holds the units
    `[sum(shares[:rank]), sum(shares[:rank + 1]))`.
    """

    device_ids: tuple[str, ...]
    q_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    ffn_columns: tuple[int, ...]
    vocab_rows: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.device_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Layers `[layer_start, layer_stop)` on the members of `split`."""

    layer_start: int
    layer_stop: int
    split: TensorSplit
    weight_format: str
    activation_format: str
    """Of hidden states and of reductions inside the group; the same in all stages of a plan."""
    kv_format: str
    """Of the KV cache; the same in all stages of a plan."""
    has_embedding: bool
    has_head: bool
    streamed_layers: tuple[int, ...] = ()
    """Layers of the stage whose weights stay in host memory and are brought to the device in every step."""

    @property
    def num_layers(self) -> int:
        return self.layer_stop - self.layer_start


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Planned bytes of one device; `total_bytes` may not exceed its `memory_bytes`."""

    weights_bytes: int
    kv_bytes: int
    workspace_bytes: int
    buffer_bytes: int
    reserved_bytes: int
    stream_buffer_bytes: int = 0
    """Where streamed layers' weights arrive."""
    streamed_bytes: int = 0
    """Weights of the streamed layers, in the stage's format. They take host memory (pinned for a GPU, the page cache of
    the checkpoint's files for a CPU), none of the device's."""
    swap_bytes: int = 0
    """Host memory for swapped blocks, none of the device's."""

    @property
    def engine_bytes(self) -> int:
        """What the engine will allocate."""
        held_bytes = self.weights_bytes + self.stream_buffer_bytes + self.kv_bytes
        return held_bytes + self.workspace_bytes + self.buffer_bytes

    @property
    def total_bytes(self) -> int:
        return self.engine_bytes + self.reserved_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class KvRoom:
    """What a stage would hold beyond the plan's KV blocks: `device_id` is the member that is full first."""

    device_id: str
    spare_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncertainty:
    """Relative standard deviations to expect of an estimate's figures: those of the least certain device in use."""

    ttft: float
    tpot: float
    tokens_per_s: float
    source: str
    """Where the least certain device's decode times are known from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Predicted speed. `stage_s` are decode times of one microbatch, `link_s` those of its hops (one fewer)."""

    ttft_s: float
    tpot_s: float
    tokens_per_s: float
    stage_s: tuple[float, ...]
    link_s: tuple[float, ...]
    bottleneck: str
    uncertainty: Uncertainty


@dataclass(frozen=True, slots=True, kw_only=True)
class FewestDevices:
    """Proven: fewer than `number` devices would not do."""

    number: int
    method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """`value` of the objective in seconds, and a proven `lower_bound` on that of any plan; gap = value/bound − 1."""

    objective: str
    value: float
    lower_bound: float
    gap: float
    method: str
    fewest_devices: FewestDevices | None = None
    """Where as few devices as possible were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """`epsilon_s` = max over stages |t − mean(t)|, and the smallest any layer allocation to these stages reaches."""

    epsilon_s: float
    smallest_epsilon_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    version: int
    model: ModelSpec
    cluster: Cluster
    workload: Workload
    weight_formats: tuple[str, ...]
    """Those allowed, widest first; each stage has the one that is best for it."""
    stages: tuple[Stage, ...]
    memory: dict[str, DeviceMemory]
    block_tokens: int
    num_kv_blocks: int
    microbatches: int
    chunk_tokens: int
    """Most prompt tokens in one microbatch, beside the tokens of the sequences that decode in it."""
    estimate: Estimate
    certificate: Certificate
    balance: Balance
    step_costs: StepCosts
    """What the scheduler of a run weighs by."""
    num_swap_blocks: int = 0
    """Blocks that every device can swap to its host's memory."""
    kv_rooms: tuple[KvRoom, ...] = ()
    """By stage; the least of them limits the KV cache of all."""
    constraints: Constraints = UNCONSTRAINED
    """What the division was held to, and what its certificate is relative to."""
    not_joined: tuple[str, ...] = ()
    """Devices that are not in use, on hosts without a link to any that is."""

    @property
    def step_tokens(self) -> int:
        """Most tokens in one microbatch, which the workspace is sized for."""
        return most_step_tokens(self.chunk_tokens, self.workload.concurrency)

    @property
    def weight_formats_in_use(self) -> tuple[str, ...]:
        """In stage order."""
        return tuple(dict.fromkeys(stage.weight_format for stage in self.stages))

    @property
    def activation_format(self) -> str:
        return self.stages[0].activation_format

    @property
    def kv_format(self) -> str:
        return self.stages[0].kv_format

    @property
    def max_in_flight(self) -> int:
        """Batches on their way at once: with one more than stages, none of these waits for the coordinator."""
        return max(self.microbatches, len(self.stages) + 1)

    @property
    def device_ids(self) -> tuple[str, ...]:
        """Devices in use, in stage and rank order."""
        return tuple(device_id for stage in self.stages for device_id in stage.split.device_ids)
