"""The Triton kernel in Triton's interpreter: in a process of its own, because the switch is read when triton is
imported, which torch may have done here. The tests are in `region_grad_triton_cases.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_kernel_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="the extra `triton` is not installed")
    cases = Path(__file__).parent / "region_grad_triton_cases.py"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(cases)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout


def test_importing_thrifty_does_not_import_triton() -> None:
    code = "import sys, thrifty, thrifty.kernels.region_grad; sys.exit('triton' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
