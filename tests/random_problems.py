"""Random models, clusters and workloads of realistic proportions, each made from one seed."""

from dataclasses import dataclass
from itertools import combinations
from random import Random

from hand_model import device as hand_device

from apportion.cost.workspace import GPU_RUNTIME_BYTES
from apportion.planner.infeasible.error import whole_bytes
from apportion.planner.problem import chunk_candidates, make_problem
from apportion.types.cluster import Cluster, Device, Link
from apportion.types.model import LayerSpec, ModelSpec, Parameters
from apportion.types.workload import Workload

HOSTS = ("tower", "laptop", "office")


@dataclass(frozen=True)
class RandomProblem:
    model: ModelSpec
    cluster: Cluster
    workload: Workload
    weight_formats: tuple[str, ...]

    @property
    def parts(self):
        return self.model, self.cluster, self.workload, self.weight_formats


def random_problem(seed: int, max_devices: int = 4, max_layers: int = 24) -> RandomProblem:
    random = Random(seed)
    model = random_model(random, max_layers)
    workload = random_workload(random)
    chunk_tokens = chunk_candidates(workload.max_context_tokens)[-1]
    alone = make_problem(model, Cluster(devices=(), links=()), workload, ("bf16",), chunk_tokens)
    cluster = random_cluster(random, max_devices, whole_bytes(alone, hand_device("gpu", kind="cuda")))
    return RandomProblem(model, cluster, workload, ("bf16",))


def random_model(random: Random, max_layers: int) -> ModelSpec:
    hidden, ffn_columns = random.choice(
        [(1024, 4864), (2048, 5632), (2048, 8192), (4096, 11008), (4096, 14336)]
    )
    q_heads = hidden // 64
    kv_heads = random.choice([2, 4, 8])
    layer = LayerSpec(
        per_kv_head=Parameters(
            elements=hidden * 64 * (2 * q_heads // kv_heads + 2),
            rows=64 * (q_heads // kv_heads + 2),
            others=0,
        ),
        per_ffn_column=Parameters(elements=3 * hidden, rows=2, others=0),
        replicated=Parameters(elements=0, rows=2 * hidden, others=2 * hidden),
        window_tokens=None,
        num_experts=0,
        experts_per_token=0,
    )
    return ModelSpec(
        name="random",
        family="llama",
        fingerprint="",
        layers=(layer,) * random.randint(4, max_layers),
        hidden_size=hidden,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=64,
        ffn_columns=ffn_columns,
        vocab_rows=random.choice([32000, 128256]),
        tied_embeddings=random.random() < 0.5,
        max_context_tokens=8192,
        checkpoint_format="bf16",
    )


def random_workload(random: Random) -> Workload:
    context = random.choice([512, 2048, 8192])
    return Workload(
        prompt_tokens=random.choice([16, 128, context // 2]),
        output_tokens=random.choice([1, 32, context // 4]),
        concurrency=random.choice([1, 1, 2, 4, 8]),
        max_context_tokens=context,
        objective=random.choice(["latency", "throughput"]),
    )


def random_cluster(random: Random, max_devices: int, whole_bytes: int) -> Cluster:
    """Together 1.1 to 4 times the memory that the undivided model needs; some devices alike."""
    num_devices = random.randint(1, max_devices)
    hosts = [random.choice(HOSTS[: random.randint(1, 3)]) for _ in range(num_devices)]
    weights = [random.uniform(0.3, 1.0) for _ in range(num_devices)]
    room = whole_bytes * random.uniform(1.1, 4) / sum(weights)
    devices: list[Device] = []
    for number, host in enumerate(hosts):
        alike = random.random() < 0.3 and devices
        like = devices[-1] if alike else None
        devices.append(
            _device(random, f"d{number}", host, GPU_RUNTIME_BYTES + round(room * weights[number]), like)
        )
    inside_s, across_s = random.choice([1e-5, 1e-4]), random.choice([1e-4, 5e-4, 2e-3])
    links = [
        Link(src=host, dst=host, latency_s=inside_s, bytes_per_s=random.choice([1.5e9, 1.2e10, 5e10]))
        for host in sorted(set(hosts))
    ]
    links += [
        Link(src=a, dst=b, latency_s=across_s, bytes_per_s=random.choice([1.25e7, 1.25e8, 1.25e9]))
        for a, b in combinations(sorted(set(hosts)), 2)
        if random.random() < 0.9
    ]
    return Cluster(devices=tuple(devices), links=tuple(links))


def _device(random: Random, name: str, host: str, memory_bytes: int, like: Device | None) -> Device:
    slow = random.random() < 0.4
    return Device(
        id=name,
        host=host,
        kind="cpu" if slow else "cuda",
        torch_device="cpu" if slow else "cuda:0",
        memory_bytes=like.memory_bytes if like else memory_bytes,
        reserved_bytes=0,
        mem_bytes_per_s=like.mem_bytes_per_s
        if like
        else 10 ** random.uniform(*((10, 11) if slow else (11.3, 12.3))),
        flops_per_s=like.flops_per_s
        if like
        else {"bf16": 10 ** random.uniform(*((11, 12) if slow else (12.7, 14)))},
        layer_overhead_s=random.choice([0, 1e-4, 3e-4]) if like is None else like.layer_overhead_s,
        step_overhead_s=random.choice([0, 5e-4]) if like is None else like.step_overhead_s,
        num_threads=1,
        host_cores=None,
        speed=1.0,
        source="datasheet",
        host_bytes_per_s=(like.host_bytes_per_s if like else 10 ** random.uniform(10, 11.3))
        if slow
        else None,
    )
