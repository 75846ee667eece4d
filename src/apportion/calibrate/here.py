"""Calibration of a cluster on this machine: its file, and the names of its hardware."""

from apportion.calibrate.apply import Calibrated, apply
from apportion.calibrate.store import Warn, calibration_file, read_observations
from apportion.probe.hardware import hardware_names
from apportion.types.cluster import Cluster


def calibrate_here(cluster: Cluster, weight_formats: tuple[str, ...], warn: Warn) -> Calibrated:
    """The cluster with the constants that earlier runs of this user measured."""
    seen = read_observations(calibration_file(), warn)
    return apply(cluster, seen, weight_formats, hardware_names(cluster) if seen else {})
