"""The tests for a GPU on a stand-in for one, in processes of their own.

The stand-in (tests/standin) runs on the CPU, refuses what CUDA refuses, and counts
launches and syncs. By hand: GRPO_NB_DEVICE=standin python -m pytest tests/standin"""

import pytest
from compiling import missing
from helpers import ROOT, python


@pytest.mark.parametrize("tests", ["test_gpu.py", "standin"])
def test_on_the_stand_in(tests, monkeypatch):
    reason = missing()
    if reason:
        pytest.skip(f"no stand-in for a GPU: {reason}")
    monkeypatch.setenv("GRPO_NB_DEVICE", "standin")
    process = python(
        *("-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", f"tests/{tests}"),
        cwd=ROOT,
        timeout=900,
    )
    assert process.returncode == 0, process.stdout[-20_000:] + process.stderr[-2_000:]
