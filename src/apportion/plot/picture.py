"""A plan as one picture: memory, a prompt's way through the stages, a decode step's way."""

from apportion.plot.gantt import draw_gantt
from apportion.plot.memory import draw_memory
from apportion.plot.schedule import schedule
from apportion.plot.svg import WIDTH, Drawing, shortened
from apportion.types.plan import Plan
from apportion.types.units import spoken_seconds, three_digits


def plan_svg(plan: Plan) -> str:
    """An SVG document; every time in it is predicted by the cost model."""
    drawing = Drawing(y_px=20.0)
    title = _title(plan)
    drawing.text(24, drawing.y_px + 16, shortened(title, WIDTH - 48, 18), size_px=18, bold=True)
    drawing.text(24, drawing.y_px + 38, _figures(plan), size_px=12)
    drawing.y_px += 66
    draw_memory(drawing, plan)
    rows = schedule(plan)
    workload = plan.workload
    prompt = f"Prefill: one prompt of {workload.prompt_tokens} tokens"
    draw_gantt(drawing, prompt, "prefill", "chunk", rows, rows.prefill)
    token = "Decode: one token" + (
        f" for {workload.concurrency} sequences" if workload.concurrency > 1 else ""
    )
    draw_gantt(drawing, token, "decode", "microbatch", rows, rows.decode)
    for note in _notes(plan):
        drawing.text(24, drawing.y_px, note, size_px=11)
        drawing.y_px += 16
    drawing.y_px += 8
    return drawing.document(title)


def _title(plan: Plan) -> str:
    devices, stages = _counted(len(plan.device_ids), "device"), _counted(len(plan.stages), "stage")
    return f"{plan.model.name} in {', '.join(plan.weight_formats_in_use)}: {stages} on {devices}"


def _figures(plan: Plan) -> str:
    estimate, workload, spread = plan.estimate, plan.workload, plan.estimate.uncertainty
    together = f" in all, {workload.concurrency} requests at once" if workload.concurrency > 1 else ""
    return (
        f"decode {three_digits(workload.concurrency / estimate.tpot_s)} tokens/s{together} ±{spread.tpot:.0%} · "
        f"first token after {spoken_seconds(estimate.ttft_s)} ±{spread.ttft:.0%} · "
        f"room for {workload.concurrency} × {workload.max_context_tokens:,} tokens"
    )


def _notes(plan: Plan) -> list[str]:
    notes = [
        "Times are predictions of the cost model, to scale within each chart; links that take less than 0.3 % of it "
        "are left out."
    ]
    if any(plan.cluster.device(device_id).emulated for device_id in plan.device_ids):
        notes.append("Emulated devices are slowed down on purpose: their figures are no real device's.")
    return notes


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"
