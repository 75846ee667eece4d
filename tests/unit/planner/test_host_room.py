"""Where a host's memory has no room for what is streamed out of it."""

from dataclasses import replace

import pytest
from planned import GIB, cluster, cpu, llama, workload

from apportion.cost.host_room import host_rooms
from apportion.cost.memory import with_swap_space
from apportion.planner.build import make_plan
from apportion.planner.verify.plan import verify
from apportion.types.cluster import Device
from apportion.types.errors import InfeasibleError, UsageError
from apportion.types.plan import Plan

MODEL, WORKLOAD = llama(16), workload(context=1024)


def streaming(gib: float | None, disk: float | None = None, **changes: object) -> list[Device]:
    """Two devices of 3.5 GiB in all, for 4.6 GiB; their host has so many."""
    room = None if gib is None else round(gib * GIB)
    return [
        replace(
            cpu(name, size), stream_bytes_per_s=8e9, host_memory_bytes=room, disk_bytes_per_s=disk, **changes
        )
        for name, size in (("a", 1.8), ("b", 1.7))
    ]


def planned(devices: list[Device]) -> Plan:
    return make_plan(MODEL, cluster(devices), WORKLOAD, ("fp32",))


def test_devices_and_what_they_stream_share_the_hosts_memory():
    plan = planned(streaming(None))
    (room,) = host_rooms(plan.cluster, plan.stages, plan.memory)
    assert room.devices_bytes == sum(memory.engine_bytes for memory in plan.memory.values())
    assert room.streamed_bytes == sum(memory.streamed_bytes for memory in plan.memory.values()) > 0
    assert not room.crowded
    enough = room.needed_bytes / GIB
    # The search counts as many messages as may ever wait.
    assert planned(streaming(enough + 0.001)).stages == plan.stages
    crowded = planned(streaming(enough - 0.001, disk=2e9))
    assert {device.stream_from for device in crowded.cluster.devices} == {"disk"}
    assert crowded.certificate.value > plan.certificate.value
    assert all(check.ok for check in verify(crowded))


def test_a_plan_that_does_not_fit_its_hosts_memory_is_not_verified():
    plan = planned(streaming(None))
    smaller = tuple(replace(device, host_memory_bytes=4 * GIB) for device in plan.cluster.devices)
    changed = replace(plan, cluster=replace(plan.cluster, devices=smaller))
    assert [check.name for check in verify(changed) if not check.ok] == ["host memory"]


def test_without_a_disk_rate_the_error_says_what_to_add():
    with pytest.raises(InfeasibleError) as error:
        planned(streaming(4))
    text = str(error.value)
    assert "of weights streamed out of the memory of local, beside 3." in text
    assert "that has 4.0 GiB and no rate is known of its disk" in text
    assert '[[host]] name = "local", disk = "2 GB/s"' in text
    assert "\n" not in text


def test_a_gpu_does_not_stream_from_a_disk():
    cards = streaming(1, disk=2e9, kind="cuda", flops_per_s={"fp32": 75e9})
    with pytest.raises(InfeasibleError, match=r"that has 1\.0 GiB; "):
        planned(cards)


def test_swap_space_that_leaves_no_room_is_refused():
    plan = planned(streaming(None))
    (room,) = host_rooms(plan.cluster, plan.stages, plan.memory)
    full = tuple(replace(device, host_memory_bytes=room.needed_bytes) for device in plan.cluster.devices)
    with pytest.raises(
        UsageError, match=r"--swap-space 1\.0 GiB is too much: .* of swapped blocks, which is"
    ):
        with_swap_space(replace(plan, cluster=replace(plan.cluster, devices=full)), GIB)
