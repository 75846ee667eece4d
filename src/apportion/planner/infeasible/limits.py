"""What to say where no division keeps the limits, though some would fit."""

from dataclasses import replace

from apportion.planner.found import Found
from apportion.types.errors import InfeasibleError
from apportion.types.units import format_seconds
from apportion.types.workload import Workload


def without_limits(workload: Workload) -> Workload:
    """With one sequence where their number was to be chosen."""
    chosen = workload.objective == "throughput" or workload.arrival_rate is not None
    return replace(
        workload,
        objective="throughput",
        concurrency=1 if chosen else workload.concurrency,
        most_sequences=None,
        arrival_rate=None,
        ttft_limit_s=None,
        tpot_limit_s=None,
    )


def limits_error(workload: Workload, found: Found) -> InfeasibleError:
    """`found` is the best division without limits."""
    problem = found.problem
    predicted = problem.estimate(found.stages, found.microbatches)
    limits = ((workload.ttft_limit_s, "--ttft-limit"), (workload.tpot_limit_s, "--tpot-limit"))
    asked = " and ".join(f"{name} {limit:g}" for limit, name in limits if limit is not None)
    return InfeasibleError(
        f"no division found keeps {asked}: the fastest with {problem.workload.concurrency} running at once has"
        f" TTFT {format_seconds(predicted.ttft_s)} and TPOT {format_seconds(predicted.tpot_s)}; allow more"
    )
