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
    """The variables that show a program these devices, in this order; nothing for kinds that have no such variable.

    CUDA counts the fastest card first unless it is told otherwise (CUDA C++ Programming Guide, "CUDA Environment
    Variables": CUDA_DEVICE_ORDER is FASTEST_FIRST).
    """
    variables: dict[str, str] = {}
    for kind, name in VISIBLE.items():
        ordinals = [str(ordinal(device)) for device in devices if device.kind == kind]
        if ordinals:
            variables |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if kind == "cuda" else {}
            variables[name] = ",".join(ordinals)
    return variables


def numbers_note(devices: Sequence[Device]) -> list[str]:
    """Whose numbers the variables hold, where there is more than one card to mistake."""
    notes: list[str] = []
    for kind, tool in (("cuda", "nvidia-smi -L"), ("rocm", "rocm-smi")):
        cards = [device for device in devices if device.kind == kind]
        if cards:
            listed = ", ".join(f"{ordinal(device)} is {device.id} on {device.host}" for device in cards)
            whose = (
                "as nvidia-smi counts, which goes by PCI address" if kind == "cuda" else "as rocm-smi counts"
            )
            notes.append(
                f"card numbers are {whose}: {listed}; devices given by name alone are numbered as they were written, "
                f"so compare with `{tool}`"
            )
    return notes
