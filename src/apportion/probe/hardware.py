"""What a device really is: the name under which its measurements are kept."""

from apportion.probe.local import cuda_names
from apportion.probe.processor import cpu_model
from apportion.types.cluster import LOCAL_HOST, Cluster, Device


def hardware_names(cluster: Cluster) -> dict[str, str]:
    """By device id, those devices that are this machine's own.

    Left out are devices of other hosts, of the catalogue, and those whose every rate was written down: they may
    describe any machine.
    """
    cards = cuda_names()
    names: dict[str, str] = {}
    for device in cluster.devices:
        name = _cpu_name(device) if device.kind == "cpu" else cards.get(device.torch_device)
        if device.host == LOCAL_HOST and device.source == "measured" and name is not None:
            names[device.id] = name
    return names


def _cpu_name(device: Device) -> str:
    return f"{cpu_model()}, {device.num_threads} thread{'s' if device.num_threads > 1 else ''}"
