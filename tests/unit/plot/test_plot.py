"""The picture of a plan: what its rectangles measure, in which order, and which files it can be written to."""

import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise

import pytest
from command import apportion, small_model
from planned import cluster, cpu, llama
from plans import hand_plan

from apportion.cost.estimate import plan_estimate
from apportion.planner.plan_file import read_plan
from apportion.plot.axis import bytes_axis, seconds_axis
from apportion.plot.picture import plan_svg
from apportion.plot.schedule import flow, schedule
from apportion.plot.svg import FILLS, wrapped
from apportion.plot.write import check_picture_path, write_picture
from apportion.types.errors import UsageError

SVG = "{http://www.w3.org/2000/svg}"
PNG_START = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def plan():
    devices = [
        replace(cpu('laptop <&> "x"', 2.0, speed=0.5), reserved_bytes=2**28),
        cpu("desk", 3.0),
        cpu("old", 1.5, host="attic"),
        cpu("spare", 0.5),
    ]
    made = hand_plan(
        llama(12),
        [[1, 2], [1]],
        [9, 3],
        devices=[replace(device, host="local") for device in devices[:3]],
        weight_format="bf16",
        max_context_tokens=1024,
        chunk_tokens=256,
    )
    workload = replace(made.workload, prompt_tokens=700, output_tokens=64)
    apart = cluster(devices)
    far = tuple(replace(link, latency_s=1.0) if link.src != link.dst else link for link in apart.links)
    made = replace(made, cluster=replace(apart, links=far), workload=workload)
    return replace(made, estimate=plan_estimate(made))


@pytest.fixture(scope="module")
def root(plan):
    return ElementTree.fromstring(plan_svg(plan))


def rects(root, **data):
    """Rectangles that have these data- attributes, in drawing order."""
    return [
        rect
        for rect in root.iter(f"{SVG}rect")
        if all(rect.get(f"data-{key}") == str(value) for key, value in data.items())
    ]


def test_bars_are_as_wide_as_their_bytes_to_one_scale(plan, root):
    bars = [rect for rect in rects(root) if rect.get("data-bytes")]
    px_per_byte = 580 / max(device.memory_bytes for device in plan.cluster.devices)
    for bar in bars:
        assert float(bar.get("width")) == pytest.approx(int(bar.get("data-bytes")) * px_per_byte, abs=0.006)
    for device in plan.cluster.devices:
        mine = [bar for bar in bars if bar.get("data-device") == device.id]
        assert sum(int(bar.get("data-bytes")) for bar in mine) == device.memory_bytes
        for left, right in pairwise(mine):
            left_end = float(left.get("x")) + float(left.get("width"))
            assert float(right.get("x")) == pytest.approx(left_end, abs=0.02)


def test_each_kind_of_memory_is_the_plan_s(plan, root):
    memory = plan.memory["desk"]
    shown = {bar.get("data-kind"): int(bar.get("data-bytes")) for bar in rects(root, device="desk")}
    assert shown == {
        "weights": memory.weights_bytes,
        "KV": memory.kv_bytes,
        "workspace": memory.workspace_bytes + memory.buffer_bytes,
        "free": 3 * 2**30 - memory.total_bytes,
    }
    assert [bar.get("data-kind") for bar in rects(root, device="spare")] == ["free"]
    assert len(rects(root, kind="reserved")) == 1


def test_every_kind_is_in_the_legend_with_the_fill_of_its_bars(root):
    for bar in rects(root):
        if kind := bar.get("data-kind"):
            (swatch,) = rects(root, legend=kind)
            assert swatch.get("fill") == bar.get("fill")


def test_the_legend_has_what_is_there_and_no_more(root):
    """Nothing is streamed in this plan."""
    drawn = {bar.get("data-kind") for bar in rects(root)} - {None}
    named = {swatch.get("data-legend") for swatch in rects(root)} - {None}
    assert named == drawn | {"stage", "stage, by chunk", "stage, by microbatch", "link"} & named
    assert "streamed" not in named


def test_a_group_is_named_whole_and_links_without_time_are_left_out():
    names = ["rtx-3060-12gb", "rtx-3090", "rtx-4090", "rtx-4060-ti-16gb"]
    devices = [cpu(name, 8) for name in names]
    made = hand_plan(
        llama(12), [[2, 2, 2, 2]], [12], devices=devices, weight_format="bf16", max_context_tokens=1024
    )
    made = replace(made, estimate=plan_estimate(made))
    root = ElementTree.fromstring(plan_svg(made))
    words = [text.text for text in root.iter(f"{SVG}text")]
    for name in names:
        assert sum(name in line for line in words) >= 3  # beside its memory and in both charts
    assert not any("…" in line for line in words)
    assert not any("→" in line for line in words)
    assert not rects(root, legend="link")
    test_nothing_is_drawn_outside(root)
    test_every_kind_is_in_the_legend_with_the_fill_of_its_bars(root)


def test_names_are_wrapped_whole():
    assert wrapped(["a" * 10, "b" * 10, "c" * 10], 0.62 * 10 * 25, 10) == [
        "a" * 10 + " + " + "b" * 10 + " +",
        "c" * 10,
    ]
    assert wrapped(["a" * 30, "b"], 0.62 * 10 * 12, 10) == ["a" * 11 + "…", "b"]


def test_fills_differ_without_colour():
    """By hatching, or else by lightness by more than a quarter of the whole scale."""

    def lightness(fill):
        red, green, blue = (int(fill.colour[i : i + 2], 16) for i in (1, 3, 5))
        return (0.299 * red + 0.587 * green + 0.114 * blue) / 255

    for i, one in enumerate(FILLS):
        for other in FILLS[:i]:
            assert one.hatching != other.hatching or abs(lightness(one) - lightness(other)) > 0.25


def test_the_gantt_follows_the_pipeline(plan, root):
    for phase, items in (("prefill", 3), ("decode", plan.microbatches)):
        bars = {
            (int(bar.get("data-item")), int(bar.get("data-row"))): bar for bar in rects(root, phase=phase)
        }
        assert len(bars) == items * len({row for _, row in bars})
        assert {row for _, row in bars} >= {1, 2, 3}  # both stages, and the link between their hosts
        for (item, row), bar in bars.items():
            start = float(bar.get("x"))
            for before in ((item, row - 1), (item - 1, row)):
                if before in bars:
                    end = float(bars[before].get("x")) + float(bars[before].get("width"))
                    assert start >= end - 0.02


def test_the_gantt_s_length_is_the_cost_model_s(plan):
    """A decode step of one microbatch takes what the estimate says of its stages and links."""
    one = schedule(replace(plan, microbatches=1, workload=replace(plan.workload, concurrency=1)))
    alone = plan_estimate(replace(plan, microbatches=1, workload=replace(plan.workload, concurrency=1)))
    assert one.decode[-1].stop_s == pytest.approx(alone.tpot_s)
    stage_s = [one.decode[row].stop_s - one.decode[row].start_s for row in (1, 3)]
    assert stage_s == pytest.approx(alone.stage_s)
    assert one.is_link == (True, False, True, False, True)
    assert one.rows[1] == 'stage 0: laptop <&> "x" + desk'
    chunks_s = [interval.stop_s - interval.start_s for interval in one.prefill if interval.row == 1]
    assert len(chunks_s) == 3
    assert chunks_s[0] < chunks_s[1]  # of equal size, but the second attends to more
    assert chunks_s[2] < chunks_s[1]  # 188 tokens


def test_a_flow_waits_for_the_stage_before_and_the_item_before():
    intervals = flow([[1.0, 3.0], [1.0, 3.0]])
    assert [(i.item, i.row, i.start_s, i.stop_s) for i in intervals] == [
        (0, 0, 0.0, 1.0), (0, 1, 1.0, 4.0), (1, 0, 1.0, 2.0), (1, 1, 4.0, 7.0),
    ]  # fmt: skip


def test_titles_units_and_names_are_there(root):
    words = [text.text for text in root.iter(f"{SVG}text")]
    assert root.find(f"{SVG}title").text == words[0] == "llama in bf16: 2 stages on 3 devices"
    for needed in (
        "Memory of each device", "Prefill: one prompt of 700 tokens", "Decode: one token for 4 sequences",
        'laptop <&> "x" (emulated)', "stage 0, layers 0–8, 3/8 heads", "takes no part", "GiB", "stage 0 → 1",
    ):  # fmt: skip
        assert needed in words
    assert any(words_ in ("s", "ms") for words_ in words)
    assert any("Emulated devices are slowed down on purpose" in words_ for words_ in words)


def test_nothing_is_drawn_outside(root):
    height = float(root.get("height"))
    for rect in rects(root):
        if rect.get("x"):
            assert 0 <= float(rect.get("x")) <= float(rect.get("x")) + float(rect.get("width")) <= 960
            assert 0 <= float(rect.get("y")) <= float(rect.get("y")) + float(rect.get("height")) <= height


def test_a_plan_that_overfills_a_device_is_drawn_as_it_is(plan):
    devices = [replace(device, memory_bytes=2**28) for device in plan.cluster.devices]
    root = ElementTree.fromstring(plan_svg(replace(plan, cluster=cluster(devices))))
    assert all(float(rect.get("width")) >= 0 for rect in rects(root))
    test_nothing_is_drawn_outside(root)


@pytest.mark.parametrize(
    ("axis", "unit", "ticks"),
    [
        (bytes_axis(6 * 2**30, 0, 100), "GiB", [0, 1, 2, 3, 4, 5, 6]),
        (bytes_axis(900 * 2**20, 0, 100), "MiB", [0, 200, 400, 600, 800]),
        (seconds_axis(0.0123, 0, 100), "ms", [0, 2, 4, 6, 8, 10, 12]),
        (seconds_axis(5e-5, 0, 100), "µs", [0, 10, 20, 30, 40, 50]),
        (seconds_axis(75.0, 0, 100), "s", [0, 10, 20, 30, 40, 50, 60, 70]),
    ],
)
def test_axes_have_round_ticks(axis, unit, ticks):
    assert axis.unit == unit
    assert axis.ticks() == pytest.approx(ticks)


def test_files(plan, tmp_path):
    write_picture(plan, tmp_path / "plan.svg")
    assert (tmp_path / "plan.svg").read_text() == plan_svg(plan)
    with pytest.raises(UsageError, match=r"plan\.jpg ends in neither \.svg nor \.png"):
        write_picture(plan, tmp_path / "plan.jpg")
    assert not (tmp_path / "plan.jpg").exists()
    with pytest.raises(UsageError, match="cannot write --plot"):
        write_picture(plan, tmp_path / "none" / "plan.svg")


def test_png(plan, tmp_path):
    pytest.importorskip("resvg_py")
    file = tmp_path / "plan.PNG"
    write_picture(plan, file)
    content = file.read_bytes()
    assert content.startswith(PNG_START)
    root = ElementTree.fromstring(plan_svg(plan))
    size = (int.from_bytes(content[16:20]), int.from_bytes(content[20:24]))
    assert size == (2 * 960, 2 * int(root.get("height")))


def test_png_without_resvg_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UsageError, match="pip install resvg_py"):
        check_picture_path(tmp_path / "plan.png")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("model"))


def test_the_command_draws_the_plan_it_made(config, tmp_path):
    devices = ("--devices", "laptop=cpu:14MiB@0.5, desk=cpu:16MiB")
    out, picture = tmp_path / "plan.json", tmp_path / "plan.svg"
    done = apportion("plan", config, *devices, "--out", str(out), "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    assert picture.read_text() == plan_svg(read_plan(out))


def test_the_command_refuses_a_suffix_before_it_plans(config, tmp_path):
    out = tmp_path / "plan.json"
    done = apportion("plan", config, "--out", str(out), "--plot", str(tmp_path / "plan.pdf"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "plan.pdf ends in neither .svg nor .png" in done.stderr
    assert not out.exists()
