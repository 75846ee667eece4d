import json
from dataclasses import replace

import pytest
from command import small_model
from planned import cluster, cpu, llama, workload

import apportion
from apportion.catalog.cluster_rules import (
    ASSUMED_LATENCY_S,
    HOP_S,
    INTRA_HOST_BYTES_PER_S,
    INTRA_HOST_LATENCY_S,
)
from apportion.catalog.cluster_text import parse_devices
from apportion.cli.main import exit_code
from apportion.cost.kv_capacity import with_most_kv
from apportion.planner.build import make_plan
from apportion.planner.explain.whatif import Changes, LinkChange, changed_cluster, what_if
from apportion.planner.explain.whatif_reasons import Figure, figures, reasons
from apportion.planner.plan_file import parse_plan, plan_json, write_plan
from apportion.types.errors import ClusterError, InfeasibleError, PlanError, UsageError

TOWER, LAPTOP = cpu("card", 3, 1.0, host="tower"), cpu("chip", 3, 0.8, host="laptop")


@pytest.fixture(scope="module")
def plan():
    return make_plan(llama(), cluster([TOWER, LAPTOP]), workload("throughput", 2), ("fp32",))


@pytest.fixture
def plan_file(plan, tmp_path):
    file = tmp_path / "plan.json"
    write_plan(plan, file)
    return str(file)


def by_name(before, after):
    return {figure.name: figure for figure in figures(before, after)}


def test_nothing_changed_is_the_same_plan(plan):
    after = what_if(plan, Changes())
    assert plan_json(after) == plan_json(plan)
    assert all(figure.change == 0 for figure in figures(plan, after))
    assert reasons(plan, after) == (f"the bottleneck is still {plan.estimate.bottleneck}",)


def test_a_cache_that_was_filled_up_is_filled_up_again():
    """As by --kv-tokens max: the same plan again, and with a longer context as many tokens as that takes at least."""
    least = replace(workload("throughput", 2), kv_tokens=2048)
    before = with_most_kv(make_plan(llama(), cluster([TOWER, LAPTOP]), least, ("fp32",)))
    assert before.num_kv_blocks * before.block_tokens > 2048
    assert plan_json(what_if(before, Changes())) == plan_json(before)
    longer = what_if(before, Changes(context_tokens=4096))
    assert longer.workload.kv_tokens == 4096
    assert min(room.spare_blocks for room in longer.kv_rooms) == 0


def test_without_a_device(plan):
    assert set(plan.device_ids) == {"card", "chip"}
    after = what_if(plan, Changes(remove=("chip",), weight_formats=("bf16",)))
    assert after.device_ids == ("card",)
    layers = next(stage for stage in plan.stages if "chip" in stage.split.device_ids)
    assert (
        f"chip is gone: it held layers {layers.layer_start}–{layers.layer_stop - 1}, heads 8/8, which others take"
        in reasons(plan, after)
    )


def test_with_another_device(plan):
    after = what_if(plan, Changes(add=(cpu("new", 20, 4.0, host="tower"),)))
    assert "new" in after.device_ids
    assert after.certificate.value < plan.certificate.value
    assert any(reason.startswith("new is new: holds layers") for reason in reasons(plan, after))
    useless = what_if(plan, Changes(add=(cpu("old", 3, 0.01, host="tower"),)))
    assert "old is new: no better plan uses it" in reasons(plan, useless)


def test_a_faster_link_saves_what_a_hop_takes(plan):
    after = what_if(plan, Changes(links=(LinkChange(name="laptop-tower", bytes_per_s=1.25e9),)))
    (before_s,), (after_s,) = plan.estimate.link_s, after.estimate.link_s
    sequences = -(-2 // plan.microbatches)
    assert before_s - after_s == pytest.approx(sequences * 2048 * 4 * (1 / 1.25e8 - 1 / 1.25e9))
    assert [link.latency_s for link in after.cluster.links] == [link.latency_s for link in plan.cluster.links]


def test_links_are_named_by_host_or_by_device(plan):
    for name in ("tower-laptop", "laptop-tower", "card-chip", "chip-card"):
        changed = changed_cluster(plan.cluster, Changes(links=(LinkChange(name=name, bytes_per_s=7.0),)))
        assert [link.bytes_per_s for link in changed.links if link.src != link.dst] == [7.0]
    inside = changed_cluster(plan.cluster, Changes(links=(LinkChange(name="tower-tower", bytes_per_s=7.0),)))
    assert [(link.src, link.dst) for link in inside.links if link.bytes_per_s == 7] == [("tower", "tower")]


def test_context_and_concurrency_multiply_the_kv_cache(plan):
    after = what_if(plan, Changes(context_tokens=1024, concurrency=3))
    figure = by_name(plan, after)["KV cache"]
    assert figure.change == pytest.approx(3 * 1024 / (2 * 2048) - 1)
    assert "the KV cache has room for 3072 tokens instead of 4096: 3 × 1024 of context" in reasons(
        plan, after
    )


def test_half_the_weights_in_bf16(plan):
    after = what_if(plan, Changes(weight_formats=("bf16",)))
    assert after.stages[0].weight_format == "bf16"
    assert by_name(plan, after)["weights"].change == pytest.approx(-0.5, abs=1e-3)  # norms stay in fp32
    assert by_name(plan, after)["KV cache"].change == -0.5  # as narrow as the weights
    wide = what_if(plan, Changes(weight_formats=("bf16",), kv_format="fp32"))
    assert by_name(plan, wide)["KV cache"].change == 0
    assert "weights take 0.5× the bytes: bf16 instead of fp32" in reasons(plan, after)


def test_a_smaller_chunk_is_explained(plan):
    smaller = replace(plan, chunk_tokens=plan.chunk_tokens // 2)
    chunks = f"chunks of {smaller.chunk_tokens} instead of {plan.chunk_tokens}"
    assert f"prompts go in {chunks}: the best that fit" in reasons(plan, smaller)
    assert any(reason.startswith("a prompt of 512 tokens spends ") for reason in reasons(plan, smaller))


def test_relative_change():
    assert Figure(name="", unit="s", before=2, after=3).change == 0.5
    assert Figure(name="", unit="s", before=0, after=0).change == 0
    assert Figure(name="", unit="s", before=0, after=3).change is None


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (Changes(remove=("x",)), ClusterError, "no device 'x' to remove; devices: card, chip"),
        (Changes(remove=("card", "chip")), ClusterError, "all 2 devices are removed"),
        (Changes(add=(TOWER,)), ClusterError, "there is a device 'card' already"),
        (
            Changes(links=(LinkChange(name="a-b", bytes_per_s=1.0),)),
            ClusterError,
            "no link 'a-b'; links: tower-tower, laptop-laptop, laptop-tower",
        ),
        (Changes(context_tokens=9000), UsageError, "--context 9000 is more than llama's 8192"),
        (Changes(context_tokens=600), UsageError, "do not fit in --context 600; give at least 640"),
        (Changes(weight_formats=("fp16",)), ClusterError, "has no flops_per_s for 'fp16'"),
        (Changes(remove=("card",), concurrency=64), InfeasibleError, "64 × 2048 tokens of context"),
    ],
)
def test_what_cannot_be_is_refused(plan, changes, error, message):
    with pytest.raises(error) as caught:
        what_if(plan, changes)
    assert message in str(caught.value)


def test_a_plan_with_stages_on_unknown_devices_is_refused(plan):
    broken = replace(plan, cluster=replace(plan.cluster, devices=plan.cluster.devices[:1]))
    with pytest.raises(PlanError, match="chip, not in its cluster"):
        what_if(broken, Changes())


def test_the_command_prints_both_plans(plan_file, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert exit_code(["whatif", plan_file, "--link", "tower-laptop=10Gbit", "--weights", "bf16"]) == 0
    out = capsys.readouterr().out
    for words in ("TTFT", "TPOT", "tokens/s", "KV cache", "devices in use", "-50.0%", "bf16 instead of fp32"):
        assert words in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_json_has_figures_reasons_and_the_plan(plan, plan_file, capsys):
    assert exit_code(["whatif", plan_file, "--remove", "chip", "--weights", "bf16", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    after = parse_plan(json.dumps(document["plan"]), "stdout")
    assert after.device_ids == ("card",)
    assert document["figures"]["TPOT"] == {
        "unit": "s",
        "before": plan.estimate.tpot_s,
        "after": after.estimate.tpot_s,
    }
    assert document["devices"]["chip"]["after"] is None
    assert any(reason.startswith("chip is gone") for reason in document["reasons"])


def test_an_added_device_is_put_on_a_host(plan_file, capsys):
    arguments = ["whatif", plan_file, "--add", "tower:extra=cpu:20GiB@0.9", "--json"]
    assert exit_code(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    (extra,) = [d for d in document["plan"]["cluster"]["devices"] if d["id"] == "extra"]
    assert (extra["host"], extra["memory_bytes"], extra["speed"]) == ("tower", 20 * 2**30, 0.9)


@pytest.mark.parametrize(
    ("text", "bytes_per_s", "latency_s"),
    [
        ("tower-laptop=10Gbit", 1.25e9, None),
        ("tower-laptop=1MB/s 1ms", 1e6, 1e-3),
        ("link laptop-tower 2ms 1 Gbit", 1.25e8, 2e-3),
        ("card-chip: 5ms", None, 5e-3),
    ],
)
def test_a_link_is_written_as_in_devices(plan, tmp_path, capsys, text, bytes_per_s, latency_s):
    def joining(of):
        return next(link for link in of.cluster.links if link.src != link.dst)

    before, after = joining(plan), joining(changed(plan, tmp_path, capsys, "--link", text))
    assert after.bytes_per_s == (bytes_per_s or before.bytes_per_s)
    assert after.latency_s == (latency_s or before.latency_s)


def test_a_new_host_is_added_with_its_link(plan, tmp_path, capsys):
    """As if it had been there from the start: inside it too, and with our engine's messages, as of the others."""
    added = ("--add", "attic: 2x cpu:20GiB", "--link", "attic-laptop 10Gbit 0.2ms")
    after = changed(plan, tmp_path, capsys, *added, "--link", "attic-tower=2Gbit")
    assert ids(after)[2:] == [("attic", "cpu-1"), ("attic", "cpu-2")]
    found = {
        (link.src, link.dst): (link.bytes_per_s, link.latency_s)
        for link in after.cluster.links
        if "attic" in (link.src, link.dst)
    }
    assert found == {
        ("attic", "attic"): (INTRA_HOST_BYTES_PER_S, INTRA_HOST_LATENCY_S),
        ("attic", "laptop"): (1.25e9, 2e-4),
        ("attic", "tower"): (2.5e8, ASSUMED_LATENCY_S),
    }
    assert all(link.hop_s == HOP_S for link in after.cluster.links if "attic" in (link.src, link.dst))
    assert after.certificate.value <= plan.certificate.value


def changed(plan, tmp_path, capsys, *arguments):
    file = tmp_path / "plan.json"
    write_plan(plan, file)
    assert exit_code(["whatif", str(file), *arguments, "--json"]) == 0
    return parse_plan(json.dumps(json.loads(capsys.readouterr().out)["plan"]), "")


def ids(plan):
    return [(device.host, device.id) for device in plan.cluster.devices]


@pytest.fixture(scope="module")
def one_host():
    return make_plan(llama(), parse_devices("rtx-3060-12gb", lambda _: []), workload(), ("bf16",))


@pytest.mark.parametrize(
    ("arguments", "added"),
    [
        (["rtx-4070"], ["rtx-4070"]),
        (["local:rtx-4070"], ["rtx-4070"]),
        (["rtx-4070:10GiB"], ["rtx-4070"]),
        (["rtx-3060-12gb"], ["rtx-3060-12gb-2"]),
        (["2x rtx-3060-12gb"], ["rtx-3060-12gb-1", "rtx-3060-12gb-2"]),
        (["rtx-3060-12gb", "--add", "rtx-3060-12gb"], ["rtx-3060-12gb-2", "rtx-3060-12gb-3"]),
        (["new=rtx-4070"], ["new"]),
    ],
)
def test_a_card_is_added_by_its_name(one_host, arguments, added, tmp_path, capsys):
    after = changed(one_host, tmp_path, capsys, "--add", *arguments)
    assert ids(after) == [("local", name) for name in ("rtx-3060-12gb", *added)]


def test_constraints_and_memory_are_changed(plan, tmp_path, capsys):
    after = changed(
        plan, tmp_path, capsys, "--pin", "chip=0-1", "--memory", "chip=8GiB", "--reserve", "chip=1GiB"
    )
    assert after.stages[0].split.device_ids == ("chip",)
    chip = after.cluster.device("chip")
    assert (chip.memory_bytes, chip.reserved_bytes) == (8 * 2**30, 2**30)
    without = changed(after, tmp_path, capsys, "--exclude", "tower")
    assert without.device_ids == ("chip",)
    assert without.constraints.pins == after.constraints.pins
    with pytest.raises(UsageError, match="held to --pin chip=0-1: it cannot do without chip"):
        what_if(after, Changes(remove=("chip",)))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--remove", "x"], 2, "--remove: unknown device 'x'; there is card, chip"),
        (["--link", "a-b=1Gbit"], 2, "unknown pair of hosts 'a-b'; there is tower-tower, tower-laptop"),
        (["--link", "tower-laptop"], 2, "write it like tower-laptop 10Gbit 0.2ms"),
        (["--link", "tower-laptop 1Gbit 0.3"], 2, "'0.3' lacks a unit; write a latency like 0.3ms"),
        (["--link", "tower-laptop 1Gbit 1ms 2ms"], 2, "there are two latencies, 1ms and 2ms; write one"),
        (["--link", "tower-laptop=fast"], 2, "write it like 1Gbit/s"),
        (["--add", "x=cpu:1GiB"], 2, "the plan has several hosts; write tower:x=cpu:1GiB or laptop:x"),
        (
            ["--add", "attic:x=cpu:1GiB"],
            2,
            "host 'attic' is new, and no link joins it to tower or laptop: add --link",
        ),
        (["--add", "towr:x=cpu:1GiB"], 2, "did you mean tower?"),
        (["--add", "attic: x=cpu:1GiB", "--link", "attic-tower 1ms"], 2, "give its bandwidth too"),
        (["--add", "rtx-4070"], 2, "write tower:rtx-4070 or laptop:rtx-4070"),
        (["--add", "tower:rtx-407"], 2, "rtx-4070"),
        (["--memory", "chip"], 2, "--memory 'chip'"),
        (["--exclude", "card", "--pin", "card"], 2, "card is excluded and is to take part"),
        (["--add", "tower:x"], 2, "write it like"),
        (["--remove", "card", "--concurrency", "64"], 3, "try"),
        (["--context", "99999"], 2, "8192"),
    ],
)
def test_mistakes_are_one_line(plan_file, capsys, arguments, code, message):
    assert exit_code(["whatif", plan_file, *arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("model"))


def test_compare_and_why_are_printed_in_80_columns(config, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    devices = "laptop=cpu:14MiB@0.5, desk=cpu:16MiB, old=cpu:6MiB@0.1"
    assert exit_code(["plan", config, "--devices", devices, "--compare", "--why"]) == 0
    out = capsys.readouterr().out
    for words in (
        "even layers",
        "exo, llama.cpp",
        "prima.cpp",
        "gain",
        "What would help",
        "What each device adds",
    ):
        assert words in out
    assert "even tensor is not feasible: " in out.replace("\n", " ")
    assert "(left out)" in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_json_is_the_plan_alone(config, capsys):
    assert exit_code(["plan", config, "--devices", "a=cpu:64MiB", "--json", "--compare"]) == 2
    assert "leave out --compare and --why" in capsys.readouterr().err


def test_streamed_weights_are_shown_and_may_be_forbidden():
    """Without the larger card nothing holds the model: it streams, which is said, or it is refused."""
    before = apportion.plan("llama-3.1-8b", devices="rtx-3090 + rtx-3060-12gb", calibration=False)
    remove = ("rtx-3090",)
    after = what_if(before, Changes(remove=remove))
    (row,) = (row for row in figures(before, after) if row.name == "weights streamed every step")
    assert row.before == 0
    assert row.after > 2**30
    with pytest.raises(InfeasibleError):
        what_if(before, Changes(remove=remove, streaming=False))
