"""The header of a GGUF file: metadata and tensor infos, without the weights.

Source: docs/gguf.md of ggml (versions 2 and 3, little-endian), block sizes of gguf-py's constants.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import BinaryIO

from apportion.types.errors import ModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_NUMBERS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_TEXT, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")

TENSOR_TYPES = {
    0: ("f32", 1, 4),
    1: ("f16", 1, 2),
    2: ("q4_0", 32, 18),
    3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34),
    10: ("q2_k", 256, 84),
    11: ("q3_k", 256, 110),
    12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176),
    14: ("q6_k", 256, 210),
    15: ("q8_k", 256, 292),
    16: ("iq2_xxs", 256, 66),
    17: ("iq2_xs", 256, 74),
    18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18),
    21: ("iq3_s", 256, 110),
    22: ("iq2_s", 256, 82),
    23: ("iq4_xs", 256, 136),
    24: ("i8", 1, 1),
    25: ("i16", 1, 2),
    26: ("i32", 1, 4),
    27: ("i64", 1, 8),
    28: ("f64", 1, 8),
    29: ("iq1_m", 256, 56),
    30: ("bf16", 1, 2),
    34: ("tq1_0", 256, 54),
    35: ("tq2_0", 256, 66),
    39: ("mxfp4", 32, 17),
    40: ("nvfp4", 64, 36),
    41: ("q1_0", 128, 18),
}
"""Name, elements of a block and its bytes, by the number in the file."""

Value = int | float | bool | str | list[int | float | bool] | None
"""A list of texts (the vocabulary) is read over, and stands as None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """`shape` with the fastest dimension first, as in the file: a matrix is (inputs, outputs)."""

    shape: tuple[int, ...]
    type_name: str
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gguf:
    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, GgufTensor]

    @property
    def tensor_bytes(self) -> int:
        """Exact size of all weights."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())


def read_gguf(path: Path) -> Gguf:
    """The header of a file, and the tensors of every part where it is the first of several. Raises ModelError."""
    first = _read_header(path)
    tensors = dict(first.tensors)
    for part in _other_parts(first):
        tensors |= _read_header(part).tensors
    return replace(first, tensors=tensors)


def _other_parts(first: Gguf) -> Iterator[Path]:
    count = first.metadata.get("split.count")
    if not isinstance(count, int) or count <= 1:
        return
    match = _SPLIT.search(first.path.name)
    if match is None or int(match[1]) != 1 or int(match[2]) != count:
        raise ModelError(
            f"{first.path} is a part of {count}; name the first, which ends in -00001-of-{count:05}.gguf"
        )
    stem = first.path.name[: match.start()]
    for number in range(2, count + 1):
        part = first.path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf")
        if not part.is_file():
            raise ModelError(f"{part} is not there; planning reads the headers of all {count} parts")
        yield part


def _read_header(path: Path) -> Gguf:
    try:
        with path.open("rb") as stream:
            reader = _Reader(path, stream, path.stat().st_size)
            return Gguf(path=path, metadata=reader.metadata(), tensors=reader.tensors())
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror})") from None


class _Reader:
    """Reads in the order of the file; nothing beyond its end is believed."""

    def __init__(self, path: Path, stream: BinaryIO, size_bytes: int) -> None:
        self._path = path
        self._stream = stream
        self._left_bytes = size_bytes
        if self._take(4) != _MAGIC:
            raise self._invalid("it does not begin with 'GGUF'")
        version = self._integer("<I")
        if version not in _VERSIONS:
            raise self._invalid(f"version {version} is not {' or '.join(map(str, _VERSIONS))}, little-endian")
        self._num_tensors, self._num_values = self._integer("<Q"), self._integer("<Q")

    def metadata(self) -> dict[str, Value]:
        return {self._text(): self._value(self._integer("<I")) for _ in range(self._num_values)}

    def tensors(self) -> dict[str, GgufTensor]:
        return {self._text(): self._tensor() for _ in range(self._num_tensors)}

    def _tensor(self) -> GgufTensor:
        num_dimensions = self._integer("<I")
        if num_dimensions > _MAX_DIMENSIONS:
            raise self._invalid(f"a tensor has {num_dimensions} dimensions")
        shape = tuple(self._integer("<Q") for _ in range(num_dimensions))
        type_number = self._integer("<I")
        self._integer("<Q")  # where its data begins
        if type_number not in TENSOR_TYPES:
            raise self._invalid(f"tensor type {type_number} is not known")
        name, block, block_bytes = TENSOR_TYPES[type_number]
        if prod(shape) % block:
            raise self._invalid(f"a {name} tensor of {prod(shape)} elements is not in blocks of {block}")
        return GgufTensor(shape=shape, type_name=name, num_bytes=prod(shape) // block * block_bytes)

    def _value(self, kind: int) -> Value:
        if kind == _TEXT:
            return self._text()
        if kind == _ARRAY:
            return self._array()
        return self._number(kind)

    def _array(self) -> list[int | float | bool] | None:
        kind, length = self._integer("<I"), self._integer("<Q")
        if kind == _TEXT:
            for _ in range(length):
                self._take(self._integer("<Q"))
            return None
        if length > self._left_bytes:
            raise self._invalid("it ends within its header")
        return [self._number(kind) for _ in range(length)]

    def _number(self, kind: int) -> int | float | bool:
        if kind not in _NUMBERS:
            raise self._invalid(f"a value of kind {kind} in its header is not known")
        layout = _NUMBERS[kind]
        number: int | float | bool = struct.unpack(layout, self._take(struct.calcsize(layout)))[0]
        return number

    def _integer(self, layout: str) -> int:
        number: int = struct.unpack(layout, self._take(struct.calcsize(layout)))[0]
        return number

    def _text(self) -> str:
        return self._take(self._integer("<Q")).decode(errors="replace")

    def _take(self, num_bytes: int) -> bytes:
        taken = self._stream.read(num_bytes) if num_bytes <= self._left_bytes else b""
        if len(taken) != num_bytes:
            raise self._invalid("it ends within its header")
        self._left_bytes -= num_bytes
        return taken

    def _invalid(self, reason: str) -> ModelError:
        return ModelError(f"{self._path} is not a whole GGUF file: {reason}; download it again")
