"""A plan as one screen for people: what goes where, whether it fits, how fast, how sure, what limits it, what would
help. In 80 columns, plain words first."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import ceil, inf

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apportion.cli.assumed import assumptions
from apportion.cli.executing import executing_engines
from apportion.cli.render_communication import balance_said
from apportion.cost.estimate import plan_estimate
from apportion.planner.explain.limits import Hint, Limit, hints, limits
from apportion.types.cluster import Device
from apportion.types.plan import Certificate, Estimate, Plan, Stage, Uncertainty
from apportion.types.units import format_bytes, spoken_seconds, three_digits

_MOST_HINTS = 2
_SECOND_PART = 0.2
"""Of the time, from which the second limit is named too."""
SPEED = "tokens/s with the prompts' time"
"""What tables have: all output over all time, unlike "decode" of the first screen."""
NONE = "0.00 %"
_SAME_MEMBERS = 3
"""Members of a group with equal shares are one row from this many on."""


def print_summary(console: Console, plan: Plan, *, more: Sequence[str] = ()) -> None:
    """`more` are options that show more."""
    console.print(_headline(plan))
    console.print(f"{_proven(plan)}\n", highlight=False)
    console.print(device_table(plan))
    console.print(_figure_table(plan))
    for line in assumptions(plan):
        console.print(escape(line), highlight=False)
    if any(plan.cluster.device(device_id).emulated for device_id in plan.device_ids):
        console.print("* emulated: slowed down on purpose, its figures are no real device's")
    if more:
        console.print(f"more: {', '.join(more)}", highlight=False)


def _headline(plan: Plan) -> str:
    workload = plan.workload
    devices = f"{len(plan.device_ids)} of {counted(len(plan.cluster.devices), 'device', 's')}"
    room = f"{workload.concurrency} × {workload.max_context_tokens:,} tokens"
    if workload.kv_tokens is not None:
        tokens = plan.num_kv_blocks * plan.block_tokens
        room = f"{tokens:,} tokens of KV cache, shared by {counted(workload.concurrency, 'sequence', 's')}"
    name = f"[bold]{escape(plan.model.name)}[/] in {', '.join(plan.weight_formats_in_use)}"
    streamed_bytes = sum(memory.streamed_bytes for memory in plan.memory.values())
    if streamed_bytes:
        return (
            f"{name} does not fit on {devices} whole: {format_bytes(streamed_bytes)} of it stay in host memory and are"
            f" read there in every step, with room for {room}."
        )
    return f"{name} fits on {devices}, with room for {room}."


def _proven(plan: Plan) -> str:
    what = "division of these devices"
    certificate = plan.certificate
    if certificate.fewest_devices is not None:
        what = f"division on {counted(len(plan.device_ids), 'device', 's')}"
    if plan.constraints.statement:
        what += f" with {escape(plan.constraints.statement)}"
    if plan.workload.balance is not None:
        what += f" with stages within {balance_said(plan.workload.balance)} of their mean time"
    if plan.workload.objective == "communication":
        percent = proven_percent(certificate)
        return (
            f"Proven: no {what} takes {'less' if percent == NONE else f'over {percent} less'} time on links."
        )
    percent = proven_percent(certificate)
    text = f"Proven: no {what} is {'faster' if percent == NONE else f'more than {percent} faster'}"
    fewest = certificate.fewest_devices
    if fewest is None:
        return f"{text}."
    used = len(plan.device_ids)
    return f"{text}, and {_fewer(fewest.number, used)}."


def _fewer(proven: int, used: int) -> str:
    if proven == used:
        return "fewer devices would not do" if used > 1 else "one is the fewest there can be"
    return f"fewer than {proven} would not do ({proven} to {used - 1} were tried in vain)"


def proven_percent(certificate: Certificate) -> str:
    """Rounded up to a hundredth: what is proven may not look better than it is. Less than a ten thousandth is what
    floating-point sums differ by."""
    return f"{max(0, ceil(certificate.gap * 1e4 - 0.01)) / 100:.2f} %"


def device_table(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    mixed = len(plan.weight_formats_in_use) > 1
    table.add_column("device", overflow="fold")
    table.add_column("holds", no_wrap=True)
    for name in (*(["weights"] if mixed else []), "uses", "of", "free", _step_name(plan)):
        table.add_column(name, justify="right", no_wrap=True)
    for number, stage, ranks in _rows(plan):
        device = plan.cluster.device(stage.split.device_ids[ranks.start])
        memory = plan.memory[device.id]
        sizes = (memory.total_bytes, device.memory_bytes, device.memory_bytes - memory.total_bytes)
        table.add_row(
            _names(stage, ranks, device),
            _holds(plan, stage, ranks),
            *([stage.weight_format] if mixed else []),
            *(format_bytes(size) for size in sizes),
            spoken_seconds(plan.estimate.stage_s[number]) if ranks.start == 0 else "",
        )
    return table


def _step_name(plan: Plan) -> str:
    return "per token" if plan.workload.concurrency == 1 else "per step"


def _rows(plan: Plan) -> Iterator[tuple[int, Stage, range]]:
    """(stage number, stage, ranks): a device each, or the members of a group that are alike."""
    for number, stage in enumerate(plan.stages):
        start = 0
        while start < stage.split.size:
            stop = start + 1
            while stop < stage.split.size and _alike(plan, stage, start, stop):
                stop += 1
            if stop - start < _SAME_MEMBERS:
                stop = start + 1
            yield number, stage, range(start, stop)
            start = stop


def _alike(plan: Plan, stage: Stage, one: int, other: int) -> bool:
    ids = stage.split.device_ids
    sizes = [(plan.memory[ids[rank]], plan.cluster.device(ids[rank]).memory_bytes) for rank in (one, other)]
    return sizes[0] == sizes[1]


def _names(stage: Stage, ranks: range, device: Device) -> str:
    if len(ranks) == 1:
        return device_name(device)
    last = stage.split.device_ids[ranks[-1]]
    number = last.removeprefix(device.id.rstrip("0123456789"))
    return escape(f"{device.id}…{number if number.isdecimal() else last}, each")


def _holds(plan: Plan, stage: Stage, ranks: range) -> str:
    layers = f"layers {stage.layer_start}–{stage.layer_stop - 1}"
    if stage.num_layers == 1:
        layers = f"layer {stage.layer_start}"
    elif stage.num_layers == plan.model.num_layers:
        layers = f"all {stage.num_layers} layers"
    if stage.split.size == 1:
        return layers
    held = [_weights_bytes(plan, device_id) for device_id in stage.split.device_ids]
    if stage.num_layers == plan.model.num_layers:
        layers = "every layer"
    return f"{held[ranks.start] / sum(held):.0%} of {layers}"


def _weights_bytes(plan: Plan, device_id: str) -> int:
    memory = plan.memory[device_id]
    return memory.weights_bytes + memory.streamed_bytes


def _figure_table(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("", "")
    for name, text in _figures(plan):
        table.add_row(f"[bold]{name}[/]", escape(text))
    return table


def _figures(plan: Plan) -> Iterator[tuple[str, str]]:
    yield from _asked(plan)
    yield from _speeds(plan)
    engines = executing_engines(plan)
    if engines is not None:
        yield "runs on", engines
    yield "how sure", _sure(plan.estimate.uncertainty)
    yield "limited by", _limited(plan, limits(plan))
    yield from _streamed(plan)
    unused = [device.id for device in plan.cluster.devices if device.id not in plan.device_ids]
    if unused:
        yield "not used", f"{listed(unused)}; --why shows what each would add"
    if plan.not_joined:
        yield "not joined", _not_joined(plan)
    helpful = hints(plan)[:_MOST_HINTS]
    yield (
        "would help",
        _helpful(helpful) if helpful else "nothing simple; --why tries other devices and links",
    )


def _not_joined(plan: Plan) -> str:
    """Which devices no link reaches, and what to add."""
    cluster = plan.cluster
    home = cluster.device(plan.device_ids[0]).host
    away = dict.fromkeys(cluster.device(name).host for name in plan.not_joined)
    missing = f"link {home}-{next(iter(away))} 1Gbit 0.3ms" if len(away) == 1 else "link 1Gbit 0.3ms"
    return (
        f"{listed(list(plan.not_joined))}: no link from {listed(list(away))} to {home}, so they cannot work together;"
        f" with a network between them add its figures, as in '{missing}'"
    )


def _asked(plan: Plan) -> Iterator[tuple[str, str]]:
    """The rate and limits that the plan keeps."""
    workload = plan.workload
    parts = [] if workload.arrival_rate is None else [f"{workload.arrival_rate:g} requests/s"]
    for name, limit in (("first token", workload.ttft_limit_s), ("token", workload.tpot_limit_s)):
        if limit is not None:
            parts.append(f"a {name} within {spoken_seconds(limit)}")
    if not parts:
        return
    most = f", at most {workload.most_sequences}" if workload.most_sequences else ""
    yield "keeps", f"{', '.join(parts)}, with {workload.concurrency} at once{most}"


def _speeds(plan: Plan) -> Iterator[tuple[str, str]]:
    workload, spread = plan.workload, plan.estimate.uncertainty
    alone, together = _alone(plan), plan.estimate
    if workload.concurrency > 1 and workload.objective != "latency":
        yield from _together(plan, together)
    one = " for one request alone" if workload.concurrency > 1 else ""
    yield (
        "decode",
        f"{_rate(1 / alone.tpot_s)}{one} ({spoken_seconds(alone.tpot_s)} a token), ±{spread.tpot:.0%}",
    )
    prompt, output = workload.prompt_tokens, workload.output_tokens
    yield (
        "first token",
        f"after {spoken_seconds(alone.ttft_s)} with a prompt of {prompt} ({_rate(prompt / alone.ttft_s)} prefill), "
        f"±{spread.ttft:.0%}",
    )
    if workload.concurrency > 1 and workload.objective == "latency":
        yield from _together(plan, together)
    if workload.concurrency == 1:
        yield (
            "whole answer",
            f"{spoken_seconds(output / alone.tokens_per_s)} for {counted(output, 'token', 's')}, prompt included "
            f"({_rate(alone.tokens_per_s)}), ±{spread.tokens_per_s:.0%}",
        )


def _together(plan: Plan, estimate: Estimate) -> Iterator[tuple[str, str]]:
    workload, spread = plan.workload, estimate.uncertainty
    decode = workload.concurrency / estimate.tpot_s
    yield (
        f"{workload.concurrency} at once",
        f"{_rate(decode)} decode in all ({three_digits(1 / estimate.tpot_s)} each), ±{spread.tpot:.0%}",
    )
    yield "", f"{_rate(estimate.tokens_per_s)} with the prompts' time, ±{spread.tokens_per_s:.0%}"
    yield "", f"first tokens after {spoken_seconds(estimate.ttft_s)} on average, ±{spread.ttft:.0%}"


def _alone(plan: Plan) -> Estimate:
    """Of one request by itself in this division."""
    workload = replace(plan.workload, concurrency=1)
    return plan_estimate(replace(plan, workload=workload, microbatches=1))


def _rate(per_second: float) -> str:
    return f"{three_digits(per_second)} tokens/s"


def _sure(spread: Uncertainty) -> str:
    word = next(
        word for most, word in ((0.1, "well"), (0.25, "fairly"), (inf, "roughly")) if spread.tpot <= most
    )
    return f"{word}: two runs in three come within the ±; {spread.source}"


def _limited(plan: Plan, found: Sequence[Limit]) -> str:
    first, second = found[:2]
    text = f"{first.work}, {first.part:.0%} of the time"
    if first.device_ids and len(plan.stages) > 1:
        text += f", most of it on {listed(first.device_ids)}"
    return f"{text}; {second.work}, {second.part:.0%}" if second.part >= _SECOND_PART else text


def _streamed(plan: Plan) -> Iterator[tuple[str, str]]:
    for stage in plan.stages:
        for device_id in stage.split.device_ids if stage.streamed_layers else ():
            device, size = plan.cluster.device(device_id), plan.memory[device_id].streamed_bytes
            where = "a disk" if device.reads_disk else "host memory"
            yield (
                "streamed",
                f"{device_id} reads {len(stage.streamed_layers)} of its {stage.num_layers} layers "
                f"({format_bytes(size)}) from {where} in every step",
            )


def _helpful(found: tuple[Hint, ...]) -> str:
    return "; ".join(f"{hint.change}: {hint.factor:.2g}× as fast or more" for hint in found)


def listed(names: Sequence[str], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def counted(number: int, noun: str, plural: str) -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"


def device_name(device: Device) -> str:
    return escape(f"{device.id} *{device.speed:g}" if device.emulated else device.id)
