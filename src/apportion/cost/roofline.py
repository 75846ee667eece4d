"""Time of a phase on a device: whichever is longer of its arithmetic and its memory traffic, the ridge rounded.

Source: Williams, Waterman, Patterson, "Roofline", CACM 2009. Legend: T new tokens, X attended positions
summed over them, K context positions read. Weights, keys and values take the bytes of their formats
(formats.py).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apportion.cost.formats import Formats, head_row_bytes, parameters_bytes
from apportion.types.cluster import Device
from apportion.types.model import LayerSpec, ModelSpec

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
RIDGE = 0.8
"""So that equal times make a fifth more. docs/cost-model.md says how that fits products of few rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """`new_tokens` of each of `sequences` sequences that hold `start_tokens` each; `sampled_rows` are drawn."""

    sequences: int
    new_tokens: int
    start_tokens: int
    sampled_rows: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.new_tokens

    def attended(self, window_tokens: int | None) -> int:
        """X: positions attended to, summed over new tokens; each sees itself and at most `window_tokens`."""
        stop = self.start_tokens + self.new_tokens
        window = stop if window_tokens is None else window_tokens
        growing_stop = max(self.start_tokens, min(stop, window))
        growing = (growing_stop * (growing_stop + 1) - self.start_tokens * (self.start_tokens + 1)) // 2
        return self.sequences * (growing + (stop - growing_stop) * window)

    def context_read(self, window_tokens: int | None) -> int:
        """K: positions whose keys and values are read once, summed over sequences."""
        stop = self.start_tokens + self.new_tokens
        reach = stop if window_tokens is None else window_tokens + self.new_tokens - 1
        return self.sequences * min(stop, reach)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedStep:
    """Sequences of several lengths in one batch: their weights are read once, their keys and values each by itself."""

    steps: tuple[Step, ...]

    @property
    def tokens(self) -> int:
        return sum(step.tokens for step in self.steps)

    @property
    def sequences(self) -> int:
        return sum(step.sequences for step in self.steps)

    @property
    def sampled_rows(self) -> int:
        return sum(step.sampled_rows for step in self.steps)

    def attended(self, window_tokens: int | None) -> int:
        return sum(step.attended(window_tokens) for step in self.steps)

    def context_read(self, window_tokens: int | None) -> int:
        return sum(step.context_read(window_tokens) for step in self.steps)


AnyStep = Step | MixedStep


def prefill_steps(prompt_tokens: int, chunk_tokens: int) -> tuple[Step, ...]:
    """The chunks of one prompt; the last draws a token."""
    return tuple(
        Step(
            sequences=1,
            new_tokens=min(chunk_tokens, prompt_tokens - start),
            start_tokens=start,
            sampled_rows=int(start + chunk_tokens >= prompt_tokens),
        )
        for start in range(0, prompt_tokens, chunk_tokens)
    )


def decode_step(sequences: int, prompt_tokens: int, output_tokens: int) -> Step:
    """One token for each sequence, half way through its output."""
    context = prompt_tokens + output_tokens // 2
    return Step(sequences=sequences, new_tokens=1, start_tokens=context - 1, sampled_rows=sequences)


def phase_s(device: Device, weight_format: str, flops: float, moved_bytes: float) -> float:
    rate = device.rate(weight_format)
    assert rate is not None
    return overlapped_s(flops / rate, moved_bytes / device.mem_bytes_per_s)


def overlapped_s(computing_s: float, reading_s: float) -> float:
    """Of work that does both at once: the longer of the two, and more where the other is over half of it."""
    longer, shorter = max(computing_s, reading_s), min(computing_s, reading_s)
    return longer + RIDGE * (shorter - longer / 2) ** 2 / longer if shorter > longer / 2 else longer


def each_overlapped_s(computing_s: Floats, reading_s: Floats) -> Floats:
    """`overlapped_s` of many at once."""
    longer, shorter = np.maximum(computing_s, reading_s), np.minimum(computing_s, reading_s)
    beyond = np.maximum(0.0, shorter - longer / 2)
    return longer + RIDGE * beyond**2 / np.maximum(longer, 1e-300)


def attention_s(
    device: Device, model: ModelSpec, layer: LayerSpec, kv_heads: int, step: AnyStep, formats: Formats
) -> float:
    """Projections and attention of `kv_heads` and their query heads, and the layer's replicated parameters.

    Latent attention is costed in its absorbed form (arXiv 2405.04434, section 2.1.2), which decoding uses: a head's
    up-projections act on its queries and outputs, once per new token. Its replicated down-projections are products.
    """
    flops, moved_bytes = _attention_work(model, layer, kv_heads, _counts(step, layer.window_tokens), formats)
    return phase_s(device, formats.weights, flops, moved_bytes)


def attention_table_s(
    device: Device,
    model: ModelSpec,
    layer: LayerSpec,
    kv_heads: Integers,
    steps: tuple[AnyStep, ...],
    formats: Formats,
) -> Floats:
    """`attention_s` by number of heads and step."""
    rate = device.rate(formats.weights)
    assert rate is not None
    counts = _counts_of_all(steps, layer.window_tokens)
    flops, moved_bytes = _attention_work(model, layer, kv_heads[:, None], counts, formats)
    return each_overlapped_s(flops / rate, moved_bytes / device.mem_bytes_per_s)


def _attention_work(
    model: ModelSpec, layer: LayerSpec, kv_heads: Any, counts: tuple[Any, Any, Any, Any], formats: Formats
) -> tuple[Any, Any]:
    """FLOPs and bytes, of numbers or of arrays of them."""
    tokens, attended, context, sequences = counts
    flops = kv_heads * (2 * layer.per_kv_head.count * tokens + 2 * model.attention_products(layer) * attended)
    if model.kv_lora_rank is not None or layer.cache is not None:
        flops = flops + 2 * layer.replicated.count * tokens
    weights = kv_heads * parameters_bytes(layer.per_kv_head, formats) + parameters_bytes(
        layer.replicated, formats
    )
    cached = model.kv_elements(layer, kv_heads) * context * formats.kv_bits / 8
    if layer.cache is not None:
        cached = cached + 2 * layer.cache.state_bytes * sequences  # read and written
    return flops, weights + cached


def _counts(step: AnyStep, window_tokens: int | None) -> tuple[int, int, int, int]:
    return step.tokens, step.attended(window_tokens), step.context_read(window_tokens), step.sequences


@lru_cache(maxsize=256)
def _counts_of_all(
    steps: tuple[AnyStep, ...], window_tokens: int | None
) -> tuple[Integers, Integers, Integers, Integers]:
    counts = np.array([_counts(step, window_tokens) for step in steps], dtype=np.int64)
    tokens, attended, context, sequences = counts.reshape(-1, 4).T  # of no step at all none
    return tokens, attended, context, sequences


def ffn_column_s(device: Device, layer: LayerSpec, tokens: int, formats: Formats) -> float:
    """One FFN column; the phase is proportional to their number. Experts touched: 1 − (1 − k/E)^T of them."""
    active = layer.experts_per_token / layer.num_experts if layer.num_experts else 1.0
    touched = 1 - (1 - active) ** tokens
    column = layer.per_ffn_column
    return phase_s(
        device,
        formats.weights,
        2 * column.count * active * tokens,
        parameters_bytes(column, formats) * touched,
    )


def head_row_s(device: Device, model: ModelSpec, sampled_rows: int, formats: Formats) -> float:
    """One vocabulary row of the head; nothing where no token is drawn."""
    if sampled_rows == 0:
        return 0.0
    return phase_s(
        device, formats.weights, 2 * model.hidden_size * sampled_rows, head_row_bytes(model, formats)
    )
