"""Devices that share their host's memory, against numbers worked out by hand.

a and c read 400 B/s by themselves, b 200: it is emulated at half of that speed, so it reads 400 half of the time. The
host's memory gives 600 B/s to all. x is on a host of its own, y has memory of its own.
"""

from dataclasses import replace
from math import isclose

import pytest
from hand_model import DECODE, LINK, MODEL, device
from planned import cluster, cpu, llama, workload
from plans import hand_plan

from apportion.catalog.cluster_text import parse_devices
from apportion.cost.estimate import Steps, objective_steps, plan_estimate, stage_timing
from apportion.cost.host_memory import at_work
from apportion.planner.build import make_plan
from apportion.planner.replicas.device_sets import sub_cluster
from apportion.planner.verify.plan import verify
from apportion.simulate.run import simulate
from apportion.types.cluster import Cluster
from apportion.types.request import Request, SamplingParams

A, B, C = (device(name, speed, 600.0) for name, speed in (("a", 1.0), ("b", 0.5), ("c", 1.0)))
X, Y = replace(A, id="x", host="other"), device("y")
CLUSTER = Cluster(devices=(A, B, C, X, Y), links=(LINK,))


def rates(*devices, overlapping=False, cluster=CLUSTER):
    return [one.mem_bytes_per_s for one in at_work(cluster, devices, overlapping=overlapping)]


def test_one_alone_reads_as_fast_as_it_can():
    assert rates(A) == [400.0]
    assert rates(B) == [200.0]
    assert rates(replace(A, host_bytes_per_s=300.0)) == [300.0]


def test_copying_shares_the_memory_and_a_disk_its_reading():
    """A and C beside each other read 300 of 400 B/s, and copy three quarters as fast; of a disk each has half."""
    copying = [replace(one, stream_bytes_per_s=80.0) for one in (A, C)]
    reading_disk = [replace(one, stream_from="disk") for one in copying]
    assert [one.stream_bytes_per_s for one in at_work(CLUSTER, copying, overlapping=False)] == [60.0, 60.0]
    assert [one.stream_bytes_per_s for one in at_work(CLUSTER, reading_disk, overlapping=False)] == [
        40.0,
        40.0,
    ]
    assert at_work(CLUSTER, reading_disk[:1], overlapping=False)[0].stream_bytes_per_s == 80.0


def test_a_group_shares_what_the_host_gives():
    """Both at once read 800: a third longer than alone. So does b all the time, a while b computes, half of it."""
    assert rates(A, B) == pytest.approx([400 / (1 + 1 / 6), 200 / (4 / 3)])
    assert rates(A, C) == [300.0, 300.0]
    assert rates(A, X) == [400.0, 400.0]
    assert rates(A, Y) == [400.0, 400.0]


def test_stages_at_work_together_meet_the_whole_host():
    """All three at once read 1200, and take twice as long: b always, a for three quarters of the time, in which b, for
    half of the time, and c are at work."""
    assert rates(A, overlapping=True) == pytest.approx([400 / (1 + 0.75)])
    assert rates(B, overlapping=True) == [100.0]
    assert rates(X, Y, overlapping=True) == [400.0, 400.0]


def test_no_more_threads_read_at_once_than_there_are_cores():
    """Four quarters of a device on two cores: one finds another at work three quarters of the time, 800 of 600."""
    quarters = [replace(device(name, 0.25, 600.0), host_cores=2) for name in "pqrs"]
    cluster = Cluster(devices=tuple(quarters), links=(LINK,))
    assert rates(quarters[0], overlapping=True, cluster=cluster) == pytest.approx([100 / (1 + 0.75 / 3)])


def test_other_replicas_are_always_at_work():
    cluster = sub_cluster(CLUSTER, [A, B])
    assert cluster.others_bytes_per_s == {"h": (400.0, 400.0)}
    assert rates(A, cluster=cluster) == [300.0]
    assert rates(A, overlapping=True, cluster=cluster) == rates(A, overlapping=True)
    assert sub_cluster(CLUSTER, CLUSTER.devices) == CLUSTER


def two_stages(microbatches, host_bytes_per_s=600.0):
    devices = [replace(one, host="local", host_bytes_per_s=host_bytes_per_s) for one in (A, C)]
    return hand_plan(MODEL, [[1], [1]], [1, 1], devices=devices, concurrency=4, microbatches=microbatches)


def test_a_step_takes_longer_only_where_stages_overlap():
    """A layer reads 1632 + 288 bytes: 4.80 s at 400 B/s, 6.40 s at 300; 0.25 s of overhead."""
    plan = two_stages(1)
    for overlapping, seconds in ((False, 4.80 + 0.25), (True, 6.40 + 0.25)):
        steps = Steps(prefill=(), decode=DECODE, overlapping=overlapping)
        timing = stage_timing(MODEL, plan.cluster, plan.stages[0], steps)
        assert isclose(timing.decode_s, seconds)
    workload = replace(plan.workload, objective="throughput")
    assert not objective_steps(workload, 12, 1).overlapping
    assert objective_steps(workload, 12, 2).overlapping
    shared, apart = (plan_estimate(two_stages(2, host)).stage_s[0] for host in (600.0, None))
    assert isclose(shared - 0.25, (apart - 0.25) * 400 / 300)


def test_the_simulation_overlaps_what_is_under_way_together():
    """One request alone passes from stage to stage; of two, each keeps a stage reading."""

    def last_s(num, plan):
        requests = [Request(id=i, prompt_ids=(i,), sampling=SamplingParams(max_tokens=8)) for i in range(num)]
        return max(at_s for at_s, _ in simulate(plan, requests))

    shared, apart = two_stages(2), two_stages(2, None)
    assert last_s(1, shared) == pytest.approx(last_s(1, apart))
    assert last_s(2, shared) > 1.2 * last_s(2, apart)


def test_a_host_s_figure_goes_to_all_that_share_its_memory():
    devices = parse_devices("mac: m2-max-64gb + cpu:8GiB; pc: rtx-3090 + cpu:8GiB", lambda _: []).devices
    metal, beside, card, own = (one.host_bytes_per_s for one in devices)
    assert metal == beside == pytest.approx(0.85 * 400e9, rel=0.03)
    assert card is None
    assert own == devices[3].mem_bytes_per_s


@pytest.mark.parametrize(("host_bytes_per_s", "num_devices"), [(None, 2), (3.2e10, 2), (1.6e10, 1)])
def test_a_group_is_planned_only_where_memory_feeds_it(host_bytes_per_s, num_devices):
    """Two devices of 16 GB/s for a model that either holds: together they read what the host gives."""
    cores = [replace(cpu(name, 8), host_bytes_per_s=host_bytes_per_s) for name in "ab"]
    asked = replace(workload(), prompt_tokens=8, output_tokens=248)
    plan = make_plan(llama(), cluster(cores), asked, ("fp32",))
    assert len(plan.device_ids) == num_devices
    assert all(check.ok for check in verify(plan))
