"""Holds a worker to a memory budget on a CUDA GPU, by torch's caching allocator, which also counts the peak."""

import torch


class CudaMeter:
    """See `MemoryMeter`."""

    def __init__(self, torch_device: torch.device) -> None:
        self._device = torch_device

    def start(self, budget_bytes: int) -> None:
        total_bytes = torch.cuda.get_device_properties(self._device).total_memory
        fraction = min(1.0, budget_bytes / total_bytes)
        torch.cuda.set_per_process_memory_fraction(fraction, self._device)
        torch.cuda.reset_peak_memory_stats(self._device)

    def left(self) -> None:
        torch.cuda.empty_cache()

    def observe(self) -> None:
        pass

    def stepped(self) -> None:
        pass

    def loaded(self, host_bytes: int) -> None:
        pass

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_reserved(self._device)
