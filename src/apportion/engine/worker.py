"""One worker process: holds one member's share of one stage and runs the steps that arrive.

Its place in a plan is told in a message, and may be told anew: then it gives up all that it held, and drops what was
sent for it. It ends when told to, when its parent vanishes, or on any error, which it reports first. A member whose
peer is gone gives its place up, too, and waits for another. Sibling of this process: engine/engine.py.
"""

import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache, partial
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path

import torch
from torch import Tensor

from apportion.engine.pacing import Pacer
from apportion.engine.place import WorkerBirth, WorkerPlace
from apportion.engine.reduction import paced_all_reduce
from apportion.engine.report import WorkerReport, WorkMeter
from apportion.model.backend import MemoryMeter
from apportion.model.backends.choose import backend_of, memory_meter
from apportion.model.backends.cpu.meter import lift_limit
from apportion.model.build import build_stage, import_layers
from apportion.model.sampling import sample
from apportion.model.stage import StageModel
from apportion.model.weights.checkpoint import FORMAT_DTYPES, Checkpoint
from apportion.model.weights.layer_store import layer_store
from apportion.model.weights.random_weights import RandomWeights
from apportion.transport.batches import BatchPacker, BatchUnpacker
from apportion.transport.group import TensorGroup
from apportion.transport.links import COORDINATOR, Inbox, Outbox
from apportion.transport.pairs import PeerLostError
from apportion.transport.protocol import Message
from apportion.transport.tensors import tensor_bytes, tensor_from_bytes
from apportion.transport.wire import Kind, pack, pack_result, unpack
from apportion.types.errors import ApportionError, EngineError, InfeasibleError
from apportion.types.record import from_plain
from apportion.types.request import BlockMove, Chunk, Draw, SamplingParams, ScheduledBatch, StepResult
from apportion.types.units import format_bytes

_SPIN_S = 2e-4
"""How long a member of a group with a core of its own waits actively for another's partial."""
_MOST_REDUCTIONS = 4
"""Of a layer in a step (olmo2's); the embedding has one."""
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory")


def run_worker(birth: WorkerBirth) -> None:
    """Entry point of the process."""
    gc.freeze()  # what was imported stays, and its pages stay shared with the other workers
    gc.enable()
    sys.excepthook = sys.__excepthook__
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the coordinator decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    coordinator = Outbox(birth.run_dir, COORDINATOR)
    coordinator.generation = birth.generation
    worker: _Worker | None = None
    try:
        worker = _Worker(birth, coordinator)
        with torch.inference_mode():
            worker.serve()
        coordinator.close()
    except BaseException as error:
        lift_limit()
        coordinator.send(Kind.FAILED, pack((birth.device_id, *_describe(error, worker and worker.place))))
        os._exit(1)  # a peer may be blocked on us: leave at once, its sentinel tells the coordinator


def _end_with_parent() -> None:
    """The kernel's parent-death signal would not do: the forkserver is our parent, and lives as long as we do."""
    coordinator = parent_process()
    assert coordinator is not None
    wait([coordinator.sentinel])
    os._exit(1)


def _describe(error: BaseException, place: WorkerPlace | None) -> tuple[str, str]:
    """(error class, one line) for the coordinator."""
    if isinstance(error, ApportionError):
        return type(error).__name__, str(error)
    out_of_memory = isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)
    if out_of_memory and place is not None:
        device = place.device
        memory = place.plan.memory[device.id]
        return InfeasibleError.__name__, (
            f"device {device.id} ran out of its {format_bytes(device.usable_bytes)} although the plan needs"
            f" {format_bytes(memory.engine_bytes)}; give it more memory, or lower --context or --concurrency"
        )
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = " ".join(str(error).split())
    return "EngineError", f"{type(error).__name__}: {line} ({Path(frame.filename).name}:{frame.lineno})"


class _Worker:
    """The process: it answers the coordinator, and holds one place in a plan at a time, or none."""

    def __init__(self, birth: WorkerBirth, coordinator: Outbox) -> None:
        self.place: WorkerPlace | None = None
        self._birth = birth
        self._coordinator = coordinator
        self._inbox = Inbox(birth.run_dir, birth.name)
        self._meter: MemoryMeter | None = None
        self._member: _Member | None = None
        self._cores = os.sched_getaffinity(0)
        """All that it may use where it has none of its own."""

    def serve(self) -> None:
        self._tell(Kind.HERE)
        while (message := self._inbox.receive()) is not None:
            if message.kind is Kind.LOAD:
                self._coordinator.generation = message.generation
                self._load(message.header)
                continue
            if message.generation < self._coordinator.generation:
                continue  # of a plan that is no more
            if message.kind is Kind.STOP:
                break
            self._answer(message)
        if self._member is not None:
            self._tell(Kind.STOPPED, self._member.report())
            self._member.close()

    def _answer(self, message: Message) -> None:
        member = self._member
        if message.kind is Kind.ASK:
            self._tell(Kind.HERE)
        elif member is None:
            return  # a member of its group was lost in the middle of a step: others may still send for it
        elif message.kind is Kind.REPORT:
            report = member.report()
            member.clear()  # before the coordinator goes on: what follows belongs to the next report
            self._tell(Kind.REPORTED, report)
        elif message.kind is Kind.STEP:
            try:
                member.step(message)
            except PeerLostError:
                self._leave()

    def _load(self, header: bytes) -> None:
        """Takes the place that is told, once nothing is left of the one before."""
        self._leave()
        told = unpack(header)
        if told is None:
            return
        self.place = place = from_plain(WorkerPlace, told)
        self._use_cores(place)
        if self._meter is None:
            self._meter = memory_meter(place.device.torch_device)
        try:
            self._member = _Member(place, self._birth.run_dir, self._coordinator, self._meter)
        except PeerLostError:
            return  # it tells the coordinator why
        self._tell(Kind.READY, self._member.report())

    def _leave(self) -> None:
        if self._member is not None:
            self._member.close()
        self._member = self.place = None
        if self._meter is not None:
            gc.collect()
            self._meter.left()

    def _use_cores(self, place: WorkerPlace) -> None:
        """All threads, those that were started for an earlier place too, and those that these start."""
        for thread in os.listdir("/proc/self/task"):
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), place.cores or self._cores)
        torch.set_num_threads(place.device.num_threads)

    def _tell(self, kind: Kind, report: WorkerReport | None = None) -> None:
        self._coordinator.send(kind, pack(self._birth.device_id if report is None else asdict(report)))


class _Member:
    """One place in one plan: a member's share of a stage, and the steps that it runs. Raises PeerLostError where
    another member of its group is gone."""

    def __init__(self, place: WorkerPlace, run_dir: Path, coordinator: Outbox, meter: MemoryMeter) -> None:
        plan = place.plan
        self._place, self._plan, self._stage = place, plan, place.stage
        self._device = place.device
        self._dtype = FORMAT_DTYPES[self._stage.activation_format]
        self._coordinator, self._meter = coordinator, meter
        self._next = {device_id: Outbox(run_dir, place.names[device_id]) for device_id in place.receivers}
        for outbox in self._next.values():
            outbox.generation = coordinator.generation
        self._pacer = Pacer(self._device.speed, actively=bool(place.cores))
        size = self._stage.split.size
        name = f"{coordinator.generation}-{place.stage_index}"
        self._group = TensorGroup(run_dir, name, place.rank, size, spin_s=_SPIN_S if place.cores else 0.0)
        self._all_reduce = paced_all_reduce(
            self._group, self._pacer, _MOST_REDUCTIONS * (self._stage.num_layers + 1)
        )
        self._work = WorkMeter(trace=place.trace)
        # What is gathered at once is at most a full context, which the workspace has room for.
        self._backend = backend_of(
            self._device.torch_device,
            self._stage.activation_format,
            block_tokens=plan.block_tokens,
            gather_tokens=plan.workload.max_context_tokens,
        )
        self._model = self._build_stage()
        self._mover = self._backend.block_mover(self._model.kv_pool.tensors, plan.num_swap_blocks)
        self._unpacker = BatchUnpacker()
        self._rehearse()
        self._meter.loaded(self._mover.host_bytes)

    def step(self, message: Message) -> None:
        self._work.begin_step(message.sent_s)
        self._pacer.start()
        batch = self._unpacker.unpack(message.header)
        try:
            self._step(batch, message.header, message.payload)
        except ArithmeticError:  # logits that are none, or a softmax of what is none
            raise self._not_finite(message.payload) from None
        self._work.end_step(batch)
        self._meter.stepped()

    def clear(self) -> None:
        """Begins a new report."""
        self._work.clear()

    def close(self) -> None:
        """Others in the group see that it is gone."""
        self._group.close()
        for outbox in self._next.values():
            outbox.close()

    def _build_stage(self) -> StageModel:
        """Its files are closed in the end; the memory of what is imported does not count."""
        place, plan = self._place, self._plan
        folder = Path(place.folder)
        weights = RandomWeights() if place.random_weights else Checkpoint(folder)
        import_layers(folder, plan.model, self._stage, weights)
        self._backend.warm_up(self._stage.weight_format, self._stage.kv_format)
        open_store = cache(partial(layer_store, self._device))
        if self._stage.streamed_layers:
            open_store()  # its thread's stack is address space
        self._meter.start(self._device.usable_bytes)
        return build_stage(
            folder,
            plan.model,
            self._stage,
            place.rank,
            weights=weights,
            num_kv_blocks=plan.num_kv_blocks,
            all_reduce=self._all_reduce if self._group.size > 1 else _identity,
            backend=self._backend,
            memory=self._meter,
            open_store=open_store,
        )

    def _rehearse(self) -> None:
        """Steps of no request: what the math libraries load and build when first used belongs to starting up. The KV
        they write is overwritten before anything attends to it."""
        packer, unpacker = BatchPacker(), BatchUnpacker()
        for batch in _rehearsal(self._plan.num_kv_blocks):
            flat = self._backend.prepare(unpacker.unpack(packer.pack(batch)))
            ids_T = flat.rows.token_ids_T
            shape = len(ids_T), self._plan.model.hidden_size
            hidden_TD = torch.zeros(shape, dtype=self._dtype, device=ids_T.device)
            outputs = self._model.forward(ids_T if self._stage.has_embedding else hidden_TD, flat)
            tensor_from_bytes(tensor_bytes(outputs), self._dtype, (-1,))
            self._all_reduce.take_spans()
        if self._stage.has_head:
            vocab_rows = self._plan.model.vocab_rows
            for temperature in (0.0, 1.0):
                drawing = SamplingParams(max_tokens=1, temperature=temperature, top_p=0.5)
                sample(torch.zeros(1, vocab_rows), [(0, Draw(0, drawing), 0)])
        swaps = (
            (BlockMove("swap out", 0, 0), BlockMove("swap in", 0, 0)) if self._plan.num_swap_blocks else ()
        )
        self._mover.apply([BlockMove("copy", 0, 0), *swaps])
        self._group.reset_counts()
        self._rehearsed_bytes = self._model.streamed_bytes
        self._work.clear()

    def _step(self, batch: ScheduledBatch, header: bytes, payload: memoryview) -> None:
        if batch.moves:
            begun_s = time.perf_counter()
            self._mover.apply(batch.moves)
            self._work.spent("swap", begun_s, time.perf_counter())
        flat = self._backend.prepare(batch)
        inputs = flat.rows.token_ids_T if self._stage.has_embedding else self._hidden(payload)
        outputs = self._model.forward(inputs, flat)
        for begun_s, ended_s in self._all_reduce.take_spans():
            self._work.spent("exchange", begun_s, ended_s)
        if self._stage.has_head:
            self._finish(batch, outputs)
            return
        data = tensor_bytes(outputs)
        self._pacer.settle()
        for outbox in self._next.values():
            outbox.send(Kind.STEP, header, data)

    def _not_finite(self, payload: memoryview) -> EngineError:
        """Says whose numbers they are: the stage's own where it was handed finite ones, or token ids."""
        before = self._place.stage_index - 1
        if self._stage.has_embedding or bool(self._hidden(payload).isfinite().all()):
            whose = f"device {self._device.id} computed"
        else:
            devices = ", ".join(self._plan.stages[before].split.device_ids)
            whose = f"device {self._device.id} was handed by stage {before} ({devices})"
        return EngineError(
            f"{whose} numbers that are not finite (NaN or infinity); use another format (--weights fp32), or check the"
            " checkpoint"
        )

    def _hidden(self, payload: memoryview) -> Tensor:
        hidden_TD = tensor_from_bytes(payload, self._dtype, (-1, self._plan.model.hidden_size))
        return hidden_TD.to(self._backend.torch_device)

    def _finish(self, batch: ScheduledBatch, logits_NV: Tensor) -> None:
        """Draws the tokens on rank 0 and tells the coordinator that the step is over."""
        drawing = any(chunk.sampling is not None for chunk in batch.chunks)
        vocab_rows = list(self._stage.split.vocab_rows)
        self._pacer.settle()
        begun_s = time.perf_counter()
        whole_NV = self._group.gather_columns(logits_NV, vocab_rows) if drawing else logits_NV
        if self._group.size > 1:
            self._work.spent("exchange", begun_s, time.perf_counter())
        self._pacer.start()
        if self._place.rank != 0 or whole_NV is None:
            return
        draws = [draw for row, chunk in _first_rows(batch.chunks) for draw in _draws(chunk, row)]
        token_ids = _accepted(batch.chunks, draws, sample(whole_NV, draws))
        logits: dict[int, Sequence[bytes]] = {}
        for row, draw, _ in draws:
            of_sequence = logits.get(draw.sequence_id, [])
            if draw.sampling.return_logits and len(of_sequence) < len(token_ids[draw.sequence_id]):
                logits[draw.sequence_id] = [*of_sequence, bytes(tensor_bytes(whole_NV[row].float()))]
        self._pacer.settle()
        result = StepResult(step_id=batch.step_id, token_ids=token_ids, logits=logits)
        self._coordinator.send(Kind.RESULT, pack_result(result))

    def report(self) -> WorkerReport:
        peers = self._stage.split.device_ids
        sent_bytes = {peers[rank]: count for rank, count in self._group.sent_bytes.items()}
        sent_bytes |= {device_id: outbox.sent_bytes for device_id, outbox in self._next.items()}
        return WorkerReport(
            device_id=self._device.id,
            parameters=self._model.parameters,
            read_bytes=self._model.read_bytes,
            streamed_bytes=self._model.streamed_bytes - self._rehearsed_bytes,
            held_bytes=self._model.held_bytes,
            peak_bytes=self._meter.peak_bytes(),
            sent_bytes=sent_bytes,
            **self._work.report(),
        )


_Drawing = tuple[int, Draw, int]
"""(row of the logits, draw, position of the token before)"""


def _first_rows(chunks: Sequence[Chunk]) -> Iterator[tuple[int, Chunk]]:
    """Of the logits, with the chunk that it and maybe further ones are of."""
    row = 0
    for chunk in chunks:
        if chunk.sampling is not None:
            yield row, chunk
        row += chunk.num_draws


def _draws(chunk: Chunk, row: int) -> Iterator[_Drawing]:
    assert chunk.sampling is not None
    position = chunk.stop - 1
    for draft in range(chunk.num_draws):
        draw = Draw(chunk.sequence_id, chunk.sampling)
        yield row + draft, draw, position - chunk.num_drafts + draft
    yield from ((row, fork, position) for fork in chunk.forks)


def _accepted(
    chunks: Sequence[Chunk], draws: Sequence[_Drawing], token_ids: Sequence[int]
) -> dict[int, Sequence[int]]:
    """By sequence its tokens up to the first that was not what a draft said."""
    drafts = {chunk.sequence_id: chunk.token_ids[-chunk.num_drafts :] for chunk in chunks if chunk.num_drafts}
    accepted: dict[int, list[int]] = {}
    for (_, draw, _), token_id in zip(draws, token_ids, strict=True):
        so_far = accepted.setdefault(draw.sequence_id, [])
        if so_far == list(drafts.get(draw.sequence_id, ())[: len(so_far)]):
            so_far.append(token_id)
    return dict(accepted)


def _identity(partial: Tensor) -> Tensor:
    return partial


def _rehearsal(num_kv_blocks: int) -> Iterator[ScheduledBatch]:
    """Prefill of two sequences, then a decode step of both; the blocks of one lie in no order."""
    tables = (tuple(range(num_kv_blocks)), tuple(reversed(range(num_kv_blocks))))
    for step_id, (start, stop) in enumerate(((0, 2), (2, 3))):
        yield ScheduledBatch(
            step_id=step_id,
            chunks=tuple(
                Chunk(
                    sequence_id=number,
                    start=start,
                    token_ids=(0,) * (stop - start),
                    block_ids=table,
                    sampling=SamplingParams(max_tokens=1),
                )
                for number, table in enumerate(tables)
            ),
        )
