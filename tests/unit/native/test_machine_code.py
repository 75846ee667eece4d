"""Compiled code is kept where it may be written, until anything that it is made of changes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from numba import njit

from apportion.model.backends.cpu import block_moves
from apportion.native import machine_code
from apportion.native.machine_code import Locator, named

FILE = block_moves.__file__


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    machine_code._stamp.cache_clear()
    machine_code._of_this_process.cache_clear()
    yield
    machine_code._stamp.cache_clear()
    machine_code._of_this_process.cache_clear()


def locator() -> Locator:
    found = Locator.from_function(block_moves._copy, FILE)
    assert found is not None
    return found


def test_beside_the_source():
    assert Path(locator().get_cache_path()) == Path(FILE).parent / "__pycache__"


def test_only_for_this_package():
    assert Locator.from_function(os.path.join, os.__file__) is None


def read_only(*forbidden: Path):
    """Folders below these cannot be written to; a superuser may write anywhere, so this is no matter of modes."""

    def ensure(self: Locator) -> None:
        if any(Path(self.get_cache_path()).is_relative_to(folder) for folder in forbidden):
            raise PermissionError(self.get_cache_path())

    return ensure


def test_where_the_source_may_not_be_written_in_the_users_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Locator, "ensure_cache_path", read_only(Path(FILE).parent))
    assert Path(locator().get_cache_path()).is_relative_to(tmp_path / "apportion" / "machine-code")


def test_where_nothing_may_be_written_for_this_process_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Locator, "ensure_cache_path", read_only(Path(FILE).parent, tmp_path))
    path = Path(locator().get_cache_path())
    assert path.is_dir()
    assert path == Path(locator().get_cache_path())


def test_a_folder_that_was_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert Path(locator().get_cache_path()).is_relative_to(tmp_path)


def test_a_change_of_any_source_makes_all_code_too_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Also of one that a function only inlines from."""
    before = locator().get_source_stamp()
    sources = tmp_path / "native"
    sources.mkdir()
    (sources / "words.py").write_text("changed")
    monkeypatch.setattr(machine_code, "_PACKAGE", tmp_path)
    machine_code._stamp.cache_clear()
    changed = machine_code._stamp(FILE)
    (sources / "words.py").write_text("changed again")
    machine_code._stamp.cache_clear()
    assert len({before, changed, machine_code._stamp(FILE)}) == 3


def test_kinds_do_not_share_an_index():
    """Two processes that wrote to one could leave each other's code under their own names."""

    def add(x):
        return x + 1

    kinds = [njit(named(add, kind)) for kind in ("int8", "float32")]
    assert len({kind.py_func.__qualname__ for kind in kinds}) == 2
    assert kinds[0](1) == 2


def test_another_process_compiles_nothing():
    code = (
        "from apportion.model.backends.cpu.block_moves import _copy_blocks\n"
        "from apportion.model.kernels.team import _await_change\n"
        "from apportion.native.machine_code import Locator\n"
        "from apportion.transport.shared_code import add_up\n"
        "for function in (_copy_blocks, _await_change, add_up):\n"
        "    assert isinstance(function._cache._impl.locator, Locator)\n"
        "assert sum(_copy_blocks.stats.cache_hits.values()) == 1\n"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


HITS = """
import numpy as np
from apportion.model.kernels import layer
from apportion.model.kernels.attend_op import attend_op
from apportion.model.kernels.look_up_op import look_up_op
from apportion.model.kernels.op_code import Op
from apportion.model.kernels.product import product_op

ops = [value for value in vars(layer).values() if isinstance(value, Op)]
for name in ("float32", "int16", "uint16", "int8"):
    elements = np.dtype(name)
    ops += [look_up_op(elements), product_op(elements), *([] if name == "int8" else [attend_op(elements)])]
print(len(ops), *(op.name for op in ops if not op.compiled.cache_hits))
"""


def test_no_operation_is_compiled_a_second_time():
    """Nor where its code was made for one of several types."""
    first, second = (
        subprocess.run(
            [sys.executable, "-c", HITS], capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(2)
    )
    assert int(first[0]) > 15
    assert second == first[:1]
