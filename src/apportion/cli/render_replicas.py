"""A plan of several replicas as tables, in 80 to 100 columns."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apportion.cli.render import print_division, print_plan
from apportion.types.plan import Plan
from apportion.types.replicated import ReplicatedPlan
from apportion.types.units import format_seconds


def print_replicas(console: Console, plan: ReplicatedPlan) -> None:
    if len(plan.replicas) == 1:
        print_plan(console, plan.replicas[0])
    else:
        _print_several(console, plan)
    certificate = plan.certificate
    asked = "any number of" if plan.num_asked is None else str(plan.num_asked)
    console.print(
        f"certificate: {1 / certificate.value:.1f} tokens/s with all sequences running, {asked} replicas make no more "
        f"than {1 / certificate.lower_bound:.1f}, gap {certificate.gap:.2%}"
    )
    console.print(f"  by {escape(certificate.method)}")
    if plan.constraints.statement:
        console.print(f"  of all plans with {escape(plan.constraints.statement)}")


def _print_several(console: Console, plan: ReplicatedPlan) -> None:
    workload = plan.workload
    console.print(
        f"[bold]{escape(plan.model.name)}[/]: {len(plan.replicas)} replicas on {len(plan.device_ids)} of "
        f"{len(plan.cluster.devices)} devices"
    )
    chosen = f" of at most {workload.most_sequences}" if workload.most_sequences else ""
    console.print(
        f"{workload.concurrency}{chosen} × {workload.max_context_tokens} tokens of context, prompts of "
        f"{workload.prompt_tokens} and outputs of {workload.output_tokens}"
    )
    console.print(_overview(plan))
    for index, replica in enumerate(plan.replicas):
        console.print(f"[bold]replica {index}[/]")
        print_division(console, replica)
    if len({_formats(replica) for replica in plan.replicas}) > 1:
        console.print("replicas differ in their formats: which one serves a request shows in its text")
    if any(plan.cluster.device(device_id).emulated for device_id in plan.device_ids):
        console.print("* emulated: slowed down on purpose, its figures are no real device's")


def _overview(plan: ReplicatedPlan) -> Table:
    table = Table(title="Replicas", title_justify="left")
    table.add_column("replica")
    table.add_column("devices")
    for column in ("stages", "sequences", "TTFT", "TPOT", "tokens/s"):
        table.add_column(column, justify="right")
    for number, replica in enumerate(plan.replicas):
        figures = replica.estimate
        table.add_row(
            str(number),
            escape("\n".join(replica.device_ids)),
            str(len(replica.stages)),
            str(replica.workload.concurrency),
            format_seconds(figures.ttft_s),
            format_seconds(figures.tpot_s),
            f"{figures.tokens_per_s:.1f}",
            end_section=True,
        )
    means = (format_seconds(plan.ttft_s), format_seconds(plan.tpot_s), f"{plan.tokens_per_s:.1f}")
    table.add_row("together", "", "", str(plan.workload.concurrency), *means)
    return table


def _formats(plan: Plan) -> tuple[tuple[str, ...], str, str]:
    return plan.weight_formats_in_use, plan.activation_format, plan.kv_format
