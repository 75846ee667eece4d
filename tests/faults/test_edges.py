"""What surrounds a run: the current folder, the temporary one, full disks, locales, limits, signals. Each costs one
line and an exit code, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from command import small_model
from faults.processes import assert_gone, children
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import cpu_device, hand_plan
from virtual_clock import VirtualClock

import apportion
from apportion.catalog.hub import resolve_model
from apportion.catalog.model_config import read_model_spec
from apportion.cli.main import exit_code
from apportion.engine import private_folder
from apportion.engine.engine import Engine
from apportion.engine.pipelines import served
from apportion.engine.silence import Silence
from apportion.probe.processor import num_cores
from apportion.probe.saved import probe_file, save_rates
from apportion.transport.links import COORDINATOR
from apportion.transport.pairs import PeerLostError, connect_pairs
from apportion.types.children import python
from apportion.types.cpu import CpuRates, rates_per_format
from apportion.types.errors import EngineError
from apportion.types.plan import Plan
from apportion.types.request import Request, SamplingParams

COMMAND = str(Path(sys.executable).with_name("apportion"))
TWO = "a=cpu:40MiB, b=cpu:40MiB"
RUN = ("run", "demo", "ROMEO:", "--devices", TWO, "--max-tokens", "4")
PLAN = ("plan", "demo", "--devices", TWO)
LONG = (*RUN[:-1], "900", "--ignore-eos", "--devices", "a=cpu:40MiB@0.2, b=cpu:40MiB@0.2")


@pytest.fixture(scope="module", autouse=True)
def probed() -> Iterator[None]:
    """Commands need not measure the processor again and again."""
    rates = CpuRates(
        read_bytes_per_s=1e10,
        flops_per_s=rates_per_format(5e10),
        copied_bytes_per_s=5e9,
        cached_read_bytes_per_s=5e10,
        cached_copied_bytes_per_s=1e10,
    )
    save_rates(dict.fromkeys({1, num_cores()}, rates), None)
    yield
    probe_file().unlink()


def run(
    *command: str,
    cwd: Path | None = None,
    shell: str = "",
    environment: Mapping[str, str] = {},
) -> subprocess.CompletedProcess[bytes]:
    """The command, after what `shell` sets."""
    given = {key: value for key, value in environment.items() if value}
    without = {key for key, value in environment.items() if not value}
    kept = {key: value for key, value in os.environ.items() if key not in without}
    return subprocess.run(
        ["bash", "-c", f'{shell}\nexec "$@"', "bash", *command],
        cwd=cwd,
        env={**kept, **given},
        capture_output=True,
        timeout=120,
    )


def one_line(done: subprocess.CompletedProcess[bytes], code: int, message: str = "") -> None:
    """The last line of stderr is the error; others may only say what a plan rests on."""
    errors = done.stderr.decode(errors="replace")
    assert done.returncode == code, errors
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("apportion: error: "), errors
    assert message in errors


def refused(capsys: pytest.CaptureFixture[str], *command: str, message: str = "") -> None:
    """In this process, where nothing is to be started."""
    code = exit_code(list(command))
    said = capsys.readouterr()
    assert code == 2, said.err
    assert said.err.strip().splitlines()[-1].startswith("apportion: error: ")
    assert message in said.err
    assert "tokens/s" not in said.out + said.err


# The current folder


def imported_modules() -> set[str]:
    """All that planning and running import, and the whole standard library."""
    program = (
        "import sys, pkgutil, importlib, apportion\n"
        "for module in pkgutil.walk_packages(apportion.__path__, 'apportion.'):\n"
        "    if not module.name.endswith('__main__'): importlib.import_module(module.name)\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(python("-c", program), capture_output=True, text=True, check=True)
    names = {*done.stdout.split(), *sys.stdlib_module_names}
    return {name for name in names if name.isidentifier() and name != "__main__"}


def before_any_program() -> set[str]:
    """What `python -m` itself imports, and takes out of the current folder whatever it is to run."""
    program = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "program.py").write_text(program)
        done = subprocess.run(
            [sys.executable, "-m", "program"], cwd=folder, capture_output=True, text=True, check=True
        )
    return set(done.stdout.split())


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with a module of every name: each leaves its name in a file when it is imported."""
    folder = tmp_path_factory.mktemp("planted")
    small_model(folder)
    for name in imported_modules():
        (folder / f"{name}.py").write_text(
            f"import posix\nposix.close(posix.open({str(folder / 'ran')!r}, posix.O_CREAT | posix.O_WRONLY))\n"
        )
    return folder


@pytest.mark.parametrize(
    "command",
    [
        (COMMAND, "plan", ".", "--devices", "a=cpu:64MiB", "--context", "64", "--no-calibration"),
        (COMMAND, *RUN),
        (sys.executable, "-m", "apportion", *RUN),
    ],
    ids=["plan", "run", "-m run"],
)
def test_no_code_of_the_current_folder_runs(planted: Path, command: tuple[str, ...]):
    if command[1] == "-m":
        for name in ("apportion", *before_any_program()):
            (planted / f"{name}.py").unlink(missing_ok=True)
    done = run(*command, cwd=planted)
    assert not (planted / "ran").exists()
    assert done.returncode == 0, done.stderr.decode()
    assert Path(apportion.__file__).parent.name == "apportion"


def test_numba_takes_no_cache_from_the_current_folder(tmp_path: Path):
    (tmp_path / ".numba_config.yaml").write_text(f"cache_dir: {tmp_path}/cache\n")
    assert run(COMMAND, *RUN, cwd=tmp_path).returncode == 0
    assert not (tmp_path / "cache").exists()


# Temporary folders


def test_a_long_temporary_folder_is_passed_over(tmp_path: Path):
    long = tmp_path / ("x" * 90)
    long.mkdir()
    done = run(COMMAND, *RUN, environment={"TMPDIR": str(long)})
    assert done.returncode == 0, done.stderr.decode()
    assert list(long.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGHUP, 129),
        (signal.SIGTERM, 143),
        (signal.SIGKILL, -9),
        (signal.SIGINT, 130),
    ],
)
def test_nothing_is_left_of_a_run_that_was_ended(tmp_path: Path, number: signal.Signals, code: int):
    """No worker, and no folder: at once, or by the next to start where the run could do nothing. Ctrl-C reaches all its
    processes, and twice."""
    process = started(tmp_path)
    below = children(process.pid)
    assert len(below) >= 3  # forkserver (and resource tracker), two workers
    if number is signal.SIGINT:
        os.killpg(process.pid, number)
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code
    assert b"Traceback" not in errors
    assert_gone(below)
    if code < 0:
        private_folder._sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_a_living_process_is_left(tmp_path: Path):
    folder = private_folder._locked(tmp_path)
    private_folder._sweep(tmp_path)
    assert folder.exists()


def default_signals() -> None:
    """As from a terminal, also where the tests run in the background or under nohup, which have signals ignored."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


def started(temporary: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [COMMAND, *LONG],
        preexec_fn=default_signals,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert process.stdout is not None
    while b"ROMEO" not in process.stdout.readline():
        assert process.poll() is None
    return process


def test_all_processes_end_with_the_command():
    """None runs on for a second: they are looked for as soon as the command has ended."""
    process = subprocess.Popen([COMMAND, *RUN], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seen: set[int] = set()
    while process.poll() is None:
        seen |= set(children(process.pid))
        time.sleep(0.02)
    assert seen
    assert_gone(seen, within_s=0.5)


# Full disks


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file system without room."""
    folder = tmp_path / "full"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount here: {mounted.stderr.decode().strip()}")
    try:
        with (folder / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
    except OSError:
        pass
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_temporary_folder_is_passed_over_or_told(full: Path):
    done = run(COMMAND, *RUN, environment={"TMPDIR": str(full)})
    assert done.returncode == 0 or (done.returncode == 4 and b"Traceback" not in done.stderr)


def test_a_full_cache_costs_nothing_but_time(full: Path):
    done = run(COMMAND, *RUN, environment={"XDG_CACHE_HOME": str(full)})
    assert done.returncode == 0, done.stderr.decode()


def test_an_old_file_outlives_a_full_disk(full: Path):
    old = full / "plan.json"
    old.write_bytes(b"")
    done = run(COMMAND, *PLAN, "--out", str(old))
    one_line(done, 2, "plan.json")
    assert [path.name for path in full.iterdir() if path.name != "filler"] == ["plan.json"]


@pytest.mark.parametrize(
    "command",
    [PLAN, RUN, ("plan", "--help"), ()],
    ids=["plan", "run", "help", "welcome"],
)
@pytest.mark.parametrize(
    ("shell", "reason"),
    [("exec >/dev/full", b"No space left on device"), ("exec >&-", b"it is closed")],
    ids=["full", "closed"],
)
def test_output_that_takes_nothing_is_one_line(shell: str, reason: bytes, command: tuple[str, ...]):
    done = run(COMMAND, *command, shell=shell)
    assert done.stderr.splitlines()[-1] == b"apportion: error: cannot write standard output: " + reason
    assert b"Traceback" not in done.stderr
    assert done.returncode == 2


def test_a_plan_is_kept_though_output_is_closed(tmp_path: Path):
    """Even as the first file that is opened, which would have the number of standard output."""
    out = tmp_path / "plan.json"
    done = run(COMMAND, *PLAN, "--out", str(out), shell="exec <&- >&-")
    one_line(done, 2, "cannot write standard output")
    assert run(COMMAND, "verify", str(out)).returncode == 0


def test_closed_errors_disturb_nothing():
    assert run(COMMAND, *PLAN, shell="exec 2>&- <&-").stdout.startswith(b"demo in fp32 fits")
    assert run(COMMAND, "plan", "demo", "--devices", "nonsense", shell="exec 2>&- >&-").returncode == 2


def test_a_reader_that_has_enough_is_no_error():
    done = run("bash", "-c", f'"{COMMAND}" --version | true; exit ${{PIPESTATUS[0]}}')
    assert done.stderr == b""


@pytest.mark.parametrize(
    "command",
    [
        (*PLAN, "--out"),
        (*PLAN, "--plot"),
        (*RUN, "--stats-json"),
        ("bench", "demo", "--devices", TWO, "--trace"),
        ("probe", "--out"),
    ],
    ids=lambda words: words[-1],
)
@pytest.mark.parametrize("place", ["missing/file.svg", "."])
def test_output_files_are_checked_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...], place: str
):
    refused(capsys, *command, str(tmp_path / place), message=command[-1])
    assert list(tmp_path.iterdir()) == []


# Text and numbers


@pytest.mark.parametrize(
    "environment",
    [{"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "ascii"}],
    ids=["C", "ascii"],
)
def test_any_locale_will_do(environment: dict[str, str]):
    done = run(COMMAND, *PLAN, "--why", environment=environment)
    assert done.returncode == 0, done.stderr.decode()


def test_text_in_no_encoding_is_refused():
    one_line(run(COMMAND, "run", "demo", b"\xff\xfe"), 2, "UTF-8")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "command",
    [
        ("run", "demo", "", "--devices", TWO),
        ("run", "demo", "x", "--devices", TWO, "--seed", str(2**64)),
        ("run", "demo", "x", "--devices", TWO, "--max-tokens", str(2**64)),
        ("run", "demo", "x", "--devices", TWO, "--temperature", "nan"),
        ("plan", "demo", "--devices", "a=cpu:64MiB@1e-300"),
        ("plan", "demo", "--devices", "../../x=cpu:64MiB"),
        ("plan", "demo", "--devices", "coordinator=cpu:64MiB"),
        ("plan", "demo", "--devices", "..=cpu:64MiB"),
    ],
    ids=str,
)
def test_what_is_typed_is_refused_in_one_line(capsys: pytest.CaptureFixture[str], command: tuple[str, ...]):
    refused(capsys, *command)


NESTED = "[" * 10**5


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        "plan.json",
        "cluster.toml",
    ],
)
def test_deep_nesting_in_any_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    demo = resolve_model("demo", weights=True)
    for file in demo.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).write_text(f"a = {NESTED}" if name.endswith("toml") else NESTED)
    options = {"plan.json": ("--plan",), "cluster.toml": ("--cluster",)}.get(name, ())
    refused(
        capsys,
        "run",
        str(tmp_path),
        "x",
        *(word for option in options for word in (option, str(tmp_path / name))),
    )


def test_deep_nesting_in_a_file_of_ours_is_as_none(tmp_path: Path):
    (tmp_path / "apportion").mkdir()
    for name in ("probe.json", "calibration.json"):
        (tmp_path / "apportion" / name).write_text(NESTED)
    assert run(COMMAND, *PLAN, environment={"XDG_CACHE_HOME": str(tmp_path)}).returncode == 0


# Limits of the shell


@pytest.mark.parametrize("limit", ["-n 14", "-v 700000"])
def test_small_limits_are_one_line_or_enough(limit: str):
    done = run(COMMAND, *RUN, shell=f"ulimit {limit}")
    if done.returncode:
        assert done.returncode != 130, "it looks like Ctrl-C"
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        one_line(done, 4)


def test_links_take_no_more_address_space_than_they_need():
    done = run(COMMAND, *RUN, shell="ulimit -v 2000000")
    assert done.returncode == 0, done.stderr.decode()


# Compiled code


def test_damaged_compiled_code_is_compiled_again(tmp_path: Path):
    """Whatever byte of it is wrong, or missing."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    program = (
        "from apportion.engine.pacing import Pacer, _start\n"
        "Pacer(0.5).settle()\n"
        "print(sum(_start.stats.cache_hits.values()))"
    )

    def hits() -> int:
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert hits() == 0
    assert hits() == 1
    files = [path for path in tmp_path.rglob("*lambda*") if path.suffix in (".nbi", ".nbc")]
    assert files
    for number, path in enumerate(files):
        content = path.read_bytes()
        damaged = [content[:-1], b"", bytes(len(content)), content[:99] + b"\x00" + content[100:]]
        path.write_bytes(damaged[number % len(damaged)])
    assert hits() == 0
    assert hits() == 1
    for folder in [tmp_path, *(path for path in tmp_path.rglob("*") if path.is_dir())]:
        folder.chmod(0o777)
    assert hits() in (0, 1)  # from beside the source


# Workers that say nothing


@pytest.fixture
def demo_plan() -> Plan:
    return hand_plan(read_model_spec(resolve_model("demo", weights=True)), [[1], [1], [1]], [3, 3, 2])


def test_a_stopped_worker_is_named(demo_plan: Plan):
    """Seconds of silence pass in as many milliseconds, once the model is loaded."""
    clock = VirtualClock(jumps=False)
    engine = Engine(demo_plan, resolve_model("demo", weights=True), [], clock=clock)
    with pytest.raises(EngineError, match=r"worker of device d1 is stopped: nothing for 2\d s"), engine:
        for number, _ in enumerate(engine.generate([LONG_REQUEST])):
            if number == 3:
                os.kill(engine.worker_pids()["d1"] or 0, signal.SIGSTOP)
                clock.jumps = True


def test_a_group_whose_member_never_comes_is_given_up(tmp_path: Path):
    clock = VirtualClock()
    with pytest.raises(PeerLostError, match="no member listens at group-0-1"):
        connect_pairs(tmp_path, "group", 1, 2, clock)
    assert 60 <= clock.now_s() < 61


LONG_REQUEST = Request(id=0, prompt_ids=(5, 6, 7), sampling=SamplingParams(max_tokens=50, ignore_eos=True))


class _Process:
    pid = os.getpid()


def test_who_answers_is_not_blamed_and_who_computes_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    clock = VirtualClock()
    computed_s = {"busy": 0.0, "idle": 0.0}
    monkeypatch.setattr(Silence, "_cpu_s", lambda _, device_id: computed_s[device_id])
    processes = dict.fromkeys(("busy", "idle"), _Process())
    watch = Silence(processes, ("busy", "idle"), 30, clock)  # pyright: ignore[reportArgumentType]
    asked = False
    while not asked:
        clock.advance(0.5)
        computed_s["busy"] += 0.5
        asked = watch.look()
    assert 29 <= clock.now_s() <= 31
    watch.answered("idle")
    with pytest.raises(EngineError, match="device busy computes without end"):
        while True:
            clock.advance(0.5)
            computed_s["busy"] += 0.5
            assert not watch.look()
    assert clock.now_s() >= 10 * 30
    begun_s = clock.now_s()
    watch = Silence(processes, ("busy", "idle"), 30, clock)  # pyright: ignore[reportArgumentType]
    with pytest.raises(EngineError, match="device idle does not answer"):
        while True:
            clock.advance(0.5)
            computed_s["busy"] += 0.5
            watch.look()
    assert clock.now_s() - begun_s < 40


@given(st.lists(st.floats(0.05, 500), min_size=1, max_size=60))
@settings(max_examples=50)
def test_time_in_which_the_engine_itself_is_stopped_does_not_count(gaps: list[float]):
    clock = VirtualClock()
    watch = Silence({"d": _Process()}, ("d",), 1e9, clock)  # pyright: ignore[reportArgumentType]
    for gap in gaps:
        clock.advance(gap)
        watch.look()
    assert watch._passed_s <= len(gaps)


# Names


def test_sockets_have_numbers(demo_plan: Plan):
    with Engine(demo_plan, resolve_model("demo", weights=True), []):
        names = {path.name for path in private_folder.private_folder().rglob("*") if path.is_socket()}
    assert {COORDINATOR, "0", "1", "2"} <= names


def test_replicas_end_when_interrupted():
    """Even while one of their workers is stopped: nobody waits for what it does not say."""
    model = read_model_spec(resolve_model("demo", weights=True))
    plans = [hand_plan(model, [[1]], [8], devices=[cpu_device(name)]) for name in ("a", "b")]
    folder = resolve_model("demo", weights=True)
    requests = [replace(LONG_REQUEST, id=number) for number in range(4)]
    below: list[int] = []
    begun_s = 0.0
    with pytest.raises(KeyboardInterrupt), served(plans, folder, []) as serving:
        below += [process.pid or 0 for engine in serving.engines for process in engine._processes.values()]
        for number, _ in enumerate(serving.stream(requests)):
            if number == 5:
                for pid in below:
                    os.kill(pid, signal.SIGSTOP)
                begun_s = time.monotonic()
                raise KeyboardInterrupt
    assert time.monotonic() - begun_s < 10
    assert_gone(below)
