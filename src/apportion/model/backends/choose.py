"""The backend and the memory meter of a device: the one place that asks what kind it is."""

import torch

from apportion.model.backend import Backend, MemoryMeter
from apportion.model.backends.cpu.backend import CpuBackend
from apportion.model.backends.cpu.meter import CpuMeter
from apportion.model.backends.torch.backend import TorchBackend
from apportion.model.backends.torch.meter import CudaMeter
from apportion.model.weights.checkpoint import FORMAT_DTYPES


def backend_of(
    torch_device: str, activation_format: str, *, block_tokens: int, gather_tokens: int
) -> Backend:
    """Compiled kernels for a CPU and fp32, which CPUs compute in; torch's operations for all else. Where these attend,
    sequences attend together up to `gather_tokens` positions."""
    dtype = FORMAT_DTYPES[activation_format]
    if torch_device == "cpu" and dtype == torch.float32:
        return CpuBackend(block_tokens=block_tokens)
    return TorchBackend(torch_device, dtype, block_tokens=block_tokens, gather_tokens=gather_tokens)


def memory_meter(torch_device: str) -> MemoryMeter:
    return CpuMeter() if torch_device == "cpu" else CudaMeter(torch.device(torch_device))
