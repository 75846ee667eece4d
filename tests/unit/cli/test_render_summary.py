"""The one screen of a plan: what it says, in how many lines and columns, and what it leaves to `--details`."""

from dataclasses import replace
from math import isclose

import pytest
from planned import cluster, cpu, llama, workload
from rich.console import Console

from apportion.cli.render import print_plan
from apportion.cli.render_summary import proven_percent
from apportion.planner.build import make_plan
from apportion.types.plan import Certificate
from apportion.types.units import format_seconds, spoken_seconds, three_digits

THREE = [cpu("old", 2.2, 0.5), cpu("desk", 2.2), cpu("laptop", 2.2)]


def planned(*devices, demand=None):
    return make_plan(llama(), cluster(devices), demand or workload(), ("fp32",))


def shown(plan, *, details=False):
    console = Console(width=80, record=True, file=None)
    print_plan(console, plan, details=details)
    return console.export_text()


def row(text, name):
    """What stands beside `name`, over all its lines."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(name))
    stop = next((i for i in range(start + 1, len(lines)) if not lines[i].startswith("  ")), len(lines))
    return " ".join(" ".join(lines[start:stop]).split())


@pytest.mark.parametrize("demand", [workload(), workload("throughput", 8), workload("latency", 8, 1024)])
def test_it_is_one_screen(demand):
    text = shown(planned(*THREE, demand=demand))
    lines = text.rstrip().splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    for name in ("decode", "first token", "how sure", "limited by", "would help", "Proven"):
        assert any(line.startswith(name) for line in lines), name


def test_what_only_specialists_ask_for_is_in_the_details():
    plan = planned(cpu("a", 3, host="x"), cpu("b", 3, host="y"))
    special = ("ε", "KV cache: ", "chunks", "microbatch", "FFN", "gap", "TTFT", "TPOT")
    assert not [word for word in special if word in shown(plan)]
    everything = shown(plan, details=True)
    assert [word for word in special[:6] if word not in everything] == []
    assert max(map(len, everything.splitlines())) <= 80


def test_one_stage_has_no_balance():
    plan = planned(cpu("only", 20))
    assert "ε" not in shown(plan, details=True)
    assert "most of it on" not in shown(plan)


def test_decode_is_shown_apart_from_the_prompt():
    """Of one request alone: its rate is one over the time per token, as published figures have it."""
    plan = planned(cpu("only", 20))
    text = shown(plan)
    assert row(text, "decode").startswith(f"decode {three_digits(1 / plan.estimate.tpot_s)} tokens/s")
    assert f"after {spoken_seconds(plan.estimate.ttft_s)} with a prompt of 512" in row(text, "first token")
    whole_s = plan.estimate.ttft_s + 127 * plan.estimate.tpot_s
    assert f"{spoken_seconds(whole_s)} for 128 tokens" in row(text, "whole answer")


def test_many_at_once_are_shown_beside_one_alone():
    """A token of each of 8 takes longer than a token of one alone, and 8 together make more tokens/s."""
    plan = planned(cpu("only", 20), demand=workload("throughput", 8, 1024))
    alone = planned(cpu("only", 20), demand=workload("latency", 1, 1024))
    text = shown(plan)
    lines = text.splitlines()
    together = next(i for i, line in enumerate(lines) if line.startswith("8 at once"))
    one = next(i for i, line in enumerate(lines) if line.startswith("decode"))
    assert together < one  # what was asked for comes first
    assert three_digits(8 / plan.estimate.tpot_s) in lines[together]
    assert isclose(alone.estimate.tpot_s, 1 / float(lines[one].split()[1]), rel_tol=6e-3)


def test_headroom_is_what_is_left_of_each_device():
    plan = planned(*THREE)
    lines = shown(plan).splitlines()
    for device_id in plan.device_ids:
        line = next(line for line in lines if line.startswith(device_id))
        memory, device = plan.memory[device_id], plan.cluster.device(device_id)
        free = (device.memory_bytes - memory.total_bytes) / 2**20
        assert f"{free:.1f} MiB" in line or f"{free / 1024:.1f} GiB" in line


def test_devices_that_are_left_out_are_named():
    tiny = replace(cpu("tiny", 0.01), step_overhead_s=1.0)
    assert row(shown(planned(cpu("only", 20), tiny)), "not used").startswith("not used tiny; --why")


def test_members_that_are_alike_share_a_line():
    cards = [
        replace(cpu(f"card-{number}", 20), layer_overhead_s=0.0, host_cores=None) for number in range(1, 9)
    ]
    fast = cluster(cards)
    links = tuple(replace(link, latency_s=0.0, bytes_per_s=1e15) for link in fast.links)
    plan = make_plan(llama(), replace(fast, links=links), workload(), ("fp32",))
    assert len(plan.stages) == 1
    assert plan.stages[0].split.size == 8
    text = shown(plan)
    assert "…8, each" in text
    assert len(text.splitlines()) <= 20


@pytest.mark.parametrize(
    ("gap", "percent"),
    [(0.0, "0.00 %"), (4e-10, "0.00 %"), (1.2e-5, "0.01 %"), (0.00121, "0.13 %"), (0.06, "6.00 %")],
)  # fmt: skip
def test_what_is_proven_is_never_rounded_down(gap, percent):
    certificate = Certificate(objective="latency", value=1 + gap, lower_bound=1.0, gap=gap, method="m")
    assert proven_percent(certificate) == percent


@pytest.mark.parametrize(
    ("seconds", "exact", "spoken"),
    [
        (3719.0, "62.0 min", "62.0 min"),
        (9000.0, "2.5 h", "2.50 h"),
        (119.0, "119.00 s", "119 s"),
        (4.049, "4.05 s", "4.05 s"),
        (0.84884, "848.84 ms", "849 ms"),
        (0.0252, "25.20 ms", "25.2 ms"),
        (3.1e-5, "31.0 µs", "31.0 µs"),
        (0.0, "0.0 µs", "0 µs"),
    ],
)
def test_times_have_a_unit_that_people_use(seconds, exact, spoken):
    assert (format_seconds(seconds), spoken_seconds(seconds)) == (exact, spoken)


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0.000268889, "0.000269"), (0.475, "0.475"), (39.66, "39.7"), (603.2, "603"), (12345.0, "12,345"), (0, "0")],
)  # fmt: skip
def test_a_small_rate_is_not_nothing(rate, text):
    assert three_digits(rate) == text
