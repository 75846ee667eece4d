"""The compiled kernels give the same bits whatever the compiler makes of them: for a processor with shorter vectors,
without its own vectors, and with fewer optimisations."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_bits import PARTS, hashes

from apportion.model.kernels.tile_code import LANES

SCRIPT = Path(__file__).parents[2] / "kernel_bits.py"
HASWELL = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c,+bmi,+bmi2"}
"""Vectors of 8 lanes, and half as many registers."""
VARIANTS = {
    "8 lanes": HASWELL,
    "no vectors of the compiler's": {"NUMBA_LOOP_VECTORIZE": "0"},
    "vectors of neighbours": {"NUMBA_SLP_VECTORIZE": "1"},
    "few optimisations": {"NUMBA_OPT": "1"},
}


def compiled_anew(cache: Path, settings: dict[str, str], *parts: str) -> dict[str, str]:
    environment = {**os.environ, **settings, "NUMBA_CACHE_DIR": str(cache)}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, SCRIPT, *parts], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(LANES < 8, reason="another instruction set")
def test_layers_of_a_processor_with_shorter_vectors(tmp_path: Path):
    assert compiled_anew(tmp_path, HASWELL, "layer") == hashes("layer")


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.skipif(LANES < 8, reason="another instruction set")
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_everything(settings: dict[str, str], tmp_path: Path):
    assert compiled_anew(tmp_path, settings, *PARTS) == hashes(*PARTS)
