"""Stages and links over time: bars of one item (a chunk, a microbatch) in each row."""

from collections.abc import Sequence

from apportion.plot.axis import seconds_axis
from apportion.plot.memory import LEFT_PX, RIGHT_PX
from apportion.plot.schedule import Interval, Schedule
from apportion.plot.svg import DOTS, LABEL_PX, SOLID, STRIPES, Drawing, Fill, shortened, text_width_px
from apportion.types.units import format_seconds

STAGE_PX, LINK_PX = 26.0, 18.0
"""Heights of rows; a bar leaves 3 pixels above and below."""


def draw_gantt(
    drawing: Drawing, title: str, phase: str, item: str, plan_rows: Schedule, intervals: Sequence[Interval]
) -> None:
    """`item` names what a bar's number counts ("chunk")."""
    tops = _row_tops(plan_rows, drawing.y_px + 30)
    stop_s = max(interval.stop_s for interval in intervals)
    several = any(interval.item > 0 for interval in intervals)
    drawing.text(24, drawing.y_px + 14, title, size_px=15, bold=True)
    _legend(drawing, drawing.y_px + 14, item if several else "")
    axis = seconds_axis(stop_s, LEFT_PX, RIGHT_PX)
    axis.draw(drawing, tops[0], tops[-1])
    for row, name in enumerate(plan_rows.rows):
        link = plan_rows.is_link[row]
        size_px = 11 if link else 13
        words = shortened(name, LEFT_PX - (52 if link else 36), size_px)
        drawing.text(36 if link else 24, (tops[row] + tops[row + 1]) / 2 + 4, words, size_px=size_px)
    for interval in intervals:
        top_px, bottom_px = tops[interval.row], tops[interval.row + 1]
        fill = STRIPES if plan_rows.is_link[interval.row] else _stage_fill(interval.item)
        width = axis.width_px(interval.stop_s - interval.start_s)
        data = {"phase": phase, "row": interval.row, "item": interval.item}
        drawing.rect(axis.x_px(interval.start_s), top_px + 3, width, bottom_px - top_px - 6, fill, data)
        if fill is not STRIPES:
            centre_x = axis.x_px(interval.start_s) + width / 2
            drawing.label(centre_x, bottom_px - 9, _bar_words(interval, several, width), fill)
    drawing.text(RIGHT_PX + 8, tops[-1] - 6, format_seconds(stop_s), size_px=11, bold=True)
    drawing.y_px = tops[-1] + 44


def _row_tops(plan_rows: Schedule, top_px: float) -> list[float]:
    """The top of every row, and the bottom of the last."""
    tops = [top_px]
    for link in plan_rows.is_link:
        tops.append(tops[-1] + (LINK_PX if link else STAGE_PX))
    return tops


def _stage_fill(item: int) -> Fill:
    """Neighbouring items differ, so that a stage that never rests still shows where one ends."""
    return (SOLID, DOTS)[item % 2]


def _bar_words(interval: Interval, several: bool, width: float) -> str:
    """The item's number and its time, or what of it there is room for."""
    time = format_seconds(interval.stop_s - interval.start_s)
    number = str(interval.item + 1)
    options = [f"{number}: {time}", number] if several else [time]
    return next((words for words in options if text_width_px(words, LABEL_PX) + 4 <= width), "")


def _legend(drawing: Drawing, baseline_px: float, item: str) -> None:
    x = RIGHT_PX + 110.0
    fills = [("link", STRIPES), (f"stage, by {item}" if item else "stage", SOLID)]
    for words, fill in fills:
        x -= text_width_px(words, 12)
        drawing.text(x, baseline_px, words)
        swatches = [DOTS, SOLID] if item and fill is SOLID else [fill]
        x -= 6
        for swatch in swatches:
            x -= 16
            drawing.rect(x, baseline_px - 11, 16, 13, swatch, {"legend": words})
        x -= 24
