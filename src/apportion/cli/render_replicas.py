"""A plan of several replicas as tables, in 80 to 100 columns."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apportion.cli.assumed import assumptions
from apportion.cli.render import print_division, print_plan
from apportion.cli.render_summary import device_table, listed, proven_percent
from apportion.types.plan import Plan
from apportion.types.replicated import ReplicatedPlan
from apportion.types.units import spoken_seconds, three_digits


def print_replicas(
    console: Console, plan: ReplicatedPlan, *, details: bool = False, more: bool = True
) -> None:
    certificate = plan.certificate
    constrained = plan.constraints.statement
    asked = "number of replicas" if plan.num_asked is None else f"division into {plan.num_asked}"
    asked += f" with {escape(constrained)}" if constrained else ""
    proven = (
        f"Proven: no {asked} on these devices makes more than {proven_percent(certificate)} more tokens/s "
        "with all sequences running."
    )
    if len(plan.replicas) == 1:
        print_plan(console, plan.replicas[0], details=details)
        console.print(proven, highlight=False)
    else:
        _print_several(console, plan, proven, details=details)
    if more and not details:
        console.print("more: --details, --plot plan.svg", highlight=False)
    if details:
        console.print(
            f"certificate of the replicas: {three_digits(1 / certificate.value)} tokens/s, none make more than "
            f"{three_digits(1 / certificate.lower_bound)}, gap {certificate.gap:.2%}"
        )
        console.print(f"  by {escape(certificate.method)}")
        if constrained:
            console.print(f"  of all plans with {escape(constrained)}")


def _print_several(console: Console, plan: ReplicatedPlan, proven: str, *, details: bool) -> None:
    workload = plan.workload
    chosen = f" of at most {workload.most_sequences}" if workload.most_sequences else ""
    console.print(
        f"[bold]{escape(plan.model.name)}[/] fits as {len(plan.replicas)} replicas on {len(plan.device_ids)} of "
        f"{len(plan.cluster.devices)} devices, with room for {workload.concurrency}{chosen} × "
        f"{workload.max_context_tokens:,} tokens."
    )
    console.print(f"{proven}\n", highlight=False)
    console.print(_overview(plan))
    for index, replica in enumerate(plan.replicas):
        console.print(f"\n[bold]replica {index}[/], {', '.join(replica.weight_formats_in_use)}")
        console.print(device_table(replica))
        if details:
            print_division(console, replica)
    console.print(
        f"\nprompts of {workload.prompt_tokens} tokens and outputs of {workload.output_tokens}; tokens/s count "
        "the prompts' time, a token's time does not"
    )
    if len({_formats(replica) for replica in plan.replicas}) > 1:
        console.print("replicas differ in their formats: which one serves a request shows in its text")
    for line in assumptions(plan):
        console.print(escape(line), highlight=False)
    if any(plan.cluster.device(device_id).emulated for device_id in plan.device_ids):
        console.print("* emulated: slowed down on purpose, its figures are no real device's")


def _overview(plan: ReplicatedPlan) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("replica")
    table.add_column("devices")
    for column in ("stages", "at once", "first token", "a token", "tokens/s"):
        table.add_column(column, justify="right")
    for number, replica in enumerate(plan.replicas):
        figures = replica.estimate
        table.add_row(
            str(number),
            escape(listed(replica.device_ids)),
            str(len(replica.stages)),
            str(replica.workload.concurrency),
            spoken_seconds(figures.ttft_s),
            spoken_seconds(figures.tpot_s),
            three_digits(figures.tokens_per_s),
        )
    means = (spoken_seconds(plan.ttft_s), spoken_seconds(plan.tpot_s), three_digits(plan.tokens_per_s))
    table.add_row("together", "", "", str(plan.workload.concurrency), *means)
    return table


def _formats(plan: Plan) -> tuple[tuple[str, ...], str, str]:
    return plan.weight_formats_in_use, plan.activation_format, plan.kv_format
