"""A horizontal axis with round ticks in a readable unit."""

from dataclasses import dataclass
from math import floor, log10

from apportion.plot.svg import FAINT, INK, Drawing

TICKS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Maps `[0, stop]` onto pixels `[left_px, right_px]`; `unit` is worth `unit_size` of what is shown."""

    stop: float
    unit: str
    unit_size: float
    left_px: float
    right_px: float

    def width_px(self, amount: float) -> float:
        return amount / self.stop * (self.right_px - self.left_px)

    def x_px(self, amount: float) -> float:
        return self.left_px + self.width_px(amount)

    def ticks(self) -> list[float]:
        """In units: multiples of 1, 2 or 5 times a power of ten, at most TICKS + 1 of them."""
        most = self.stop / self.unit_size
        power = 10.0 ** floor(log10(most / TICKS))
        step = next(power * factor for factor in (1, 2, 5, 10) if most / (power * factor) <= TICKS)
        return [i * step for i in range(int(most / step + 1e-9) + 1)]

    def draw(self, drawing: Drawing, top_px: float, bottom_px: float) -> None:
        """Grid lines from `top_px` to `bottom_px`, labels below; call it before the bars."""
        for tick in self.ticks():
            x = self.x_px(tick * self.unit_size)
            drawing.line(x, top_px, x, bottom_px, FAINT)
            drawing.text(x, bottom_px + 14, f"{tick:g}", size_px=11, anchor="middle")
        drawing.line(self.left_px, bottom_px, self.right_px, bottom_px, INK)
        drawing.text(self.right_px + 14, bottom_px + 14, self.unit, size_px=11)


def bytes_axis(stop_bytes: float, left_px: float, right_px: float) -> Axis:
    names = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(len(names) - 1, max(0, (max(1, int(stop_bytes)).bit_length() - 1) // 10))
    return Axis(
        stop=stop_bytes, unit=names[power], unit_size=2.0 ** (10 * power), left_px=left_px, right_px=right_px
    )


def seconds_axis(stop_s: float, left_px: float, right_px: float) -> Axis:
    unit, size = next(
        (pair for pair in (("s", 1.0), ("ms", 1e-3)) if stop_s >= pair[1]),
        ("µs", 1e-6),
    )
    return Axis(stop=stop_s, unit=unit, unit_size=size, left_px=left_px, right_px=right_px)
