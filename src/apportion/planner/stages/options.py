"""The shares worth considering for one group: for every kind of stage, those that no others beat in both costs.

Where a group's shares can be numbered, all are looked at, and the options are exactly the undominated ones. A
larger group's come from a pool: the best shares (stages/shares.py) of some kinds of stages, offered to all kinds.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb, inf
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from apportion.cost.objective import Goal, Timing
from apportion.planner.stages.axes import compositions, head_compositions, vocabulary_rows
from apportion.planner.stages.kinds import StageKinds
from apportion.planner.stages.places import fixed_shares
from apportion.planner.stages.share_costs import CostedShares, ShareCosts, Shares
from apportion.planner.stages.shares import GroupShares, StageChoice

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

MAX_SHARES = 20_000
"""Ways to share that are numbered; the pairs of a common model have 4000 to 16,000."""
SAMPLED_PARTS = (0.0, 0.5, 0.8, 1.0)
"""Of the number of layers that a group can hold."""
FEW_SHARES = 32
"""Options that are kept without asking whether others beat them."""

PHASES = Goal(
    objective="latency",
    path_prefill=1.0,
    path_decode=0.0,
    occupied_prefill=0.0,
    occupied_decode=1.0,
    per=1.0,
)
"""Its options are those that no other beats in both prefill (their path) and decode (occupied) seconds."""


@dataclass(frozen=True, slots=True)
class Options:
    """[kind, option], infinite where there is none; `share` is the row of `heads`, `granules` and `format`, which
    numbers the group's costs by weight format."""

    path_s: FloatArray
    occupied_s: FloatArray
    share: IntArray
    heads: IntArray
    granules: IntArray
    format: IntArray

    def path_within(self, limit: float) -> FloatArray:
        """By kind the least path cost that is occupied for at most `limit`."""
        return np.where(self.occupied_s <= limit, self.path_s, inf).min(axis=1)

    def chosen(self, by_format: Sequence[ShareCosts], kind: int, limit: float) -> StageChoice:
        """The option of `path_within`; of several the least occupied."""
        allowed = np.where(self.occupied_s[kind] <= limit, self.path_s[kind], inf)
        return self.choice(by_format, kind, int(np.lexsort((self.occupied_s[kind], allowed))[0]))

    def choice(self, by_format: Sequence[ShareCosts], kind: int, option: int) -> StageChoice:
        row = int(self.share[kind, option])
        heads, granules = self.heads[row : row + 1], self.granules[row : row + 1]
        costs = by_format[int(self.format[row])]
        prefill_s, decode_s = costs.timings(costs.costed(heads, granules), np.array([kind]))[0, 0]
        units = tuple(int(count) for count in granules[0])
        return StageChoice(
            kv_heads=tuple(int(count) for count in heads[0]),
            ffn_columns=tuple(costs.granule * count for count in units),
            vocab_rows=vocabulary_rows(costs.problem.model.vocab_rows, units),
            weight_format=costs.problem.formats.weights,
            timing=Timing(prefill_s=float(prefill_s), decode_s=float(decode_s)),
        )


def joined_options(by_format: Sequence[Options]) -> Options:
    """The options of one group in several weight formats as one."""
    if len(by_format) == 1:
        return by_format[0]
    firsts = np.cumsum([0, *(len(options.heads) for options in by_format)])
    return Options(
        np.concatenate([options.path_s for options in by_format], axis=1),
        np.concatenate([options.occupied_s for options in by_format], axis=1),
        np.concatenate(
            [options.share + first for options, first in zip(by_format, firsts, strict=False)], axis=1
        ),
        np.concatenate([options.heads for options in by_format]),
        np.concatenate([options.granules for options in by_format]),
        np.concatenate([options.format + number for number, options in enumerate(by_format)]),
    )


def _all_shares(costs: ShareCosts) -> tuple[IntArray, IntArray]:
    """Every way to share the KV heads, and the FFN granules, that the constraints allow."""
    size, fixed = len(costs.devices), fixed_shares(costs.problem, costs.devices)
    if fixed is not None:
        return np.array([fixed[0]]), np.array([fixed[1]])
    return head_compositions(costs.problem.model.kv_heads, size), compositions(costs.num_granules, size)


def num_shares(kv_heads: int, num_granules: int, size: int) -> int:
    return comb(kv_heads - 1, size - 1) * comb(num_granules - 1, size - 1)


def are_numbered(costs: ShareCosts) -> bool:
    """Whether the group's shares are few enough to look at all."""
    if fixed_shares(costs.problem, costs.devices) is not None:
        return True
    size = len(costs.devices)
    return num_shares(costs.problem.model.kv_heads, costs.num_granules, size) <= MAX_SHARES


def numbered_options(costs: ShareCosts, goal: Goal) -> Options | None:
    """The options among all shares; None where they are too many."""
    return remembered(costs, "numbered", goal, _numbered) if are_numbered(costs) else None


def remembered(
    costs: ShareCosts, name: str, goal: Goal, make: Callable[[ShareCosts, Goal], Options]
) -> Options:
    """Of this name and goal, made once."""
    key = (name, goal, are_numbered(costs))
    if key not in costs.known:
        costs.known[key] = make(costs, goal)
    return cast(Options, costs.known[key])


def _numbered(costs: ShareCosts, goal: Goal) -> Options:
    few = _unlimited(costs)
    numbers = np.arange(len(costs.kinds.kinds))
    free = costs.holds(few.heads, few.granules, numbers).all(axis=1)
    blocks = [_best_of(costs, goal, few, numbers[free])]
    tight = np.setdiff1d(costs.possible(), numbers[free])
    if len(tight) == 0:
        return _padded(blocks, len(numbers), few.heads, few.granules)
    everything = costs.costed_pairs(*_all_shares(costs))
    step = max(1, 200_000 // (len(everything.heads) * costs.num_times))
    for begin in range(0, len(tight), step):  # for the sake of memory
        block = _best_of(costs, goal, everything, tight[begin : begin + step])
        blocks.append(block._replace(share=block.share + len(few.heads)))
    return _padded(
        blocks,
        len(numbers),
        np.concatenate([few.heads, everything.heads]),
        np.concatenate([few.granules, everything.granules]),
    )


def share_pool(shares: GroupShares, kinds: StageKinds) -> list[Shares]:
    """Shares for stages of any kind: those near the best for some, from few layers to the most that fit."""
    found: set[Shares] = set()
    for position in range(4):
        of_position = [n for n in range(len(kinds.kinds)) if kinds.position[n] == position]
        longer = [kinds.kinds[n] for n in sorted(of_position, key=lambda n: kinds.num_layers[n])]
        num_fitting = bisect_left(longer, True, key=lambda kind: not shares.holds(kind))
        for sample in {round(part * (num_fitting - 1)) for part in SAMPLED_PARTS if num_fitting}:
            found |= shares.near(longer[sample])
    return sorted(found)


def pooled_options(costs: ShareCosts, goal: Goal, pool: Sequence[Shares]) -> Options:
    """The options among given shares."""
    size = len(costs.devices)
    heads = np.array([heads for heads, _ in pool], dtype=np.int64).reshape(-1, size)
    granules = np.array([granules for _, granules in pool], dtype=np.int64).reshape(-1, size)
    possible = costs.possible()
    num_kinds = len(costs.kinds.kinds)
    if len(pool) == 0 or len(possible) == 0:
        return _padded([], num_kinds, heads, granules)
    path, occupied = _costs(costs, goal, costs.costed(heads, granules), possible)
    # Those that are the best for one kind by some measure are enough.
    kept = np.unique([measure.argmin(axis=1) for measure in (path, occupied, path + occupied)])
    path_s, occupied_s = (np.full((num_kinds, len(kept)), inf) for _ in range(2))
    path_s[possible], occupied_s[possible] = path[:, kept], occupied[:, kept]
    return Options(path_s, occupied_s, np.tile(kept, (num_kinds, 1)), heads, granules, one_format(heads))


def optimistic_options(costs: ShareCosts, goal: Goal) -> Options:
    """At least as good as `numbered_options`, and quicker: members' memory counts in sum only."""
    numbered = _unlimited(costs)
    block = _best_of(costs, goal, numbered, costs.possible(), limited=False)
    return _padded([block], len(costs.kinds.kinds), numbered.heads, numbered.granules)


def _unlimited(costs: ShareCosts) -> CostedShares:
    """Memory apart, every stage is best with one of these shares, which can be numbered."""
    layers = costs.kinds.layers
    heads, granules = _all_shares(costs)
    quick = _undominated(np.concatenate([costs.attention_s(layer, heads) for layer in layers], axis=1))
    ffn = [costs.ffn_s(layer, granules) for layer in layers]
    narrow = _undominated(np.concatenate([*ffn, costs.head_s(granules)], axis=1))
    return costs.costed_pairs(heads[quick], granules[narrow])


class Block(NamedTuple):
    """Of some kinds, [kind, option]: path and occupied seconds, infinite where there is none, and the shares."""

    numbers: IntArray
    path_s: FloatArray
    occupied_s: FloatArray
    share: IntArray


def _best_of(
    costs: ShareCosts,
    goal: Goal,
    shares: CostedShares,
    numbers: IntArray,
    *,
    limited: bool = True,
) -> Block:
    """The options of these kinds among given shares."""
    path_s, occupied_s = _costs(costs, goal, shares, numbers, limited=limited)
    share = np.broadcast_to(np.arange(len(shares.heads)), path_s.shape)
    if len(shares.heads) <= FEW_SHARES:
        return Block(numbers, path_s, occupied_s, share)
    chosen = _pareto(path_s, occupied_s)
    none = chosen < 0
    path_s, occupied_s = (np.take_along_axis(table, chosen, axis=1) for table in (path_s, occupied_s))
    return Block(numbers, np.where(none, inf, path_s), np.where(none, inf, occupied_s), chosen)


def _costs(
    costs: ShareCosts, goal: Goal, shares: CostedShares, numbers: IntArray, *, limited: bool = True
) -> tuple[FloatArray, FloatArray]:
    """Path and occupied seconds by [kind, share], infinite where it does not fit and memory is `limited`."""
    seconds = costs.timings(shares, numbers) if limited else costs.least_timings(shares, numbers)
    path_s = goal.path_prefill * seconds[..., 0] + goal.path_decode * seconds[..., 1]
    occupied_s = goal.occupied_prefill * seconds[..., 0] + goal.occupied_decode * seconds[..., 1]
    if not limited:
        return path_s, occupied_s
    fits = costs.fits(shares.heads, shares.granules, numbers)
    return np.where(fits, path_s, inf), np.where(fits, occupied_s, inf)


def _pareto(path_s: FloatArray, occupied_s: FloatArray) -> IntArray:
    """[row, option]: the columns with a finite path that no other beats in both, by path; −1 beyond a row's last."""
    fastest = np.where(path_s == path_s.min(axis=1, keepdims=True), occupied_s, inf).min(
        axis=1, keepdims=True
    )
    least = occupied_s == occupied_s.min(axis=1, keepdims=True)
    shortest = np.where(least, path_s, inf).min(axis=1, keepdims=True)
    between = np.isfinite(path_s) & (occupied_s <= fastest) & (path_s <= shortest)
    columns = np.flatnonzero(between.any(axis=0))  # few of many, before they are sorted
    if len(columns) == 0:
        return np.full((len(path_s), 1), -1)
    path, occupied = (np.where(between, seconds, inf)[:, columns] for seconds in (path_s, occupied_s))
    order = np.lexsort((occupied, path), axis=1)
    falling = np.minimum.accumulate(np.take_along_axis(occupied, order, axis=1), axis=1)
    kept = falling < np.concatenate([np.full((len(falling), 1), inf), falling[:, :-1]], axis=1)
    width = kept.sum(axis=1).max(initial=1)
    first = np.argsort(~kept, axis=1, kind="stable")[:, :width]
    return np.take_along_axis(np.where(kept, columns[order], -1), first, axis=1)


def _padded(blocks: Sequence[Block], num_kinds: int, heads: IntArray, granules: IntArray) -> Options:
    width = max((block.path_s.shape[1] for block in blocks), default=1)
    path_s, occupied_s = np.full((num_kinds, width), inf), np.full((num_kinds, width), inf)
    share = np.full(path_s.shape, -1, dtype=np.int64)
    for block in blocks:
        columns = slice(block.path_s.shape[1])
        path_s[block.numbers, columns] = block.path_s
        occupied_s[block.numbers, columns] = block.occupied_s
        share[block.numbers, columns] = block.share
    if len(heads) > 0:
        used, rows = np.unique(np.maximum(share, 0), return_inverse=True)  # few of many
        heads, granules, share = heads[used], granules[used], rows.reshape(share.shape)
    return Options(path_s, occupied_s, share, heads, granules, one_format(heads))


def one_format(heads: IntArray) -> IntArray:
    """Every row in the first of the formats."""
    return np.zeros(len(heads), dtype=np.int64)


def _undominated(points: FloatArray) -> IntArray:
    """Rows that no other row is as good as everywhere; one of each that are equal."""
    order = np.lexsort(points.T[::-1])
    kept: list[int] = []
    while len(order):
        # The first in lexical order is beaten by none that are left.
        kept.append(int(order[0]))
        order = order[(points[order] < points[order[0]]).any(axis=1)]
    return np.array(kept, dtype=np.int64)
