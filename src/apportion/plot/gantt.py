"""Stages and links over time: bars of one item (a chunk, a microbatch) in each row."""

from collections.abc import Mapping, Sequence

from apportion.plot.axis import seconds_axis
from apportion.plot.memory import LEFT_PX, RIGHT_PX
from apportion.plot.schedule import Interval, Schedule
from apportion.plot.svg import (
    DOTS,
    LABEL_PX,
    SOLID,
    STRIPES,
    Drawing,
    Fill,
    shortened,
    text_width_px,
    wrapped,
)
from apportion.types.units import spoken_seconds

STAGE_PX, LINK_PX, LINE_PX = 26.0, 18.0, 14.0
"""Heights of rows, and of every line of a stage's devices under its name; a bar leaves 3 pixels above and below."""
LEAST_PART = 0.003
"""Of a chart's time: a link's row that takes less is left out, as nothing could be seen in it."""
MOST_LINES = 4
"""Of a stage's devices."""


def draw_gantt(
    drawing: Drawing, title: str, phase: str, item: str, plan_rows: Schedule, intervals: Sequence[Interval]
) -> None:
    """`item` names what a bar's number counts ("chunk")."""
    stop_s = max(interval.stop_s for interval in intervals)
    shown = _shown_rows(plan_rows, intervals, stop_s)
    labels = {row: _label(plan_rows, row) for row in shown}
    tops = _row_tops(plan_rows, labels, drawing.y_px + 30)
    bottom_px = max(bottom for _, bottom in tops.values())
    several = any(interval.item > 0 for interval in intervals)
    drawing.text(24, drawing.y_px + 14, title, size_px=15, bold=True)
    links = any(plan_rows.is_link[row] for row in shown)
    _legend(drawing, drawing.y_px + 14, item if several else "", links=links)
    axis = seconds_axis(stop_s, LEFT_PX, RIGHT_PX)
    axis.draw(drawing, drawing.y_px + 30, bottom_px)
    for row, (first, *others) in labels.items():
        top_px, row_bottom_px = tops[row]
        link = plan_rows.is_link[row]
        baseline_px = (top_px + row_bottom_px) / 2 + 4 - LINE_PX * len(others) / 2
        drawing.text(36 if link else 24, baseline_px, first, size_px=11 if link else 13, bold=not link)
        for line in others:
            baseline_px += LINE_PX
            drawing.text(24, baseline_px, line, size_px=LABEL_PX)
    for interval in intervals:
        if interval.row not in tops:
            continue
        top_px, row_bottom_px = tops[interval.row]
        fill = STRIPES if plan_rows.is_link[interval.row] else _stage_fill(interval.item)
        width = axis.width_px(interval.stop_s - interval.start_s)
        data = {"phase": phase, "row": interval.row, "item": interval.item}
        drawing.rect(axis.x_px(interval.start_s), top_px + 3, width, row_bottom_px - top_px - 6, fill, data)
        if fill is not STRIPES:
            centre_x = axis.x_px(interval.start_s) + width / 2
            middle_px = (top_px + row_bottom_px) / 2 + 4
            drawing.label(centre_x, middle_px, _bar_words(interval, several, width), fill)
    drawing.text(RIGHT_PX + 8, bottom_px - 6, spoken_seconds(stop_s), size_px=11, bold=True)
    drawing.y_px = bottom_px + 44


def _shown_rows(plan_rows: Schedule, intervals: Sequence[Interval], stop_s: float) -> list[int]:
    """Every stage, and every link that can be seen."""
    taken_s = [0.0] * len(plan_rows.rows)
    for interval in intervals:
        taken_s[interval.row] += interval.stop_s - interval.start_s
    return [
        row for row, link in enumerate(plan_rows.is_link) if not link or taken_s[row] >= LEAST_PART * stop_s
    ]


def _label(plan_rows: Schedule, row: int) -> list[str]:
    """A link's name, or a stage's with its devices under it, whole, in as many lines as they need up to a limit."""
    name = plan_rows.rows[row]
    if plan_rows.is_link[row]:
        return [shortened(name, LEFT_PX - 52, 11)]
    stage, _, devices = name.partition(": ")
    lines = wrapped(devices.split(" + "), LEFT_PX - 36, LABEL_PX)
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], f"and others, {devices.count(' + ') + 1} in all"]
    return [stage, *lines]


def _row_tops(
    plan_rows: Schedule, labels: Mapping[int, Sequence[str]], top_px: float
) -> dict[int, tuple[float, float]]:
    """The top and the bottom of every row that is shown."""
    tops: dict[int, tuple[float, float]] = {}
    for row, label in labels.items():
        height_px = LINK_PX if plan_rows.is_link[row] else STAGE_PX + LINE_PX * (len(label) - 1)
        tops[row] = (top_px, top_px + height_px)
        top_px += height_px
    return tops


def _stage_fill(item: int) -> Fill:
    """Neighbouring items differ, so that a stage that never rests still shows where one ends."""
    return (SOLID, DOTS)[item % 2]


def _bar_words(interval: Interval, several: bool, width: float) -> str:
    """The item's number and its time, or what of it there is room for."""
    time = spoken_seconds(interval.stop_s - interval.start_s)
    number = str(interval.item + 1)
    options = [f"{number}: {time}", number] if several else [time]
    return next((words for words in options if text_width_px(words, LABEL_PX) + 4 <= width), "")


def _legend(drawing: Drawing, baseline_px: float, item: str, *, links: bool) -> None:
    x = RIGHT_PX + 110.0
    fills = [*([("link", STRIPES)] if links else []), (f"stage, by {item}" if item else "stage", SOLID)]
    for words, fill in fills:
        x -= text_width_px(words, 12)
        drawing.text(x, baseline_px, words)
        swatches = [DOTS, SOLID] if item and fill is SOLID else [fill]
        x -= 6
        for swatch in swatches:
            x -= 16
            drawing.rect(x, baseline_px - 11, 16, 13, swatch, {"legend": words})
        x -= 24
