"""What other engines call the devices that are not CPUs."""

from collections.abc import Sequence

from apportion.types.cluster import Device, DeviceKind

VISIBLE: dict[DeviceKind, str] = {"cuda": "CUDA_VISIBLE_DEVICES", "rocm": "HIP_VISIBLE_DEVICES"}
"""Variable that lists the ordinals a program may use, in its order."""
LLAMA_CPP_NAMES: dict[DeviceKind, str] = {
    "cuda": "CUDA",
    "rocm": "ROCm",
    "metal": "MTL",
    "xpu": "SYCL",
    "npu": "CANN",
}
"""Prefix of a device in llama.cpp's list, before its number."""


def ordinal(device: Device) -> int:
    """2 of "cuda:2"; 0 of a device without a number."""
    return int(device.torch_device.partition(":")[2] or 0)


def visible(devices: Sequence[Device]) -> dict[str, str]:
    """The variables that show a program these devices, in this order; nothing for kinds that have no such variable."""
    variables: dict[str, str] = {}
    for kind, name in VISIBLE.items():
        ordinals = [str(ordinal(device)) for device in devices if device.kind == kind]
        if ordinals:
            variables[name] = ",".join(ordinals)
    return variables
