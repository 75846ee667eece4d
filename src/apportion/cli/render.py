"""Plans and checks as tables that read without colour, in 80 columns."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apportion.cli.render_communication import spread_line
from apportion.cli.render_streams import print_streams
from apportion.cli.render_summary import counted, device_name, print_summary
from apportion.planner.verify.check import Check
from apportion.types.cluster import Device
from apportion.types.plan import FewestDevices, Plan, Stage
from apportion.types.units import format_bytes, format_seconds


def print_plan(console: Console, plan: Plan, *, details: bool = False, more: Sequence[str] = ()) -> None:
    """One screen that is read from top to bottom, and beneath it all else that the plan states; `more` are options that
    show more."""
    print_summary(console, plan, more=more)
    if details:
        print_details(console, plan)


def print_details(console: Console, plan: Plan) -> None:
    workload, certificate = plan.workload, plan.certificate
    print_division(console, plan)
    console.print(spread_line(plan))
    if len(plan.stages) > 1:
        console.print(
            f"balance: stage times lie within ε = {format_seconds(plan.balance.epsilon_s)} of their mean, smallest "
            f"reachable {format_seconds(plan.balance.smallest_epsilon_s)}"
        )
    console.print(
        f"sizes: {workload.concurrency} × {workload.max_context_tokens} tokens of context, prefill chunks of "
        f"{plan.chunk_tokens}, {counted(plan.microbatches, 'microbatch', 'es')}"
    )
    console.print(f"slowest in decode: {escape(plan.estimate.bottleneck)}")
    console.print(
        f"certificate: {_objective(plan)} {format_seconds(certificate.value)}, no plan below "
        f"{format_seconds(certificate.lower_bound)}, gap {certificate.gap:.2%}"
    )
    console.print(f"  by {escape(certificate.method)}")
    if plan.constraints.statement:
        console.print(f"  of all plans with {escape(plan.constraints.statement)}")
    if certificate.fewest_devices is not None:
        console.print(_fewest(certificate.fewest_devices, len(plan.device_ids)))


def _kv_cache(plan: Plan) -> str:
    """Its size, and which stage limits it by how much."""
    workload, tokens = plan.workload, plan.num_kv_blocks * plan.block_tokens
    share = tokens / (workload.concurrency * workload.max_context_tokens)
    text = (
        f"KV cache: {plan.num_kv_blocks} blocks of {plan.block_tokens} = {tokens} tokens in {plan.kv_format}"
    )
    if workload.kv_tokens is not None:
        text += f", {share:.0%} of {workload.concurrency} × {workload.max_context_tokens}"
    least, *others = sorted(range(len(plan.stages)), key=lambda number: plan.kv_rooms[number].spare_blocks)
    room = plan.kv_rooms[least]
    text += f"; memory for {counted(room.spare_blocks, 'block', 's')} more on {escape(room.device_id)}, which limits it"
    if others:
        next_room = plan.kv_rooms[others[0]]
        text += f", for {next_room.spare_blocks} on {escape(next_room.device_id)}"
    return text


def print_division(console: Console, plan: Plan) -> None:
    console.print(_share_table(plan))
    console.print(_memory_table(plan))
    print_streams(console, plan)
    if plan.kv_rooms:
        console.print(_kv_cache(plan))


def _objective(plan: Plan) -> str:
    """What the certificate's seconds are of."""
    if plan.workload.objective == "fewest-devices":
        return f"time per output token with as few devices as {len(plan.device_ids)}"
    if plan.workload.objective == "communication":
        return "communication of a decode step"
    return plan.workload.objective


def _fewest(proven: FewestDevices, used: int) -> str:
    if proven.number == used:
        return f"fewer than {used} would not do: {proven.method}"
    return (
        f"{proven.number} to {used - 1} devices were searched in vain but are not excluded; {proven.method}"
    )


def _members(plan: Plan) -> Iterator[tuple[int, Stage, int, Device]]:
    """(stage number, stage, rank, device) of every device in use."""
    for number, stage in enumerate(plan.stages):
        for rank, device_id in enumerate(stage.split.device_ids):
            yield number, stage, rank, plan.cluster.device(device_id)


def _share_table(plan: Plan) -> Table:
    table = Table(title="Division", title_justify="left")
    table.add_column("device")
    several = len(plan.weight_formats_in_use) > 1
    columns = ("stage", *(("weights",) if several else ()), "layers", "KV heads", "FFN columns", "step")
    for column in columns:
        table.add_column(column, justify="right")
    for number, stage, rank, device in _members(plan):
        table.add_row(
            device_name(device),
            str(number),
            *((stage.weight_format,) if several else ()),
            f"{stage.layer_start}–{stage.layer_stop - 1}",
            _share(stage.split.kv_heads, rank),
            _share(stage.split.ffn_columns, rank),
            format_seconds(plan.estimate.stage_s[number]) if rank == 0 else "",
            end_section=rank == stage.split.size - 1,
        )
    return table


def _share(shares: Sequence[int], rank: int) -> str:
    return f"{shares[rank]}/{sum(shares)}"


def _memory_table(plan: Plan) -> Table:
    table = Table(title="Memory", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("device", overflow="fold")
    streams = any(memory.streamed_bytes for memory in plan.memory.values())
    for column in (
        "weights",
        "KV",
        "workspace",
        "reserved",
        "of",
        "free",
        *(["streamed"] if streams else []),
    ):
        table.add_column(column, justify="right")
    for _, _, _, device in _members(plan):
        memory = plan.memory[device.id]
        sizes = (
            memory.weights_bytes,
            memory.kv_bytes,
            memory.workspace_bytes + memory.buffer_bytes + memory.stream_buffer_bytes,
            memory.reserved_bytes,
            device.memory_bytes,
            device.memory_bytes - memory.total_bytes,
            *([memory.streamed_bytes] if streams else []),
        )
        table.add_row(device_name(device), *(format_bytes(size) for size in sizes))
    return table


def print_checks(console: Console, checks: Sequence[Check]) -> None:
    table = Table(show_header=False)
    for column in ("", "check", "statement"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row("ok" if check.ok else "FAILED", check.name, escape(check.statement))
    console.print(table)
