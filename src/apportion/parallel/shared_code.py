"""The usual course of an exchange through shared memory (`shared`), compiled: no other member is asleep or far behind.

numba compiles it when this module is first imported on a machine, and keeps the result on disk.

Shapes: W = words, of which each member has a line; R = members, E = elements of a slot, X = elements exchanged.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

LINE_WORDS = 8
"""Each member's counters have a cache line to themselves: how many messages it has published, and, while it sleeps,
1 + the member that it waits for."""
DONE, UNREAD, UNSEEN = range(3)
_WORD_BYTES = 8


def _word(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
    return builder.gep(data, [arguments[1]])


def _emit_load(_context: Any, words: Any, index: Any) -> Any:
    """A word that another process may change at any time."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_word(context, builder, signature, arguments), "acquire", _WORD_BYTES)

    return types.int64(words, index), emit


def _emit_store(_context: Any, words: Any, index: Any, value: Any) -> Any:
    """After all that was written before."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _word(context, builder, signature, arguments)
        value = builder.zext(arguments[2], ir.IntType(64)) if arguments[2].type.width < 64 else arguments[2]
        builder.store_atomic(value, pointer, "release", _WORD_BYTES)
        return context.get_dummy_value()

    return types.void(words, index, value), emit


_load: Callable[..., int] = intrinsic(_emit_load)
_store: Callable[..., None] = intrinsic(_emit_store)


def _await_word(words_W, index, number, looks):
    """Whether the word reached `number` within so many looks."""
    while looks > 0 and _load(words_W, index) < number:
        looks -= 1
    return looks > 0


def _add_parts(slots_2RE, half, out_X):
    """In rank order."""
    elements = len(out_X)
    out_X[:] = slots_2RE[half, 0, :elements] + slots_2RE[half, 1, :elements]
    for rank in range(2, slots_2RE.shape[1]):
        out_X[:] += slots_2RE[half, rank, :elements]


def _exchange(words_W, slots_2RE, rank, number, looks, mine_X):
    """Publishes `mine_X` as message `number` and replaces it by the sum; UNREAD before the first, where others have not
    read what its slot holds, UNSEEN before the second, where others are late or asleep."""
    size, half = slots_2RE.shape[1], number % 2
    for peer in range(size):
        if peer != rank and not await_word(words_W, peer * LINE_WORDS, number, looks):
            return UNREAD
    slots_2RE[half, rank, : len(mine_X)] = mine_X
    _store(words_W, rank * LINE_WORDS, number + 1)
    for peer in range(size):
        if peer != rank and _load(words_W, peer * LINE_WORDS + 1) == rank + 1:
            return UNSEEN
    for peer in range(size):
        if peer != rank and not await_word(words_W, peer * LINE_WORDS, number + 1, looks):
            return UNSEEN
    add_parts(slots_2RE, half, mine_X)
    return DONE


_WORDS, _ELEMENTS, _SLOTS = types.int64[::1], types.float32[::1], types.float32[:, :, ::1]
await_word: Callable[..., bool] = njit(
    types.boolean(_WORDS, types.intp, types.int64, types.intp), nogil=True, cache=True
)(_await_word)
add_parts: Callable[..., None] = njit(types.void(_SLOTS, types.intp, _ELEMENTS), nogil=True, cache=True)(
    _add_parts
)
exchange: Callable[..., int] = njit(
    types.intp(_WORDS, _SLOTS, types.intp, types.int64, types.intp, _ELEMENTS), nogil=True, cache=True
)(_exchange)
