"""Several processes: the gradient of one, runs that are whole, stop together and go
on; two at a time, over gloo, on the CPU."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from grpo_nb.engine import distributed
from grpo_nb.run import build, command_line, training
from grpo_nb.engine.distributed import (
    all_gather_object,
    all_gather_rows,
    all_reduce,
    broadcast_object,
    full_tensor,
    get_rank,
    get_world_size,
    local_slice,
    raised_everywhere,
    shard_like,
)
from grpo_nb.run.checkpoint import checkpoints
from grpo_nb.run.training import open_run, train
from helpers import ROOT, read_metrics, reproducible, short_config, start_process
import worker

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
}  # what `accelerate launch --use_fsdp --fsdp_version 2` sets
OPTIONS = {
    "num_prompts": 4,
    "num_generations": 4,
    "max_steps": 6,
    "eval_steps": 3,
    "eval_size": 7,
    "save_steps": 1,
    "max_completion_length": 6,
    "device": "cpu",
}
GREEDY = {
    "algorithm": "ppo",
    "num_prompts": 8,
    "max_steps": 4,
    "eval_steps": 2,
    "eval_size": 11,
    "save_steps": 2,
    "max_completion_length": 6,
    "device": "cpu",
    "top_k": 1,
    "whiten_rewards": True,
    "kl_target": 0.01,
    "lr_scheduler_type": "cosine",
    "log_token_groups": 3,
    "gradient_noise": True,
}  # nothing is random: one process and two sample the same


ACCELERATE = (
    *("accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"),
    *("--use_fsdp", "--fsdp_version", "2"),
)
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node=2")


def launch(*program, launcher=TORCHRUN, cwd=None, **environment):
    "Two processes of one thread each by a launcher: (exit status, what it said)."
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "PYTHONWARNINGS": "ignore",
        "PYTHONFAULTHANDLER": "1",
        **environment,
    }
    running = subprocess.Popen(
        [sys.executable, "-m", *launcher, *map(str, program)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said = running.communicate(timeout=120)[0]
    finally:
        running.kill()
    return running.returncode, said


def start_pair(log, function, *arguments, **environment):
    """Two processes with what a launcher tells them; nobody ends one when the other
    fails."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    environment |= {"WORLD_SIZE": "2", "PYTHONFAULTHANDLER": "1"}
    return [
        start_process(
            function,
            *arguments,
            log=log,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            **environment,
        )
        for rank in range(2)
    ]


def run_pair(log, function, *arguments, **environment):
    "The same, waited for: (their exit statuses, what they said)."
    pair = start_pair(log, function, *arguments, **environment)
    for one in pair:
        one.join(timeout=120)
        one.kill()
        one.join()
    return [one.exitcode for one in pair], log.read_text()


def line(directory, options):
    "The command line of a run."
    return [
        "train",
        *(
            str(x)
            for name, value in {"output_dir": directory, **options}.items()
            for x in (f"--{name}", value)
        ),
    ]


def same_run(a, b, last):
    assert [reproducible(x) for x in read_metrics(a)] == [
        reproducible(x) for x in read_metrics(b)
    ]
    assert pd.read_parquet(a / "completions.parquet").equals(
        pd.read_parquet(b / "completions.parquet")
    )
    for name in ("model/model.safetensors", f"checkpoint-{last}/state.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_alone_nothing_changes():
    rows = torch.ones(2, 3)
    assert (get_rank(), get_world_size()) == (0, 1)
    assert local_slice(7) == slice(0, 7)
    assert all_gather_rows(rows) is all_reduce(rows) is rows
    assert full_tensor(rows) is shard_like(rows, rows) is rows
    assert raised_everywhere(ValueError())
    marker = object()  # as it is, not through JSON
    assert all_gather_object(lambda: marker) == [marker]
    assert broadcast_object(lambda: marker) is marker


def test_a_result_that_is_no_json_is_an_error_of_all(monkeypatch):
    "It is sent as an error, where it would leave the other process waiting."
    sent = []

    def exchange(text):
        sent.append(json.loads(text))
        return [text, '{"value": 1}']

    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "_all_gather_text", exchange)
    with pytest.raises(TypeError, match="not JSON serializable") as caught:
        all_gather_object(object)
    assert [message["type"] for message in sent] == ["TypeError"]
    assert raised_everywhere(caught.value)


@pytest.mark.parametrize("engine", [{}, FSDP], ids=["replicated", "fsdp2"])
def test_two_processes_have_the_gradient_of_one(tmp_path, engine):
    """GRPO with each way of aggregating, PPO with whitening, and a whole step of
    GRPO, each against the same alone (tests/worker.py says how).

    Completions are of different lengths, the groups of one process carry no loss at
    all, and of five groups one process gets two."""
    status, said = run_pair(tmp_path / "log", worker.updates, **engine)
    assert status == [0, 0] and "16 updates" in said, said
    assert said.count(f"cut {bool(engine)}") == 2, said


@pytest.mark.parametrize("engine", [{}, FSDP], ids=["replicated", "fsdp2"])
def test_a_run_is_that_of_one_process(tmp_path, engine, monkeypatch):
    """Greedy PPO with whitening and an adaptive beta: every metric, completion and
    weight of four steps; sharded by Accelerate's launcher."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    alone = train(
        short_config(output_dir=str(tmp_path / "one"), **GREEDY), progress=False
    )
    words = line(tmp_path / "two", GREEDY)
    if engine:
        program = ("-m", "grpo_nb", *words)
        status, said = launch(*program, launcher=ACCELERATE, cwd=tmp_path)
        assert status == 0, said
    else:
        status, said = run_pair(tmp_path / "log", command_line.main, words)
        assert status == [0, 0], said
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert [list(x) for x in one] == [list(x) for x in two]
    for a, b in zip(map(reproducible, one), map(reproducible, two)):
        assert all(
            abs(a[name] - b[name]) < 1e-4 * max(1, abs(a[name])) for name in a
        ), (a, b)
    rows, other = (
        pd.read_parquet(tmp_path / name / "completions.parquet")
        for name in ("one", "two")
    )
    shown = list(alone.completions.drop(columns="advantage"))
    assert rows[shown].equals(other[shown])
    assert (rows["advantage"] - other["advantage"]).abs().max() < 1e-3
    for step in (1, 4):
        a, b = alone.groups(step), open_run(tmp_path / "two").groups(step)
        assert len(a) == len(b) == 3
        pd.testing.assert_frame_equal(a.frame(), b.frame(), rtol=0, atol=1e-3)
    for name in ("model/model.safetensors", "checkpoint-4/state.safetensors"):
        a, b = (load_file(tmp_path / kind / name) for kind in ("one", "two"))
        assert (
            a.keys() == b.keys()
            and max((a[k] - b[k]).abs().max().item() for k in a if k != "generator")
            < 1e-5
        )
    assert said.count("held-out accuracy after") == 1 and {
        p.name for p in (tmp_path / "two").iterdir()
    } == {p.name for p in (tmp_path / "one").iterdir()}
    assert open_run(tmp_path / "two").accuracy == alone.accuracy


def test_outer_iterations_of_adapters_are_those_of_one_process(tmp_path):
    "The reference's adapters are cut over the processes, renewed and kept as alone."
    options = GREEDY | {"use_peft": True, "lora_r": 4, "ref_model_sync_steps": 2}
    options |= {"learning_rate": 1e-2, "gradient_noise": False}
    alone = train(
        short_config(output_dir=str(tmp_path / "one"), **options), progress=False
    )
    program = ("-m", "grpo_nb", *line(tmp_path / "two", options))
    status, said = launch(*program, launcher=ACCELERATE, cwd=tmp_path)
    assert status == 0, said
    kls = [x["kl"] for x in read_metrics(tmp_path / "two")]
    assert max(abs(a - b) for a, b in zip(alone.metrics["kl"], kls)) < 1e-4
    assert kls[0] < 1e-6 and kls[2] < 1e-6 < 1e-2 < min(kls[1], kls[3])
    name = "checkpoint-4/state.safetensors"
    a, b = (load_file(tmp_path / kind / name) for kind in ("one", "two"))
    assert a.keys() == b.keys()
    a.pop("generator")
    assert max((x - b[k]).abs().max().item() for k, x in a.items()) < 1e-4


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "A run of GRPO by two processes that nothing happens to."
    directory = tmp_path_factory.mktemp("straight") / "run"
    log = directory.parent / "log"
    status, said = run_pair(log, command_line.main, line(directory, OPTIONS))
    assert status == [0, 0], said
    return directory


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, straight):
    """Both processes killed in the middle; resumed by as many they end where the
    straight run ended, and by another number they are refused."""
    directory = tmp_path / "run"
    pair = start_pair(tmp_path / "log", command_line.main, line(directory, OPTIONS))
    deadline = time.monotonic() + 90
    while (
        time.monotonic() < deadline
        and all(one.is_alive() for one in pair)
        and not any(step >= 2 for step, _ in checkpoints(directory))
    ):
        time.sleep(0.01)
    for one in pair:
        one.kill()
        one.join()
    assert [one.exitcode for one in pair] == [-signal.SIGKILL] * 2
    assert (
        not (directory / "model").exists()
        and json.loads((directory / "config.json").read_text())["num_processes"] == 2
    )
    with pytest.raises(ValueError, match="num_processes = 2, now 1"):
        train(
            short_config(**OPTIONS | {"output_dir": str(directory), "resume": True}),
            progress=False,
        )
    again = line(directory, OPTIONS | {"resume": True})
    status, said = run_pair(tmp_path / "log", command_line.main, again)
    assert status == [0, 0], said
    same_run(directory, straight, 6)
    lines, rows = (
        read_metrics(directory),
        pd.read_parquet(directory / "completions.parquet"),
    )
    assert [x["step"] for x in lines] == list(range(1, 7)) and (
        rows.groupby("step").size() == 16
    ).all()


def test_each_process_has_random_numbers_of_its_own(monkeypatch):
    "The main one those of a run of one process."
    seeds = []
    for rank in range(3):
        monkeypatch.setattr(build, "get_rank", lambda: rank)
        seeds.append(
            build.sampling_generator(
                short_config(seed=5), torch.device("cpu")
            ).initial_seed()
        )
    assert seeds[0] == 5 and len(set(seeds)) == 3


def test_it_learns_as_one_process_does(straight, tmp_path):
    """Loosely, for the random numbers are others: the mean reward of six steps, and
    the same number of completions."""
    alone = train(
        short_config(**OPTIONS | {"output_dir": str(tmp_path / "one")}), progress=False
    )
    reward = lambda lines: sum(x["reward"] for x in lines) / len(lines)
    assert (
        abs(reward(read_metrics(straight)) - reward(read_metrics(alone.directory)))
        < 0.25
    )
    assert (
        read_metrics(straight)[-1]["num_completions"]
        == alone.metrics["num_completions"].iloc[-1]
        == 96
    )


@pytest.mark.parametrize(
    "fault, last, said",
    [
        ("raise", 2, "the sandbox does not answer"),
        ("signal", 3, "stopped after step 3"),
    ],
)
def test_what_happens_to_one_stops_all(tmp_path, fault, last, said):
    """In the second process a reward function raises, or a signal arrives: no
    process waits for ever, and what can be saved is."""
    began, run = time.monotonic(), tmp_path / "run"
    status, output = run_pair(tmp_path / "log", worker.run, str(run), FAULT=fault)
    assert all(x > 0 for x in status) and said in output
    assert time.monotonic() - began < 60
    assert [step for step, _ in checkpoints(run)] == [last]


def test_a_process_that_is_gone_stops_all(tmp_path):
    "By its launcher: nothing can be saved, and no process waits for ever."
    program = [ROOT / "tests/worker.py", "run", tmp_path / "run"]
    status, output = launch(*program, FAULT="crash")
    assert status != 0 and "exitcode  : 7" in output
    assert checkpoints(tmp_path / "run") == []


@pytest.mark.parametrize(
    "environment, said",
    [
        (
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            "DeepSpeed is not supported; FSDP2 shards the same",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "--dtype bfloat16"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "cannot be kept on the CPU"),
        (FSDP | {"FSDP_VERSION": "1"}, "only FSDP2 is supported"),
    ],
    ids=["deepspeed", "precision", "offload", "fsdp1"],
)
def test_an_engine_that_cannot_work_is_refused(
    tmp_path, monkeypatch, environment, said
):
    """Before the processes meet, before a model is loaded, and before anything is
    written."""
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        **environment,
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        train(short_config(output_dir=str(tmp_path / "run")), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_number_of_queries_that_cannot_be_shared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "get_world_size", lambda: 3)
    with pytest.raises(
        ValueError,
        match="num_prompts = 4 must be divisible by the number of processes, 3",
    ):
        train(short_config(output_dir=str(tmp_path / "run")), progress=False)
    assert not (tmp_path / "run").exists()
