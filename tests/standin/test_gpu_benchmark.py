"""benchmarks/gpu.py on the stand-in, in miniature: both sides, memory, the sampler, the
file. And what else asks `torch.accelerator`."""

import json
import sys

import pytest
import torch
from grpo_nb.loading import resolve_device
from grpo_nb.run.training import peak_memory
from helpers import ROOT

pytest.importorskip("trl")
sys.path.append(str(ROOT / "benchmarks"))
import gpu


def test_auto_and_peak_memory_are_those_of_the_device():
    assert resolve_device("auto") == torch.device("standin")
    torch.accelerator.reset_peak_memory_stats()
    x = torch.ones(2**20, device="standin")
    peak = torch.accelerator.max_memory_allocated()
    assert peak >= x.nbytes and peak_memory(x.device) == peak / 2**20


@pytest.fixture
def in_this_process(monkeypatch):
    "Every part is measured here: another process would not know the device."

    def finish(command, limit):
        gpu.main(command[2:])
        return {"status": "done"}

    monkeypatch.setattr(gpu, "finish", finish)
    monkeypatch.setattr(gpu, "BEGAN", gpu.time.monotonic())
    # transformers has a list of the kinds that know bfloat16
    known = "transformers.training_args.is_torch_bf16_gpu_available"
    monkeypatch.setattr(known, lambda: True)


def test_the_benchmark_in_miniature(tmp_path, in_this_process, capsys):
    path = tmp_path / "gpu.json"
    words = ["--parts", "d,sampler,a", "--miniature", "--output", str(path)]
    gpu.main(words)
    record = json.loads(path.read_text())
    assert record["machine"]["gpu"] == "stand-in"
    assert record["machine"]["gpu_memory_gib"] == 16
    parts = record["parts"]
    assert [part["status"] for part in parts.values()] == ["done"] * 3
    for name in ("d", "a"):
        found = parts[name]
        assert len(found["pairs"]) == 1 and found["speedup"] > 0
        for side in ("ours", "trl"):
            assert 0 < found["memory"][side]["above_state"] < 2**30
        assert found["memory"]["ours"]["state"] == found["memory"]["trl"]["state"]
        assert found["memory_ratio"] == gpu.ratio_of_peaks(found["memory"])
    assert parts["d"]["completion_tokens_ours"] == 4 * 4
    assert parts["d"]["completion_tokens_trl"] == 4 * 4
    assert parts["sampler"]["tokens_per_second"] > 0
    said = capsys.readouterr().out
    assert "On stand-in, torch" in said and record["text"] in said


def test_both_sides_are_on_the_device(in_this_process, tmp_path, monkeypatch):
    "Accelerate, too, which does not know this kind by itself."
    seen = []
    alternate = gpu.measure.__globals__["alternate"]
    trl = gpu.measure.__globals__["TRL"]

    class Watched(trl):
        def run(self):
            super().run()
            seen.extend([self.policy.device.type, self.reference.device.type])

    monkeypatch.setitem(gpu.measure.__globals__, "TRL", Watched)
    setting = gpu.miniature(gpu.SETTINGS["a"])
    device = torch.device("standin")
    directory = gpu.save_model(setting.model, tmp_path, device)
    ours, theirs, _ = alternate(setting, directory, device, 1, 0)
    assert seen == ["standin", "standin"] and len(ours) == len(theirs) == 1
