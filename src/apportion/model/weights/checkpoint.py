"""Reads slices of a safetensors checkpoint, never holding more than the wanted weights plus one piece.

The files are mapped read-only and copied piece by piece: the safetensors library maps them private and
writable, which counts against a worker's RLIMIT_DATA. Format: https://huggingface.co/docs/safetensors#format
"""

import math
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from apportion.types.errors import ModelError
from apportion.types.json_text import parse_json
from apportion.types.text_file import read_text

PIECE_BYTES = 2**17
"""Most bytes staged at once."""

FORMAT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The torch dtype of each weight format."""

Range = tuple[int, int]
"""`[start, stop)` along one dimension."""

_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_HEADER_LENGTH_BYTES = 8
_DTYPES: dict[str, tuple[type[np.generic], torch.dtype]] = {
    "F32": (np.float32, torch.float32),
    "F16": (np.float16, torch.float16),
    "BF16": (np.uint16, torch.bfloat16),  # numpy has no bfloat16: the bits are copied as they are
}


class Weights(Protocol):
    """Where a model's parameters come from."""

    read_bytes: int

    def __contains__(self, name: str, /) -> bool: ...

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Called before a tensor is read. Raises ModelError where it is missing or of another shape."""

    def read_into(self, target: Tensor, name: str, ranges: tuple[Range, ...]) -> None:
        """Copies the hyper-rectangle `ranges` of tensor `name` into `target`, in the dtype of `target`."""

    def row_peaks(self, name: str, start: int, stop: int) -> Tensor:
        """Largest magnitude of each row `[start, stop)` of matrix `name`, in fp32; not counted in `read_bytes`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a checkpoint file, mapped."""

    file: Path
    file_start: int
    shape: tuple[int, ...]
    dtype: str
    array: np.ndarray


class Checkpoint:
    """The tensors of a model folder by name. Raises ModelError for files missing, cut short or corrupt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read_bytes = 0
        self._tensors: dict[str, StoredTensor] = {}
        self._staging = np.empty(PIECE_BYTES, dtype=np.uint8)
        expected_files = _expected_files(folder)
        self._descriptors: dict[Path, int] = {}
        for file in dict.fromkeys(expected_files.values()) or [folder / _SINGLE_NAME]:
            self._tensors |= _map_file(file)
            self._descriptors[file] = os.open(file, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptors[file])
        for name, file in expected_files.items():
            if name not in self._tensors:
                raise ModelError(f"{file} lacks tensor '{name}' that {_INDEX_NAME} names; download it again")

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        tensor = self._tensor(name)
        if tensor.shape != shape:
            raise ModelError(
                f"{tensor.file}: tensor '{name}' has shape {list(tensor.shape)}, config.json asks for"
                f" {list(shape)}; use the config.json of this checkpoint"
            )

    def read_into(self, target: Tensor, name: str, ranges: tuple[Range, ...]) -> None:
        tensor = self._tensor(name)
        source = tensor.array[tuple(slice(start, stop) for start, stop in ranges)]
        if _lies_alike(target, tensor, source):
            self._read_bytes(tensor, name, source, target.view(-1))
            self.read_bytes += source.nbytes
            return
        for piece, staged in self._staged(name, ranges):
            destination = target[
                tuple(
                    slice(start - at, stop - at) for (start, stop), (at, _) in zip(piece, ranges, strict=True)
                )
            ]
            destination.copy_(staged)
            self.read_bytes += staged.nbytes

    def row_peaks(self, name: str, start: int, stop: int) -> Tensor:
        columns = self._tensor(name).shape[1]
        peaks_R = torch.zeros(stop - start)
        for ((first, last), _), staged in self._staged(name, ((start, stop), (0, columns))):
            within = peaks_R[first - start : last - start]
            torch.maximum(within, staged.abs().amax(1).float(), out=within)
        return peaks_R

    def _staged(self, name: str, ranges: tuple[Range, ...]) -> Iterator[tuple[tuple[Range, ...], Tensor]]:
        """Each piece and what it holds, until the next."""
        tensor = self._tensor(name)
        numpy_type, torch_type = _DTYPES[tensor.dtype]
        item_bytes = np.dtype(numpy_type).itemsize
        for piece in _pieces(ranges, PIECE_BYTES // item_bytes):
            source = tensor.array[tuple(slice(start, stop) for start, stop in piece)]
            staged = self._staging[: source.size * item_bytes].view(numpy_type).reshape(source.shape)
            if source.flags.c_contiguous:  # read, so that no page is mapped: it would count as the worker's
                self._read_bytes(tensor, name, source, torch.from_numpy(staged).view(torch_type).view(-1))
            else:
                np.copyto(staged, source)
                _check_finite(tensor, name, torch.from_numpy(staged).view(torch_type))
            yield piece, torch.from_numpy(staged).view(torch_type)

    def _read_bytes(self, tensor: StoredTensor, name: str, source: np.ndarray, target: Tensor) -> None:
        """The elements of `source`, a part of the tensor that lies in one piece; each is looked at while it is in the
        processor's cache."""
        at = tensor.file_start + source.ctypes.data - tensor.array.ctypes.data
        for piece in target.split(PIECE_BYTES // target.itemsize):
            missing = memoryview(piece.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
            while missing:
                count = os.preadv(self._descriptors[tensor.file], [missing], at)
                if count == 0:
                    raise ModelError(f"{tensor.file} has become shorter; download it again")
                missing, at = missing[count:], at + count
            _check_finite(tensor, name, piece)

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise ModelError(f"{self.folder}: no tensor '{name}' in the checkpoint; download it again")
        tensor = self._tensors[name]
        if tensor.dtype not in _DTYPES:
            raise ModelError(
                f"{tensor.file}: tensor '{name}' is stored as {tensor.dtype};"
                f" use a checkpoint in {', '.join(_DTYPES)}"
            )
        return tensor


def _check_finite(tensor: StoredTensor, name: str, piece: Tensor) -> None:
    """Raises ModelError. A sum is quick, and is finite for all weights that a model has."""
    if not isfinite(piece.sum(dtype=torch.float32)) and not bool(piece.isfinite().all()):
        raise ModelError(
            f"{tensor.file}: tensor '{name}' holds numbers that are not finite (NaN or infinity); download it again, or"
            " use another checkpoint"
        )


def _lies_alike(target: Tensor, tensor: StoredTensor, source: np.ndarray) -> bool:
    """Whether the bytes of a part of the tensor are those of `target`, in order."""
    return (
        source.flags.c_contiguous
        and target.is_contiguous()
        and target.device.type == "cpu"
        and target.dtype == _DTYPES[tensor.dtype][1]
    )


def _pieces(ranges: tuple[Range, ...], max_items: int) -> Iterator[tuple[Range, ...]]:
    """Cuts a hyper-rectangle into ones of at most `max_items`, whole rows where they fit."""
    if not ranges:
        yield ()
        return
    (start, stop), rest = ranges[0], ranges[1:]
    row_items = math.prod(end - begin for begin, end in rest)
    if row_items > max_items:
        for row in range(start, stop):
            for piece in _pieces(rest, max_items):
                yield ((row, row + 1), *piece)
        return
    step = max(1, max_items // max(1, row_items))
    for row in range(start, stop, step):
        yield ((row, min(row + step, stop)), *rest)


def _expected_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor as the index says; empty for a checkpoint of one file."""
    index = folder / _INDEX_NAME
    if index.exists():
        try:
            weight_map = parse_json(read_text(index))["weight_map"]
            return {str(name): folder / str(file) for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not a safetensors index ({error!r}); download it again") from error
    if not (folder / _SINGLE_NAME).exists():
        found = ", ".join(sorted(file.name for file in folder.glob("pytorch_model*"))) or "no weights"
        raise ModelError(
            f"{folder} has {found} but neither {_SINGLE_NAME} nor {_INDEX_NAME};"
            " use a checkpoint saved as safetensors"
        )
    return {}


def _map_file(file: Path) -> dict[str, StoredTensor]:
    if not file.exists():
        raise ModelError(f"{file} is missing; download it again")
    file_bytes = file.stat().st_size
    header, data_start = _read_header(file, file_bytes)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    try:
        data_bytes = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if file_bytes != data_start + data_bytes:
            raise ModelError(
                f"{file} has {file_bytes} bytes, its header expects {data_start + data_bytes};"
                " download it again"
            )
        _check_apart(file, entries)
        data = np.memmap(file, dtype=np.uint8, mode="r")
        return {name: _map_tensor(file, name, entry, data, data_start) for name, entry in entries.items()}
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise _corrupt(file, repr(error)) from error


def _check_apart(file: Path, entries: dict[str, Any]) -> None:
    """Raises ModelError where two tensors share bytes."""
    last, stop = "", 0
    for name, (begin, end) in sorted(
        ((name, entry["data_offsets"]) for name, entry in entries.items()), key=lambda one: one[1]
    ):
        if begin < stop and begin < end:
            raise _corrupt(file, f"tensors '{last}' and '{name}' overlap")
        last, stop = name, max(stop, end)


def _read_header(file: Path, file_bytes: int) -> tuple[dict[str, Any], int]:
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(_HEADER_LENGTH_BYTES), "little")
        data_start = _HEADER_LENGTH_BYTES + header_bytes
        if data_start > file_bytes:
            raise ModelError(
                f"{file} has {file_bytes} bytes, its header alone expects {data_start}; download it again"
            )
        try:
            header = parse_json(stream.read(header_bytes))
        except ValueError as error:
            raise _corrupt(file, str(error)) from error
    if not isinstance(header, dict):
        raise _corrupt(file, "it is not a JSON object")
    return header, data_start


def _map_tensor(
    file: Path, name: str, entry: dict[str, Any], data: np.ndarray, data_start: int
) -> StoredTensor:
    start, stop = entry["data_offsets"]
    shape, dtype = tuple(int(size) for size in entry["shape"]), str(entry["dtype"])
    raw = data[data_start + start : data_start + stop]
    file_start = data_start + start
    if dtype not in _DTYPES:  # refused only if it is asked for
        return StoredTensor(file=file, file_start=file_start, shape=shape, dtype=dtype, array=raw)
    numpy_type = _DTYPES[dtype][0]
    expected_bytes = math.prod(shape) * np.dtype(numpy_type).itemsize
    if not 0 <= start <= stop or stop - start != expected_bytes:
        raise _corrupt(file, f"tensor '{name}' has {stop - start} bytes, its shape expects {expected_bytes}")
    array = raw.view(numpy_type).reshape(shape)
    return StoredTensor(file=file, file_start=file_start, shape=shape, dtype=dtype, array=array)


def _corrupt(file: Path, reason: str) -> ModelError:
    return ModelError(f"{file}: the safetensors header is corrupt ({reason}); download it again")
