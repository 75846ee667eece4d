"""The cost model's form against published decode speeds (decode_speeds.toml): from the catalogue alone, and calibrated.

    one card        bytes / (bandwidth · efficiency) + layers · overhead
    layer split     the sum over the cards, each with its share of bytes and layers
    row, tensor     the slowest card's share of the bytes + layers · (overhead + reductions)

Catalogue: the constants below, the same for every card and program. They were chosen on these rows, so each source is
also predicted with bandwidth efficiency and overhead chosen on the other sources alone ("held out"). Calibrated: each
(source, card, format) is fitted by `apportion.calibrate.fit` to its smallest model, a group's reductions to the group's
smallest; rows that were fitted to are not scored. Bytes include the input embedding, of which a step reads one row.
"""

import json
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

from apportion.calibrate.fit import Constants, fit_device
from apportion.calibrate.observation import Observation
from apportion.catalog.gpus import gpus
from apportion.cost.host_memory import ALONE
from apportion.types.units import parse_bytes

EFFICIENCY, OVERHEAD_S = 0.88, 7e-5
REDUCTIONS_S = {"row": 4e-4, "tensor": 4e-5}
"""Per layer: llama.cpp of 2023 sends activations back through the host, the others reduce twice over NCCL or PCIe."""
EFFICIENCIES = [0.7 + 0.02 * i for i in range(16)]
OVERHEADS_S = [1e-5 * i for i in range(16)]
CONSUMER = ("rtx-20", "rtx-30", "rtx-40", "rtx-50", "rx-", "arc-")
WORKSTATION = "-ada"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    cards: tuple[str, ...]
    model: str
    num_layers: int
    size: int
    format: str
    split: str
    measured_s: float
    source: str

    @property
    def group(self) -> bool:
        return self.split in REDUCTIONS_S

    @property
    def consumer(self) -> bool:
        return len(self.cards) <= 4 and all(
            card.startswith(CONSUMER)
            and WORKSTATION not in card
            and 8 * 2**30 <= gpus()[card].memory_bytes <= 24 * 2**30
            for card in self.cards
        )


Cards = dict[tuple[str, str, str], Constants]
"""By source, card and format."""


def read_rows() -> list[Row]:
    text = Path(__file__).with_name("decode_speeds.toml").read_text(encoding="utf-8")
    return [
        Row(
            cards=tuple(one["gpus"]),
            model=one["model"],
            num_layers=one["num_layers"],
            size=parse_bytes(one["weight_bytes"]),
            format=one["format"],
            split=one["split"],
            measured_s=1 / one["tokens_per_s"],
            source=one["source"],
        )
        for one in tomllib.loads(text)["measurement"]
    ]


def datasheet(card: str, efficiency: float = EFFICIENCY, overhead_s: float = OVERHEAD_S) -> Constants:
    return Constants(
        mem_bytes_per_s=gpus()[card].mem_bytes_per_s * efficiency,
        host_bytes_per_s=None,
        flops_per_s=1.0,
        layer_overhead_s=overhead_s,
        step_overhead_s=0.0,
    )


def predicted_s(row: Row, cards: Sequence[Constants], reductions_s: float) -> float:
    share, layers = row.size / len(cards), row.num_layers / len(cards)
    if row.group:
        slowest_s = max(share / card.mem_bytes_per_s for card in cards)
        return slowest_s + row.num_layers * (max(card.layer_overhead_s for card in cards) + reductions_s)
    return sum(share / card.mem_bytes_per_s + layers * card.layer_overhead_s for card in cards)


def from_catalogue(row: Row, efficiency: float = EFFICIENCY, overhead_s: float = OVERHEAD_S) -> float:
    cards = [datasheet(card, efficiency, overhead_s) for card in row.cards]
    return predicted_s(row, cards, REDUCTIONS_S.get(row.split, 0.0))


def held_out(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """By source, the efficiency and overhead that suit the other sources best."""
    chosen: dict[str, tuple[float, float]] = {}
    for source in {row.source for row in rows}:
        others = [row for row in rows if row.source != source]
        grid = [(efficiency, overhead_s) for efficiency in EFFICIENCIES for overhead_s in OVERHEADS_S]
        chosen[source] = min(
            grid, key=lambda pair: median(_errors(others, lambda r: from_catalogue(r, *pair)))
        )
    return chosen


def _errors(rows: Iterable[Row], predict: Callable[[Row], float]) -> list[float]:
    """|predicted / measured − 1| of the speed."""
    return [abs(row.measured_s / predict(row) - 1) for row in rows]


def observed(row: Row) -> Observation:
    return Observation(
        run=row.model,
        hardware=row.cards[0],
        weight_format=row.format,
        phase="decode",
        num_layers=row.num_layers,
        work=((0.0, float(row.size)),),
        measured_s=row.measured_s,
        beside=ALONE,
        waiting_s=None,
        predicted_s=from_catalogue(row),
    )


def calibrated_cards(rows: Sequence[Row]) -> tuple[Cards, set[Row]]:
    """Constants from each card's smallest model, and the rows these were fitted to."""
    smallest: dict[tuple[str, str, str], Row] = {}
    for row in sorted(rows, key=lambda row: row.size):
        if len(row.cards) == 1:
            smallest.setdefault((row.source, row.cards[0], row.format), row)
    cards = {key: fit_device(datasheet(key[1]), [observed(row)]).constants for key, row in smallest.items()}
    return cards, set(smallest.values())


def calibrated_reductions(
    rows: Sequence[Row], cards: Cards
) -> tuple[dict[tuple[object, ...], float], set[Row]]:
    """Reductions per layer from each group's smallest model, where its cards are calibrated."""
    reductions_s: dict[tuple[object, ...], float] = {}
    used: set[Row] = set()
    for row in sorted(rows, key=lambda row: row.size):
        known = _cards_of(row, cards)
        if row.group and known and (row.source, row.cards, row.split) not in reductions_s:
            beyond_s = row.measured_s - predicted_s(row, known, 0.0)
            reductions_s[row.source, row.cards, row.split] = max(0.0, beyond_s / row.num_layers)
            used.add(row)
    return reductions_s, used


def _cards_of(row: Row, cards: Cards) -> list[Constants]:
    """[] where one of them is not calibrated."""
    keys = [(row.source, card, row.format) for card in row.cards]
    return [cards[key] for key in keys] if all(key in cards for key in keys) else []


def report(name: str, rows: Sequence[Row], predict: Callable[[Row], float]) -> dict[str, object]:
    figures: dict[str, object] = {"what": name}
    for subset, chosen in (("all", rows), ("consumer_8_24gb", [row for row in rows if row.consumer])):
        errors = _errors(chosen, predict)
        cuts = quantiles(errors, n=100)
        levels = {"median": median(errors), "p68": cuts[67], "p90": cuts[89]}
        shown = "".join(f"   {level} {error:6.1%}" for level, error in levels.items())
        print(f"{name:36} {subset:16} {len(errors):4} rows{shown}")
        figures[subset] = {"rows": len(errors), **{level: round(error, 4) for level, error in levels.items()}}
    return figures


def main() -> None:
    rows = read_rows()
    cards, fitted = calibrated_cards(rows)
    reductions_s, fitted_groups = calibrated_reductions(rows, cards)
    others = held_out(rows)

    def calibrated(row: Row) -> float:
        key = (row.source, row.cards, row.split)
        return predicted_s(row, _cards_of(row, cards), reductions_s.get(key, 0.0))

    unseen = [row for row in rows if _cards_of(row, cards) and row not in fitted | fitted_groups]
    seen_models = {row.model for row in fitted}
    figures = [
        report("catalogue", rows, from_catalogue),
        report("catalogue, held out by source", rows, lambda row: from_catalogue(row, *others[row.source])),
        report("catalogue, the rows scored below", unseen, from_catalogue),
        report("calibrated on the smallest model", unseen, calibrated),
        report(
            "the same, other models only", [row for row in unseen if row.model not in seen_models], calibrated
        ),
    ]
    for row in sorted(unseen, key=lambda row: -abs(row.measured_s / calibrated(row) - 1))[:8]:
        print(
            f"  furthest: {row.source} {len(row.cards)} x {row.cards[0]} {row.model} {row.format} {row.split}: "
            f"{1 / row.measured_s:.1f} tokens/s, predicted {1 / calibrated(row):.1f}"
        )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
