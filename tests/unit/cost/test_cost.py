"""Every formula of the cost model against a number worked out by hand."""

from dataclasses import replace
from math import isclose

import pytest
from hand_model import CAPACITY, DECODE, LAYER, LINK, MODEL, device
from plans import CERTAIN

from apportion.cost.estimate import estimate, hop_timing, microbatch_steps, workload_steps
from apportion.cost.formats import Formats
from apportion.cost.group_step import group_step_s, stage_members, unsynchronised_step_s
from apportion.cost.memory import (
    parameters,
    read_bytes,
    shard_memory,
    stages_memory,
)
from apportion.cost.objective import Timing, goal
from apportion.cost.roofline import Step, attention_s, ffn_column_s, head_row_s, overlapped_s, prefill_steps
from apportion.cost.shard import stage_shards
from apportion.cost.statements import epsilon_s, model_parameters, pipeline, token_communication
from apportion.cost.traffic import reduction_s, run_link_bytes
from apportion.cost.workspace import (
    CPU_RUNTIME_BYTES,
    GPU_RUNTIME_BYTES,
    LAYER_RUNTIME_BYTES,
    SEQUENCE_MEMBER_BYTES,
    SEQUENCE_RUNTIME_BYTES,
    workspace_bytes,
)
from apportion.types.cluster import Cluster, Device
from apportion.types.model import ModelSpec
from apportion.types.plan import Balance, Certificate, Estimate, Plan, Stage, TensorSplit
from apportion.types.step_costs import even_costs
from apportion.types.workload import Workload


def stage(start: int, stop: int, ids: tuple[str, ...], kv_heads=(2,), ffn=(6,), rows=(10,)) -> Stage:
    return Stage(
        layer_start=start,
        layer_stop=stop,
        split=TensorSplit(
            device_ids=ids,
            q_heads=tuple(2 * heads for heads in kv_heads),
            kv_heads=kv_heads,
            ffn_columns=ffn,
            vocab_rows=rows,
        ),
        weight_format="fp32",
        activation_format="fp32",
        kv_format="fp32",
        has_embedding=start == 0,
        has_head=stop == 2,
    )


WHOLE = stage(0, 2, ("a",))
PAIR = stage(0, 2, ("a", "b"), (1, 1), (4, 2), (7, 3))
CLUSTER = Cluster(devices=(device("a"), device("b", 0.5)), links=(LINK,))
GPU = device("g", kind="cuda")
FP32 = Formats(weights="fp32", activations="fp32", kv="fp32")


def plan(stages: tuple[Stage, ...], model: ModelSpec = MODEL) -> Plan:
    return Plan(
        version=1,
        model=model,
        cluster=CLUSTER,
        workload=Workload(
            prompt_tokens=3, output_tokens=3, concurrency=1, max_context_tokens=8, objective="latency"
        ),
        weight_formats=("fp32",),
        stages=stages,
        memory={},
        block_tokens=4,
        num_kv_blocks=2,
        microbatches=1,
        chunk_tokens=4,
        estimate=Estimate(
            ttft_s=0, tpot_s=0, tokens_per_s=0, stage_s=(), link_s=(), bottleneck="", uncertainty=CERTAIN
        ),
        certificate=Certificate(objective="latency", value=1, lower_bound=1, gap=0, method=""),
        balance=Balance(epsilon_s=0, smallest_epsilon_s=0),
        step_costs=even_costs(len(stages)),
    )


def test_attended_positions_grow_to_the_window():
    chunk = Step(sequences=2, new_tokens=4, start_tokens=3, sampled_rows=0)
    assert chunk.attended(None) == 2 * (4 + 5 + 6 + 7)
    assert chunk.attended(5) == 2 * (4 + 5 + 5 + 5)
    assert chunk.attended(2) == 2 * (2 + 2 + 2 + 2)
    assert chunk.context_read(None) == 2 * 7
    assert (
        chunk.context_read(2) == 2 * 5
    )  # the first new token sees one before itself, the last is the fourth
    assert DECODE.attended(4) == DECODE.context_read(4) == 4


def test_prefill_is_cut_into_chunks_and_the_last_draws():
    steps = prefill_steps(10, 4)
    assert [(s.start_tokens, s.new_tokens, s.sampled_rows) for s in steps] == [
        (0, 4, 0),
        (4, 4, 0),
        (8, 2, 1),
    ]


def test_the_ridge_of_the_roofline_is_round():
    """3 s beside 4: 1 s beyond the half, squared, times 0.8 / 4."""
    for longer, shorter, seconds in ((4, 2, 4), (4, 3, 4.2), (4, 4, 4.8), (4, 0, 4), (0, 0, 0)):
        assert overlapped_s(longer, shorter) == overlapped_s(shorter, longer) == pytest.approx(seconds)


def test_attention_is_bound_by_memory_in_decode_and_by_arithmetic_in_prefill():
    # flops 2·(2·100·1 + 4·2·5·10) = 1200; bytes 4·(2·100 + 8 + 2·2·5·10) = 1632
    assert isclose(attention_s(device("a"), MODEL, LAYER, 2, DECODE, FP32), max(1.2, 1632 / 400))
    prefill = Step(sequences=1, new_tokens=10, start_tokens=0, sampled_rows=0)
    # flops 2·(2·100·10 + 4·2·5·55) = 8400
    assert isclose(attention_s(device("a"), MODEL, LAYER, 2, prefill, FP32), 8.4)


def test_ffn_reads_only_the_experts_that_are_touched():
    assert isclose(ffn_column_s(device("a"), LAYER, 1, FP32), 4 * 12 / 400)
    assert isclose(ffn_column_s(device("a"), LAYER, 100, FP32), 2 * 12 * 100 / 1000)
    moe = replace(LAYER, num_experts=4, experts_per_token=2)
    # two tokens: 1 − (1/2)² = 3/4 of the bytes, half of the flops
    assert isclose(ffn_column_s(device("a"), moe, 2, FP32), 4 * 12 * 0.75 / 400)
    assert isclose(ffn_column_s(device("a"), moe, 100, FP32), 2 * 12 * 0.5 * 100 / 1000)


def test_head_costs_only_where_a_token_is_drawn():
    assert head_row_s(device("a"), MODEL, 0, FP32) == 0
    assert isclose(head_row_s(device("a"), MODEL, 1, FP32), 4 * 4 / 400)


def test_reduction_is_a_direct_exchange():
    assert reduction_s(LINK, 3, 16) == 0.5 + 2 * 16 / 16


def test_a_group_waits_after_attention_and_after_the_ffn():
    members = stage_members(MODEL, CLUSTER, PAIR)
    attention = 4 * (100 + 8 + 2 * 5 * 10) / 200  # b, at half the speed: 4.16
    ffn = max(4 * 48 / 400, 2 * 48 / 200)
    head = max(7 * 16 / 400, 3 * 16 / 200)
    reduction = 0.5 + 16 / 16
    gather = 0.5 + 3 * 4 / 16
    expected = 2 * (attention + ffn + 0.25 + 2 * reduction) + reduction + head + gather
    assert isclose(group_step_s(MODEL, members, LINK, DECODE), expected)


def test_the_looser_form_lets_members_drift():
    # a is as fast at both; give b little attention... it still waits nowhere but at the end
    members = stage_members(MODEL, CLUSTER, PAIR)
    loose = unsynchronised_step_s(MODEL, members, DECODE)
    assert isclose(loose, 2 * (4.16 + 96 / 200 + 0.25) + 48 / 200)
    assert loose < group_step_s(MODEL, members, LINK, DECODE)


def test_parameters_are_exact():
    layers = 2 * (2 * 100 + 6 * 12 + 8)
    assert parameters(MODEL, WHOLE, 0) == layers + 10 * 4 + 4 == model_parameters(MODEL)
    untied = replace(MODEL, tied_embeddings=False)
    assert parameters(untied, WHOLE, 0) == layers + 2 * 40 + 4 == model_parameters(untied)
    assert parameters(MODEL, PAIR, 1) == 2 * (100 + 2 * 12 + 8) + 3 * 4 + 4
    assert parameters(MODEL, stage(0, 1, ("a",)), 0) == 280 + 40
    assert parameters(MODEL, stage(1, 2, ("a",)), 0) == 280 + 40 + 4
    assert read_bytes(MODEL, WHOLE, 0) == 2 * (layers + 44)


def test_device_memory_adds_up():
    cluster = replace(CLUSTER, devices=tuple(replace(one, reserved_bytes=7) for one in CLUSTER.devices))
    memory = stages_memory(MODEL, cluster, [PAIR], CAPACITY)["b"]
    assert memory.weights_bytes == 4 * (2 * 132 + 12 + 4)
    assert memory.kv_bytes == 8 * 2 * 2 * 5 * 1 * 4
    assert memory.buffer_bytes == 4 * (8192 + 4 * 8)
    later = stages_memory(MODEL, cluster, [stage(1, 2, ("b",))], CAPACITY)["b"]
    assert later.buffer_bytes == memory.buffer_bytes + 4 * 4 * 4 * 4
    assert memory.workspace_bytes > CPU_RUNTIME_BYTES
    assert memory.total_bytes == memory.engine_bytes + 7


EVERYWHERE_BYTES = GPU_RUNTIME_BYTES + 3 * 4 * 26 + 3 * 8 * 5
"""And a mask."""


def test_workspace_is_that_of_the_largest_part_of_a_step():
    """3 tokens of 4 bytes: hidden 4·4 + 2·5, heads 4·(4 + 2)·5, columns 3·6; 8 tokens of context and 2 sequences."""
    everywhere = EVERYWHERE_BYTES
    attention = 3 * 4 * 120 + 8 * 2 * 5 * 2 * 4
    drawing = 2 * 2 * 10 * 4
    ffn = 3 * 4 * 18
    assert attention == max(attention, drawing, ffn)
    assert workspace(WHOLE) == everywhere + attention
    assert workspace(WHOLE, tokens=3, vocab_rows=1000) == everywhere + 100 * drawing
    wide = replace(MODEL, ffn_columns=600)
    rounded_up = workspace(stage(0, 2, ("a",), ffn=(600,)), model=wide) - everywhere - 100 * ffn
    assert 0 <= rounded_up < 600


def workspace(
    stage: Stage,
    rank: int = 0,
    tokens: int = 3,
    vocab_rows: int = 10,
    model: ModelSpec = MODEL,
    device: Device = GPU,
    *,
    affine: bool = False,
) -> int:
    return workspace_bytes(
        replace(model, vocab_rows=vocab_rows),
        stage_shards(model, stage)[rank],
        device,
        step_tokens=tokens,
        context_tokens=8,
        sequences=2,
        affine=affine,
    )


def test_workspace_of_a_cpu_has_blocks_of_keys_instead_of_a_context():
    """6 rows, a token's 2 query heads of each KV head: 2·5 + 96 elements each, and 96 keys and values of 5, per thread;
    no more threads than the 2 KV heads. Of the 10 logits 2 rows, and 32 bytes each while one is drawn."""
    sequence = SEQUENCE_RUNTIME_BYTES + SEQUENCE_MEMBER_BYTES
    runtime = CPU_RUNTIME_BYTES + 2 * LAYER_RUNTIME_BYTES + 2 * sequence
    everywhere, attention = runtime + 3 * 4 * 26, 3 * 4 * 120
    per_thread = 4 * (6 * (2 * 5 + 96) + 96 * 2 * 5)
    for num_threads, used in ((1, 1), (2, 2), (16, 2)):
        cpu = replace(device("a"), num_threads=num_threads)
        assert workspace(WHOLE, device=cpu) == everywhere + attention + used * per_thread
        assert workspace(WHOLE, vocab_rows=1000, device=cpu) == everywhere + used * per_thread + 1000 * (
            2 * 4 + 32
        )


def test_workspace_of_a_member_is_that_of_its_shares():
    """Rank 0 gathers the whole vocabulary, and the others draw from their own rows; what the planner searches with is
    no less."""
    attention, ffn, row = 3 * 4 * 120 + 8 * 2 * 5 * 2 * 4, 3 * 4 * 24, 2 * 2 * 4
    for columns in range(1, 6):
        pair = stage(0, 2, ("a", "b"), (1, 1), (columns, 6 - columns), (7, 3))
        largest = (
            max(attention // 2, columns * ffn // 6, 10 * row),
            max(attention // 2, (6 - columns) * ffn // 6, 3 * row),
        )
        for rank in range(2):
            assert workspace(pair, rank) == EVERYWHERE_BYTES + largest[rank]
            assert workspace(pair, rank, affine=True) >= workspace(pair, rank)


def test_a_member_on_a_cpu_holds_the_slots_of_all():
    """Two of each member, as large as the largest message: 3 tokens of 4 numbers, or 2 rows of logits."""
    cpu = replace(device("a"), kind="cpu")
    pair = stage(0, 2, ("a", "b"), (1, 1), (3, 3), (5, 5))
    inner = replace(pair, has_head=False)
    logits_bytes = workspace(pair, 1, device=cpu) - workspace(inner, 1, device=cpu)
    assert logits_bytes == 2 * 2 * (4 * 2 * 10 - 4 * 3 * 4)
    many = workspace(pair, 1, vocab_rows=10**6, device=cpu) - workspace(inner, 1, device=cpu)
    assert many == 2 * 2 * (2**16 - 4 * 3 * 4)


def test_bytes_on_every_link():
    two_stages = plan((stage(0, 1, ("a",)), stage(1, 2, ("b",))))
    # 3 + 2 and 1 + 3 tokens, less the last of each: 4 + 3 are processed
    assert run_link_bytes(two_stages, [3, 1], [2, 3]) == {
        ("a", "b"): 16 * 7,
    }
    assert run_link_bytes(plan((PAIR,)), [3], [2]) == {
        ("a", "b"): (2 * 2 + 1) * 16 * 4,
        ("b", "a"): (2 * 2 + 1) * 16 * 4 + 3 * 4 * 2,
    }


def test_the_samples_of_a_prompt_draw_their_first_tokens_from_one_row():
    """Each then processes one token and draws from its own row: 3 + 2 tokens, 1 + 2 rows of the member's 3."""
    sampled = run_link_bytes(plan((PAIR,)), [3], [2, 2], further_samples=1)
    assert sampled["b", "a"] == (2 * 2 + 1) * 16 * 5 + 3 * 4 * 3


def test_wide_norms_are_reduced_too():
    olmo = replace(MODEL, family="olmo2")
    extra = (
        run_link_bytes(plan((PAIR,), olmo), [1], [1])["a", "b"]
        - run_link_bytes(plan((PAIR,)), [1], [1])["a", "b"]
    )
    assert extra == 2 * 2 * 4


def test_communication_of_a_token():
    token = token_communication(plan((PAIR,)))
    assert (token.messages, token.payload_bytes) == (2 * 5, 2 * 5 * 16)
    hop = token_communication(plan((stage(0, 1, ("a",)), stage(1, 2, ("b",)))))
    assert (hop.messages, hop.payload_bytes) == (1, 16)


def test_hops_to_a_group_share_the_link():
    workload = Workload(
        prompt_tokens=3, output_tokens=1, concurrency=1, max_context_tokens=8, objective="latency"
    )
    timing = hop_timing(MODEL, LINK, 2, workload_steps(workload, 2, 1), "fp32")
    assert timing == Timing(
        prefill_s=(0.5 + 2 * 2 * 16 / 16) + (0.5 + 2 * 16 / 16), decode_s=0.5 + 2 * 16 / 16
    )


def test_latency_is_a_pipelined_prefill_and_the_tokens_after_it():
    workload = Workload(
        prompt_tokens=8, output_tokens=5, concurrency=1, max_context_tokens=64, objective="latency"
    )
    timings = [Timing(prefill_s=6.0, decode_s=1.0), Timing(prefill_s=4.0, decode_s=2.0)]
    # two chunks of 3 and 2 s: 5 + (2−1)·3, then four tokens of 3 s
    assert goal(workload, 4, 1).value(timings) == 5 + 3 + 4 * 3


def test_throughput_is_the_busiest_stage_or_the_longest_path():
    workload = Workload(
        prompt_tokens=8, output_tokens=5, concurrency=4, max_context_tokens=64, objective="throughput"
    )
    timings = [Timing(prefill_s=6.0, decode_s=1.0), Timing(prefill_s=4.0, decode_s=2.0)]
    # Two chunks a prompt. Of the five tokens two, or three, come with a chunk of the other three prompts.
    busy_s, path_s = max(4 * 6 + 5 * 2 * 1, 4 * 4 + 5 * 2 * 2), 10 * (1 + 2) / 2 + 15
    assert goal(workload, 4, 2).value(timings) == max(busy_s, path_s) / 20
    assert goal(workload, 4, 1).value([*timings] * 9) == 9 * (10 * (1 + 3) / 2 + 15) / 20


def test_a_chunk_takes_the_place_of_a_part_of_a_decode_step():
    """Nine sequences in a microbatch: of the others half decode while one is prefilled, in every second batch."""
    workload = Workload(
        prompt_tokens=8, output_tokens=5, concurrency=9, max_context_tokens=64, objective="throughput"
    )
    steps = microbatch_steps(workload, 4, 1)
    assert [step.tokens for step in steps.prefill] == [4 + 2, 4 + 2]
    assert [step.sampled_rows for step in steps.prefill] == [2, 1 + 2]
    timing = Timing(prefill_s=6.0, decode_s=1.0)
    # 18 chunks take over 36 of the 45 tokens; all five of a sequence's come with one.
    busy_s, path_s = 9 * 6 + (5 - 4) * 1, 3 * 6 + (5 - 5 * 2 / 9) * 1
    assert goal(workload, 4, 1).value([timing]) == busy_s / 45
    assert isclose(goal(workload, 4, 1).value([timing] * 4), 4 * path_s / 45)
    assert [step.tokens for step in microbatch_steps(replace(workload, output_tokens=1), 4, 1).prefill] == [
        4,
        4,
    ]


def test_estimate_of_one_device():
    workload = Workload(
        prompt_tokens=2, output_tokens=3, concurrency=2, max_context_tokens=8, objective="latency"
    )
    cluster = replace(CLUSTER, devices=(device("a"),))
    seen = estimate(MODEL, cluster, workload, (WHOLE,), chunk_tokens=4, microbatches=2)
    decode = Step(sequences=1, new_tokens=1, start_tokens=2, sampled_rows=1)
    prefill = Step(sequences=1, new_tokens=2, start_tokens=0, sampled_rows=1)
    members = stage_members(MODEL, cluster, WHOLE)
    step_s = group_step_s(MODEL, members, None, decode)
    chunk_s = group_step_s(MODEL, members, None, prefill)
    ends_s = (0.5 + 8 / 16) + (0.5 + 4 / 16)
    assert isclose(seen.tpot_s, 2 * step_s)  # two microbatches, and the device is the bottleneck
    assert isclose(seen.ttft_s, ends_s + chunk_s + 0.5 * chunk_s)  # the second waits for the first
    assert isclose(seen.tokens_per_s, 6 / (ends_s + 2 * chunk_s + 2 * seen.tpot_s))
    assert seen.stage_s == (step_s,)
    assert seen.link_s == ()
    assert seen.bottleneck == "stage 0 (a)"


def test_memory_is_affine_in_the_shares():
    """The planner computes what fits from four corners."""

    def size(heads: int, columns: int, rows: int) -> int:
        shard = replace(stage_shards(MODEL, PAIR)[1], kv_heads=heads, ffn_columns=columns, vocab_rows=rows)
        return shard_memory(MODEL, shard, CAPACITY, device("a")).engine_bytes

    nothing = size(0, 0, 0)
    each = [size(*corner) - nothing for corner in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    for shares in ((2, 6, 10), (1, 3, 4), (2, 0, 7)):
        assert size(*shares) == nothing + sum(n * e for n, e in zip(shares, each, strict=True))


def test_balance_and_pipeline_statements():
    assert epsilon_s([1.0, 2.0, 6.0]) == 3.0
    seen = pipeline([1.0, 0.5, 2.0], 2, 4)
    assert (seen.makespan_s, seen.microbatches_per_s) == (3.5 + 3 * 2, 4 / 9.5)
    assert seen.stage_executions_per_s == 4 * 2 / 2


@pytest.mark.parametrize("name", ["mem_bytes_per_s", "flops_per_s"])
def test_a_faster_device_is_never_slower(name):
    slow, fast = device("a", 0.5), device("a")
    changed = replace(slow, **{name: getattr(fast, name)})
    for step in (*prefill_steps(20, 8), DECODE):
        a = group_step_s(MODEL, [(slow, stage_members(MODEL, CLUSTER, WHOLE)[0][1])], None, step)
        b = group_step_s(MODEL, [(changed, stage_members(MODEL, CLUSTER, WHOLE)[0][1])], None, step)
        assert b <= a


def test_a_step_adds_its_own_overhead_once():
    step = Step(sequences=1, new_tokens=1, start_tokens=3, sampled_rows=1)
    members = stage_members(MODEL, CLUSTER, WHOLE)
    slower = [(replace(one, step_overhead_s=0.5), shard) for one, shard in members]
    assert isclose(group_step_s(MODEL, slower, None, step), group_step_s(MODEL, members, None, step) + 0.5)
