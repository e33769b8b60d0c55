"""The tests for a GPU on a stand-in for one, in processes of their own.

The stand-in (tests/standin) runs on the CPU, refuses what CUDA refuses, and counts
launches and syncs. By hand: GRPO_NB_DEVICE=standin python -m pytest tests/standin"""

import json

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


def test_a_few_placements_are_noticed(monkeypatch):
    "Of all, tests/standin/mutate.py tells by hand, in some minutes."
    reason = missing()
    if reason:
        pytest.skip(f"no stand-in for a GPU: {reason}")
    arguments = ("tests/standin/mutate.py", "--sample", "2", "--seed", "0")
    process = python(*arguments, cwd=ROOT, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr[-2_000:]


def test_the_recorded_counts_are_whole():
    "Chapter `cost` shows them: by `python benchmarks/launches.py`."
    recorded = json.loads((ROOT / "benchmarks/results/launches.json").read_text())
    assert f"torch=={recorded['torch']}" in (ROOT / "constraints.txt").read_text()
    both = {"sampling", "reference", "reward", "advantages", "update", "record"}
    for algorithm, stages in {"grpo": both, "ppo": both | {"values"}}.items():
        for kind in ("launches", "syncs"):
            counts = recorded[algorithm][kind]
            assert set(counts) == stages | {"other"}
            assert all(n >= 0 for n in counts.values())
        assert sum(recorded[algorithm]["syncs"].values()) < 75
