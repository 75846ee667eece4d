"""What a plan says of how far its estimate may be off."""

from dataclasses import replace

import pytest
from planned import cluster, cpu, llama, workload
from rich.console import Console

from apportion.catalog.cluster_text import parse_devices
from apportion.catalog.datasheet import PUBLISHED_SPREAD
from apportion.cli.render import print_plan
from apportion.planner.build import make_plan
from apportion.planner.plan_file import parse_plan, plan_json
from apportion.planner.verify.plan import verify
from apportion.types.cluster import ASSUMED_SPREAD, Device, Spread

FITTED = Spread(decode=0.05, prefill=0.5, source="calibrated from 9 runs")


def planned(*devices: Device):
    return make_plan(llama(), cluster(devices), workload(), ("fp32",))


def test_the_least_certain_device_in_use_decides():
    fitted = replace(cpu("a", 3), spread=FITTED)
    plan = planned(fitted, cpu("b", 3))
    assert len(plan.device_ids) == 2
    seen = plan.estimate.uncertainty
    assert (seen.ttft, seen.tpot, seen.source) == (0.5, 0.3, ASSUMED_SPREAD.source)
    total_s = workload().output_tokens / plan.estimate.tokens_per_s
    decode_s = (workload().output_tokens - 1) * plan.estimate.tpot_s
    assert seen.tokens_per_s == pytest.approx((decode_s * 0.3 + (total_s - decode_s) * 0.5) / total_s)
    assert planned(replace(cpu("a", 9), spread=FITTED)).estimate.uncertainty.source == FITTED.source


def test_it_is_in_the_file_and_in_the_output_and_nowhere_a_fact():
    plan = planned(replace(cpu("a", 9), spread=FITTED))
    assert parse_plan(plan_json(plan), "p") == plan
    console = Console(width=200, record=True, file=None)
    print_plan(console, plan)
    shown = console.export_text()
    assert "±50%" in shown
    assert "decode" in shown
    assert "±5%" in shown
    assert FITTED.source in shown
    certain = planned(cpu("a", 9))
    assert plan.certificate == certain.certificate
    assert plan.stages == certain.stages


def test_verify_recomputes_it():
    plan = planned(cpu("a", 9))
    claimed = replace(plan.estimate.uncertainty, tpot=0.01)
    checks = verify(replace(plan, estimate=replace(plan.estimate, uncertainty=claimed)))
    assert [check.name for check in checks if not check.ok] == ["estimate"]


def test_cards_of_the_catalogue_are_as_certain_as_published_speeds_show():
    card = parse_devices("tower: rtx-4090", lambda _: []).devices[0]
    assert card.spread == PUBLISHED_SPREAD
    assert planned(card).estimate.uncertainty.tpot == PUBLISHED_SPREAD.decode
