"""The headers of a checkpoint's safetensors files: names, types and shapes of its tensors, without their data.

Format: https://huggingface.co/docs/safetensors#format. Eight bytes of length, so much JSON, then the data.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

from apportion.types.errors import ModelError
from apportion.types.json_text import parse_json
from apportion.types.text_file import read_text

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
_SHARDS = "model-*-of-*.safetensors"
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100 * 2**20
"""The format's own limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHeader:
    file: Path
    name: str
    dtype: str
    """As the format calls it: "BF16", "F8_E4M3"."""
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


def read_headers(folder: Path) -> tuple[TensorHeader, ...] | None:
    """Of all files of a checkpoint; None for a folder that has none of them. Raises ModelError where some are missing,
    and for one that is not whole."""
    index = folder / INDEX_NAME
    files = _indexed_files(index) if index.is_file() else [folder / SINGLE_NAME]
    missing = [file for file in files if not file.is_file()]
    if not missing:
        return tuple(tensor for file in files for tensor in _file_headers(file))
    if index.is_file() and len(missing) == len(files):
        return None
    if not index.is_file() and not any(folder.glob(_SHARDS)):
        return None
    lacks = (
        f"{len(missing)} of its {len(files)} files, {missing[0].name} first"
        if index.is_file()
        else INDEX_NAME
    )
    raise ModelError(
        f"{folder} lacks {lacks}; download it again, or name {folder / 'config.json'} to plan without the files"
    )


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = parse_json(read_text(index))["weight_map"].values()
        return [index.parent / str(name) for name in dict.fromkeys(names)]
    except OSError as error:
        raise ModelError(f"{index} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{index} names no files; download it again") from None


def _file_headers(file: Path) -> Iterator[TensorHeader]:
    """Raises ModelError."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
            if not 0 < length <= _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            content = opened.read(length)
        header = cast(dict[str, Any], parse_json(content))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        data_bytes = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        if file.stat().st_size < _LENGTH_BYTES + length + data_bytes:
            raise ValueError("it ends before its last tensor")
        for name, entry in tensors.items():
            first, last = (int(offset) for offset in entry["data_offsets"])
            yield TensorHeader(
                file=file,
                name=name,
                dtype=str(entry["dtype"]),
                shape=tuple(int(size) for size in entry["shape"]),
                num_bytes=last - first,
            )
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{file} is not a whole safetensors file ({error}); download it again") from None
