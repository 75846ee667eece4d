"""What is kept of a layer's buffer comes back, layer by layer, from a disk or the page cache; a full disk is said in
one line."""

import errno
import os
from pathlib import Path

import pytest
import torch

from apportion.model.weights.layer_store import DiskStore, LayerStore, PageCacheStore
from apportion.model.weights.weight_memory import PAGE_BYTES, LayerBuffer, Sizing
from apportion.types.errors import ModelError


def allocate(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


STORES = [PageCacheStore, DiskStore]


@pytest.mark.parametrize("store_type", STORES)
@pytest.mark.parametrize("on_disk", [True, False], ids=["disk", "memory"])
def test_layers_come_back_in_any_order(store_type: type[LayerStore], on_disk: bool, tmp_path: Path):
    """Also in a folder of memory, which there may be no way to read directly; nothing is left in the folder."""
    folder = tmp_path if on_disk else Path("/dev/shm")
    before = set(folder.iterdir())
    store = store_type(folder)
    buffer = LayerBuffer(3 * PAGE_BYTES - 5, allocate)
    kept = [torch.randint(0, 256, (3 * PAGE_BYTES,), dtype=torch.uint8) for _ in range(3)]
    for bytes_B in kept:
        buffer.bytes_B.copy_(bytes_B)
        store.keep(buffer.bytes_B)
    for layer in (2, 0, 1, 1):
        buffer.bytes_B.zero_()
        store.fetch(layer, buffer.bytes_B)
        store.arrived()
        assert torch.equal(buffer.bytes_B, kept[layer])
    assert set(folder.iterdir()) == before


@pytest.mark.parametrize("store_type", STORES)
def test_no_room_is_said_with_what_to_change(
    store_type: type[LayerStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    store = store_type(tmp_path)
    with pytest.raises(ModelError, match=r"has no room for streamed layer 1, of 8\.0 KiB: .*XDG_CACHE_HOME"):
        store.keep(LayerBuffer(2 * PAGE_BYTES, allocate).bytes_B)


def test_a_buffer_is_as_large_as_was_measured():
    sizing = Sizing(allocate)
    sizes = (1, 64, 65, 1000)
    for size in sizes:
        assert len(sizing.allocate(size)) == size
    assert sizing.buffer_bytes == 64 + 64 + 128 + 1024
    buffer = LayerBuffer(sizing.buffer_bytes, allocate)
    starts = [buffer.allocate(size).data_ptr() - buffer.bytes_B.data_ptr() for size in sizes]
    assert starts == [0, 64, 128, 256]
    assert buffer.bytes_B.data_ptr() % PAGE_BYTES == 0
