"""Whatever accelerator torch knows, by `torch.accelerator`: what is chosen, measured
and connected, with stand-ins for torch's answers. tests/test_gpu.py runs on one."""

import importlib
import re

import pandas as pd
import pytest
import torch

from grpo_nb.engine import distributed
from grpo_nb.engine.decoding import lacks_memory
from grpo_nb.evidence import plots
from grpo_nb.loading import load_policy, resolve_device
from grpo_nb.run import training
from grpo_nb.run.training import peak_memory, train
from helpers import ROOT, read_metrics, short_config

META = torch.device("meta")  # a device that is no CPU and that every machine has


def named(monkeypatch, device, **answers):
    "Let `torch.accelerator` name a device, and give these answers."
    answers.setdefault("current_accelerator", lambda check_available=False: device)
    answers.setdefault("is_available", lambda: device is not None)
    for name, answer in answers.items():
        monkeypatch.setattr(torch.accelerator, name, answer)


def without_float64(monkeypatch):
    "Let the meta device refuse float64 as Apple's MPS does."
    checks = importlib.import_module("grpo_nb.checks")
    empty = torch.empty

    def refusing(*size, dtype=None, device=None, **options):
        if dtype == torch.float64 and torch.device(device or "cpu") == META:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return empty(*size, dtype=dtype, device=device, **options)

    monkeypatch.setattr(checks.torch, "empty", refusing)


def test_auto_is_the_accelerator_that_torch_names(monkeypatch):
    "Of whatever kind; without one, the CPU."
    named(monkeypatch, META)
    assert resolve_device("auto") == META
    named(monkeypatch, None)
    assert resolve_device("auto") == torch.device("cpu")


def test_auto_asks_what_is_available_not_what_torch_was_built_for(monkeypatch):
    "A torch that was built for CUDA names it on a machine without a GPU, too."

    def current(check_available=False):
        return None if check_available else torch.device("cuda")

    named(monkeypatch, None, current_accelerator=current)
    assert resolve_device() == torch.device("cpu")


def test_auto_passes_a_device_without_float64_by(monkeypatch):
    "Rewards and advantages are computed in it: MPS would fail in its first step."
    named(monkeypatch, META)
    without_float64(monkeypatch)
    assert resolve_device("auto") == torch.device("cpu")
    policy, _ = load_policy("tiny", "auto")
    assert policy.device.type == "cpu"


def test_a_run_on_a_device_without_float64_is_refused(monkeypatch):
    "By name, before a model is loaded; not by a `TypeError` of the first reward."
    monkeypatch.setattr(
        importlib.import_module("grpo_nb.run.options"),
        "resolve_device",
        lambda device: META,
    )
    short_config(device="meta")
    without_float64(monkeypatch)
    with pytest.raises(ValueError, match=r"device = 'meta' has no float64.*\"cpu\""):
        short_config(device="meta")


def test_peak_memory_is_that_of_the_allocator(monkeypatch):
    "In MiB, of the device that was asked for."
    asked = []

    def stats(device):
        asked.append(device)
        return {"allocated_bytes.all.peak": 3 * 2**20, "allocated_bytes.all.current": 5}

    named(monkeypatch, META, memory_stats=stats)
    assert peak_memory(META) == 3.0 and asked == [META]
    assert peak_memory(torch.device("cpu")) > 10 and asked == [META]


def no_statistics(device):
    raise RuntimeError("Allocator for meta is not a DeviceAllocator.")


@pytest.mark.parametrize("stats", [no_statistics, lambda device: {}])
def test_memory_that_is_not_counted_is_not_reported(monkeypatch, stats):
    "Neither as 0, nor as that of the process."
    named(monkeypatch, META, memory_stats=stats)
    assert peak_memory(META) is None


def test_a_run_without_a_peak_of_memory(tmp_path, monkeypatch):
    "Its metrics have no such number, and its table of costs has a gap there."
    monkeypatch.setattr(training, "peak_memory", lambda device: None)
    run = train(
        short_config(max_steps=1, output_dir=str(tmp_path / "run")), progress=False
    )
    (line,) = read_metrics(run.directory)
    assert "step_time" in line and "peak_memory" not in line
    costs = plots._cost([run])
    (name,) = [name for name in costs if "memory" in name]
    assert pd.isna(costs[name])


class Processes:
    "What `init_distributed` asks of torch, as a launch of several processes sees it."

    def __init__(self, monkeypatch, device, count=2, available=(), **environment):
        monkeypatch.setattr(
            distributed.os,
            "environ",
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here"} | environment,
        )
        monkeypatch.setattr(distributed.atexit, "register", lambda f: None)
        self.index, self.backend = None, None
        named(
            monkeypatch,
            device,
            device_count=lambda: count,
            set_device_index=lambda index: setattr(self, "index", index),
        )
        monkeypatch.setattr(
            torch.distributed,
            "init_process_group",
            lambda backend: setattr(self, "backend", backend),
        )
        monkeypatch.setattr(
            torch.distributed,
            "is_backend_available",
            lambda name: name in ("gloo", *available),
        )
        distributed.init_distributed()


@pytest.mark.parametrize(
    "kind, backend",
    [("cuda", "nccl"), ("xpu", "xccl")],
)
def test_each_device_has_its_backend(monkeypatch, kind, backend):
    "And the process takes the device of its local rank."
    met = Processes(
        monkeypatch, torch.device(kind), available=[backend], LOCAL_RANK="1"
    )
    assert met.backend == f"cpu:gloo,{kind}:{backend}" and met.index == 1


def test_processes_without_an_accelerator_meet_by_gloo(monkeypatch):
    met = Processes(monkeypatch, None, LOCAL_RANK="1")
    assert met.backend == "gloo" and met.index is None


@pytest.mark.parametrize("kind", ["cuda", "meta"])
def test_a_device_that_no_backend_sends_leaves_the_cpu(monkeypatch, kind):
    "NCCL is not in every build; other devices register theirs, or have none."
    met = Processes(monkeypatch, torch.device(kind), LOCAL_RANK="1")
    assert met.backend == "gloo"


def test_more_processes_than_devices(monkeypatch):
    "Runs on the CPU need none of their own: rank 3 of two takes the second again."
    met = Processes(
        monkeypatch, torch.device("cuda"), 2, available=["nccl"], LOCAL_RANK="3"
    )
    assert met.index == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.OutOfMemoryError("XPU out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, …)"),
        RuntimeError("NPU out of memory. Tried to allocate 2.00 GiB"),
    ],
    ids=lambda error: str(error).split()[0],
)
def test_a_lack_of_memory_is_known_on_every_device(error):
    assert lacks_memory(error)


def test_the_library_names_no_kind_of_accelerator():
    "`torch.cuda` and its like are one kind's; a name in prose or a list is none."
    kinds = r"torch\.(cuda|mps|xpu|backends\.(cuda|mps))\b|==? [\"']cuda[\"']|:nccl"
    found = []
    for folder in ("grpo_nb", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for line in path.read_text().splitlines():
                if re.search(kinds, line):
                    found.append(f"{path.name}: {line.strip()}")
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        if re.search(kinds, path.read_text().replace('\\"', '"')):
            found.append(path.name)
    assert found == []
