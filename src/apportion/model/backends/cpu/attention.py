"""Attention on a CPU by compiled calls: one for all sequences with one new token, one for each with several.

Shapes: T = tokens of the batch, Q = those of one sequence, K = local KV heads, G = query heads per KV head, N = K·G,
D = head dim, X = 1 with sinks, else 0.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from apportion.model.backends.cpu.batch import LongerSpan
from apportion.model.kernels.attend_op import NO_WINDOW
from apportion.model.kernels.decode import attend_decode
from apportion.model.kernels.prefill import attend_prefill, num_parts
from apportion.model.kernels.step_operand import DecodeRows
from apportion.model.kernels.team import team_of


class CompiledAttention:
    """One layer's attention of one batch, of queries in fp32, over a pool's `arrays` of that layer; `beyond_1` is set
    where a number is too large for them."""

    def __init__(
        self,
        query_TKGD: Tensor,
        out_TKGD: Tensor,
        arrays: tuple[np.ndarray, np.ndarray],
        beyond_1: np.ndarray,
        scale: float,
        window_tokens: int | None,
        softcap: float | None,
        sinks_N: Tensor | None,
    ) -> None:
        self._query_TKGD = query_TKGD.contiguous().numpy()
        self._out_TKGD = out_TKGD.numpy()
        self._arrays, self._beyond_1 = arrays, beyond_1
        window = NO_WINDOW if window_tokens is None else window_tokens
        self._options = window, np.float32(scale), np.float32(softcap or 0)
        kv_heads, group = out_TKGD.shape[1:3]
        self._sinks_KGX = (
            np.empty((kv_heads, group, 0), np.float32)
            if sinks_N is None
            else sinks_N.view(kv_heads, group, 1).contiguous().numpy()
        )
        self._team = team_of(torch.get_num_threads())

    def decode(self, key_TKD: Tensor, value_TKD: Tensor, rows: DecodeRows) -> None:
        """Of the sequences with one new token, whose keys and values are written too."""
        if not len(rows.rows_B):
            return
        part = partial(
            attend_decode(self._arrays[0].dtype),
            *(self._query_TKGD, key_TKD.contiguous().numpy(), value_TKD.contiguous().numpy()),
            *(rows.rows_B, rows.slots_B, rows.runs_R2, rows.first_run_B),
            *(*self._arrays, self._beyond_1, *self._options, self._sinks_KGX, self._out_TKGD),
        )
        self._team.run(part, len(rows.rows_B) * key_TKD.shape[1])

    def prefill(self, span: LongerSpan) -> None:
        """Of a sequence with several, whose keys and values have been written."""
        rows = slice(span.row_start, span.row_stop)
        query_QKGD, out_QKGD = self._query_TKGD[rows], self._out_TKGD[rows]
        part = partial(
            attend_prefill(self._arrays[0].dtype),
            *(query_QKGD, span.start, span.runs_R2, *self._arrays),
            *(self._options, self._sinks_KGX, out_QKGD),
        )
        self._team.run(part, num_parts(query_QKGD))
