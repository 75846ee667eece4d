"""The coordinator: scheduler, block tables and streams of one plan, and the worker processes that execute it."""

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event
from typing import Any

from apportion.engine.launcher import launch, places, preload
from apportion.engine.place import WorkerBirth, WorkerPlace
from apportion.engine.private_folder import private_folder
from apportion.engine.report import CoordinatorMeter, WorkerReport
from apportion.engine.silence import Silence, load_limit_s, step_limit_s
from apportion.scheduler.admission import check_tokens
from apportion.scheduler.drafts import DraftSource
from apportion.scheduler.limits import SchedulerLimits
from apportion.scheduler.scheduler import Scheduler
from apportion.transport.batches import BatchPacker
from apportion.transport.links import COORDINATOR, Inbox, Message, Outbox
from apportion.transport.wire import Kind, pack, unpack, unpack_result
from apportion.types import errors
from apportion.types.clock import SYSTEM_CLOCK, Clock
from apportion.types.errors import EngineError
from apportion.types.plan import Plan
from apportion.types.record import plain
from apportion.types.request import Request, TokenEvent
from apportion.types.step_costs import PreemptMode

_POLL_S = 0.1
"""How often a silent engine looks whether its workers live."""
_LAST_WORDS_S = 0.5
"""How long a dead worker's last message may still be on its way."""
_ORPHANED = 255
"""Exit code that multiprocessing reports where nobody can tell any more."""
_STOP_S = 5.0
"""How long workers get to report and leave before they are killed."""


class Engine:
    """Executes one plan; a context manager that leaves no process behind.

    `step()` hands out work and returns the tokens of finished microbatches; `generate()` runs requests to the end.
    `folder` may be a config.json where the weights are random; `cores` are those that CPU workers may have for
    themselves (all of this machine); `while_waiting` is called some times a second where the workers are awaited;
    `drafts` guesses what sequences will draw; timeouts read `clock`. Raises the worker's own error, or EngineError
    where one vanished or fell silent.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        eos_token_ids: Iterable[int],
        *,
        random_weights: bool = False,
        trace: bool = False,
        preempt: PreemptMode = "auto",
        cores: Sequence[int] | None = None,
        while_waiting: Callable[[], object] = lambda: None,
        drafts: DraftSource | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.plan = plan
        self._while_waiting, self._clock = while_waiting, clock
        self._woken = Event()
        self.scheduler = Scheduler(SchedulerLimits.of(plan), eos_token_ids, plan.step_costs, preempt, drafts)
        self.reports: dict[str, WorkerReport] = {}
        self._folder, self._cores = folder, cores
        self._random_weights, self._trace = random_weights, trace
        self.meter = CoordinatorMeter(trace=trace)
        self._packer = BatchPacker()
        self._left: set[str] = set()
        self._generation = 0
        """How many plans there were before."""
        self._processes: dict[str, BaseProcess] = {}
        self._outboxes: dict[str, Outbox] = {}
        self._places: dict[str, WorkerPlace] = {}
        self._unheard: set[str] = set()
        """Workers that were started and do not listen yet."""
        self._failed = False
        """Whether a worker has: it is told of once, and nobody is waited for in the end."""
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> "Engine":
        with self._exit:
            run_dir = Path(tempfile.mkdtemp(prefix="", dir=private_folder()))
            self._exit.callback(shutil.rmtree, run_dir, ignore_errors=True)
            self.run_dir = run_dir
            self._inbox = Inbox(run_dir, COORDINATOR)
            self._exit.callback(self._close_links)
            self._exit.callback(self._kill)
            self._load()
            self._exit = self._exit.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._exit:
            if exception[0] is None and not self._failed:
                self.stop()

    def restart(self, plan: Plan) -> list[int]:
        """Goes on with another plan on the same worker processes; returns the requests that can never run under it,
        which have ended.

        Each worker gives up what it holds and takes its new place; one that has none waits, and one that is missing is
        started. Every sequence goes on where it is, and draws what it would have drawn.
        """
        self.plan = plan
        self._generation += 1
        self._packer = BatchPacker()
        self.reports.clear()
        stranded = self.scheduler.restart(SchedulerLimits.of(plan), plan.step_costs)
        self._load()
        return stranded

    def submit(self, request: Request) -> None:
        """Raises UsageError where it can never run."""
        check_tokens(request, self.plan.model.vocab_rows)
        self.scheduler.add(request)

    def cancel(self, request_id: int) -> bool:
        """Ends a request; it yields no further token. False where it is not running."""
        return self.scheduler.cancel(request_id)

    @property
    def num_unfinished(self) -> int:
        """Requests."""
        return self.scheduler.num_unfinished

    @property
    def num_in_flight(self) -> int:
        """Steps."""
        return self.scheduler.num_in_flight

    def worker_pids(self) -> dict[str, int | None]:
        """By device, those that have no place too."""
        return {device_id: process.pid for device_id, process in self._processes.items()}

    def wake(self) -> None:
        """Ends a wait in `step`, or the next one, from any thread."""
        self._woken.set()
        self._inbox.wake()

    def step(self) -> list[TokenEvent]:
        """Starts every microbatch that can run and waits for one to finish; [] where there is no work, or if woken."""
        with self.meter.spend("schedule"):
            while (batch := self.scheduler.schedule()) is not None:
                header = self._packer.pack(batch)
                for device_id in self.plan.stages[0].split.device_ids:
                    self._outboxes[device_id].send(Kind.STEP, header)
        if not self.scheduler.num_in_flight:
            return []
        result = self._receive(Kind.RESULT, self.plan.device_ids)
        if result is None:
            return []
        self.meter.num_steps += 1
        with self.meter.spend("complete"):
            return self.scheduler.complete(unpack_result(result))

    def generate(self, requests: Iterable[Request]) -> Iterator[TokenEvent]:
        """Every token of every request as it is drawn."""
        for request in requests:
            self.submit(request)
        while self.scheduler.num_unfinished:
            yield from self.step()

    def collect(self) -> dict[str, WorkerReport]:
        """Every worker's report of the time since its last one; only while no step is on its way."""
        assert not self.scheduler.num_in_flight
        return self._ask_all(Kind.REPORT, Kind.REPORTED)

    def stop(self) -> dict[str, WorkerReport]:
        """Ends the workers and returns their last reports."""
        return self._ask_all(Kind.STOP, Kind.STOPPED)

    def sent_bytes(self) -> dict[tuple[str, str], int]:
        """Tensor bytes on every directed link between devices, from the workers' last reports."""
        return {
            (report.device_id, receiver): count
            for report in self.reports.values()
            for receiver, count in report.sent_bytes.items()
        }

    def _load(self) -> None:
        """Tells every worker its place, starts those that are missing, and waits until all have loaded."""
        preload(self._folder, self.plan.model)
        for outbox in self._outboxes.values():
            outbox.generation = self._generation
        living = list(self._processes)
        for device_id in self.plan.device_ids:
            if device_id not in self._processes:
                self._start(device_id)
        names = {device_id: str(number) for number, device_id in enumerate(self._processes)}
        self._places = places(
            self.plan,
            self._folder,
            names,
            random_weights=self._random_weights,
            trace=self._trace,
            cores=self._cores,
        )
        for device_id in living:
            self._tell_place(device_id)
        self._await_all(Kind.READY)

    def _start(self, device_id: str) -> None:
        """It is told its place once it listens."""
        name = str(len(self._processes))
        birth = WorkerBirth(device_id=device_id, run_dir=self.run_dir, name=name, generation=self._generation)
        self._processes[device_id] = launch(birth)
        self._outboxes[device_id] = Outbox(self.run_dir, name)
        self._outboxes[device_id].generation = self._generation
        self._unheard.add(device_id)

    def _tell_place(self, device_id: str) -> None:
        self._outboxes[device_id].send(Kind.LOAD, pack(plain(self._places.get(device_id))))

    def _ask_all(self, question: Kind, answer: Kind) -> dict[str, WorkerReport]:
        for outbox in self._outboxes.values():
            outbox.send(question)
        if question is Kind.STOP:
            self._left |= self._processes.keys() - self._places.keys()
        self._await_all(answer)
        return dict(self.reports)

    def _await_all(self, kind: Kind) -> None:
        missing = set(self.plan.device_ids)
        while missing:
            header = self._receive(kind, missing)
            if header is None:
                continue
            report = WorkerReport(**unpack(header))
            self.reports[report.device_id] = report
            missing.discard(report.device_id)
            if kind is Kind.STOPPED:
                self._left.add(report.device_id)

    def _receive(self, wanted: Kind, missing: Iterable[str]) -> bytes | None:
        """The header of the next message of that kind, from one of the workers in `missing`; None once woken. Results
        still on their way while stopping are dropped."""
        try:
            return self._await(wanted, missing)
        except Exception:
            self._failed = True
            raise

    def _await(self, wanted: Kind, missing: Iterable[str]) -> bytes | None:
        limit_s = load_limit_s(self.plan) if wanted is Kind.READY else step_limit_s(self.plan)
        silence = Silence(self._processes, missing, limit_s, self._clock)
        while True:
            message = self._clock.wait(self._inbox.receive, _POLL_S)
            if message is None and self._woken.is_set():
                self._woken.clear()
                return None
            message = message or self._last_words(silence)
            if message is None:
                continue
            kind, header = message.kind, message.header
            if kind is Kind.FAILED:
                raise _worker_error(*unpack(header))
            if message.generation < self._generation:
                continue  # of the plan before
            if kind is Kind.HERE:
                self._heard(unpack(header), silence)
            if kind is wanted:
                return header

    def _heard(self, device_id: str, silence: Silence) -> None:
        """Of a worker that listens now, or has answered."""
        if device_id in self._unheard:
            self._unheard.discard(device_id)
            self._tell_place(device_id)
        else:
            silence.answered(device_id)

    def _last_words(self, silence: Silence) -> Message | None:
        """Of a worker that is gone, after a silent moment. Raises EngineError where it left none, or one that lives has
        been silent for too long."""
        self._while_waiting()
        dead = self._dead_worker()
        if dead is None:
            if silence.look():
                for outbox in self._outboxes.values():
                    outbox.send(Kind.ASK)
            return None
        message = self._clock.wait(self._inbox.receive, _LAST_WORDS_S)
        if message is None:
            code = self._processes[dead].exitcode
            if code == _ORPHANED:
                raise EngineError("the process that workers are forked from died; run again")
            raise EngineError(
                f"the worker of device {dead} died (exit code {code}); run again, or plan without it"
            )
        return message

    def _dead_worker(self) -> str | None:
        """A worker that is gone without having said so."""
        gone = (device_id for device_id, process in self._processes.items() if not process.is_alive())
        return next((device_id for device_id in gone if device_id not in self._left), None)

    def _close_links(self) -> None:
        for link in (self._inbox, *self._outboxes.values()):
            link.close()

    def _kill(self) -> None:
        deadline_s = self._clock.now_s() + (_STOP_S if len(self._left) == len(self._processes) else 0)
        while alive := [p.sentinel for p in self._processes.values() if p.is_alive()]:
            left_s = deadline_s - self._clock.now_s()
            if left_s <= 0:
                break
            self._clock.wait(lambda timeout_s, alive=alive: wait(alive, timeout_s) or None, left_s)
        for process in self._processes.values():
            process.kill()
            process.join()
            if process.exitcode == _ORPHANED and process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)


def _worker_error(device_id: str, name: str, message: str) -> Exception:
    error_class: Any = getattr(errors, name, EngineError)
    if error_class is EngineError:
        return EngineError(f"the worker of device {device_id} failed: {message}")
    return error_class(message)
