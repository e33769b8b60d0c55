"""Runs: that both algorithms learn, what a run leaves behind, that it can be
repeated, resumed, and started from a shell.

Bug 26 (resume) and bug 28 (every documented option runs) are here; the others are in
test_equations.py."""

import json
import math
import re
import time
import typing
from dataclasses import asdict, fields, replace

import pandas as pd
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from grpo_nb.run.dynamic_sampling import step_of
from grpo_nb.run import run_directory, training
from grpo_nb.run.options import CONFIGS, RECIPES, make_config
from grpo_nb.engine.judging import RewardModel
from grpo_nb.reward import accuracy_reward
from grpo_nb.run.checkpoint import checkpoints
from grpo_nb.run.command_line import chat, main
from grpo_nb.run.training import evaluate, open_run
from grpo_nb.run.command_line import parse_arguments
from grpo_nb.run.iterative import train_reward_model
from grpo_nb.run.training import train
from grpo_nb.engine.data import load_task
from grpo_nb.task import Query
from helpers import (
    ROOT,
    python,
    read_metrics,
    reproducible,
    run,
    same_run,
    short_config,
    start_process,
)

ALGORITHMS = ["grpo", "ppo"]


@pytest.fixture(scope="module", params=ALGORITHMS)
def finished(request, tmp_path_factory):
    "A finished run of three steps, looked at by several tests."
    return run(
        tmp_path_factory.mktemp(request.param) / "run",
        algorithm=request.param,
        max_steps=3,
        eval_steps=2,
        save_steps=2,
    )


# Learning -----------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm, num_prompts", [("grpo", 16), ("ppo", 128)])
def test_learns(tmp_path, algorithm, num_prompts):
    """Within 40 steps, held-out accuracy on 1,000 queries rises by more than chance
    can do.

    The bound is four standard errors of the difference between two shares."""
    config = make_config(
        algorithm=algorithm,
        num_prompts=num_prompts,
        max_steps=40,
        eval_steps=40,
        eval_size=1000,
        max_completion_length=8,
        device="cpu",
        output_dir=str(tmp_path / "run"),
    )
    before, after = train(config, progress=False).accuracy
    share = (before + after) / 2
    assert after - before > 4 * math.sqrt(2 * share * (1 - share) / 1000), (
        f"{before:.1%} -> {after:.1%}"
    )


# Files --------------------------------------------------------------------------------


def test_a_run_leaves_its_files(finished):
    names = {path.name for path in finished.directory.iterdir()}
    own = {"value_model"} if finished.config.algorithm == "ppo" else set()
    assert (
        names
        == {
            "config.json",
            "metrics.jsonl",
            "completions.parquet",
            "model",
            "checkpoint-2",
            "summary.txt",
        }
        | own
    )
    assert json.loads((finished.directory / "config.json").read_text()) == asdict(
        finished.config
    )
    assert (
        finished.directory / "summary.txt"
    ).read_text().strip() == finished.summary().to_string().strip()


def test_metrics_are_one_line_of_json_a_step(finished):
    metrics = read_metrics(finished.directory)
    assert [line["step"] for line in metrics] == [1, 2, 3]
    always = {
        "reward",
        "reward_std",
        "rewards/accuracy/mean",
        "rewards/accuracy/seconds",
        "kl",
        "entropy",
        "grad_norm",
        "loss",
        "ratio",
        "clip_ratio/low_mean",
        "clip_ratio/high_mean",
        "clip_ratio/region_mean",
        "completions/mean_length",
        "completions/clipped_ratio",
        "learning_rate",
        "num_completions",
        "step_time",
        "peak_memory",
    }
    always |= (
        {"frac_reward_zero_std"}
        if finished.config.algorithm == "grpo"
        else {"value_loss", "value_grad_norm", "beta"}
    )
    for line in metrics:
        assert always <= set(line) and all(
            isinstance(x, (int, float)) and math.isfinite(x) for x in line.values()
        )
    assert ["eval/initial_accuracy" in line for line in metrics] == [True, False, False]
    assert ["eval/accuracy" in line for line in metrics] == [
        False,
        True,
        True,
    ]  # every second step, and after the last


def test_completions_are_all_there(finished):
    table = finished.completions
    assert list(table.columns) == [
        "step",
        "query",
        "completion",
        "reward",
        "advantage",
        "tokens",
        "truncated",
    ]
    assert table.groupby("step").size().to_dict() == dict.fromkeys(
        [1, 2, 3], 16 if finished.config.algorithm == "grpo" else 4
    )
    task = finished.task
    for row in table.itertuples():
        assert row.reward == float(task.is_right(row.completion, task.parse(row.query)))
    for step, mean in table.groupby("step")["reward"].mean().items():
        assert abs(mean - finished.metrics["reward"][step]) < 1e-6
    for step, mean in table.groupby("step")["tokens"].mean().items():
        assert abs(mean - finished.metrics["completions/mean_length"][step]) < 1e-6


def test_the_model_opens_with_transformers(finished):
    model = AutoModelForCausalLM.from_pretrained(finished.directory / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished.directory / "model")
    for name, x in finished.policy.state_dict().items():
        assert model.state_dict()[name].equal(x), name
    assert (
        evaluate(model.eval(), tokenizer, finished.task, 5, 8) == finished.accuracy[1]
    )


def test_a_run_opens_again(finished):
    again = open_run(finished.directory)
    assert again.config == finished.config and again.accuracy == finished.accuracy
    for name, x in finished.policy.state_dict().items():
        assert again.policy.state_dict()[name].equal(x), name
    for prompt in ("12+34=", "12+34"):
        answers = again.answers(prompt, 8, torch.Generator().manual_seed(0))
        assert answers["count"].sum() == 8 and set(answers["reward"]) <= {0.0, 1.0}


def test_the_reference_does_not_move(tiny, finished):
    "The frozen box stays what the policy was, the yellow one leaves it."
    start = tiny[0].state_dict()
    assert any(
        not start[name].equal(x) for name, x in finished.policy.state_dict().items()
    )
    assert finished.metrics["kl"][1] < 1e-6 < finished.metrics["kl"][3]


def test_evaluation_is_held_out(tiny):
    "What the accuracy is measured on is never trained on, and the same every time."
    task, asked = load_task("add"), []
    spy = replace(
        task,
        is_right=lambda completion, query: (
            asked.append(query) or task.is_right(completion, query)
        ),
    )
    assert evaluate(*tiny, spy, 40, 8) == evaluate(*tiny, spy, 40, 8)
    assert len(asked) == 80 and asked[:40] == asked[40:]
    assert all(query.is_heldout for query in asked)


# Same seed ----------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_seed_decides(tmp_path, algorithm):
    """Same seed, same everything but wall clock and memory; another seed, something
    else."""
    options = {"algorithm": algorithm, "max_steps": 2, "num_prompts": 8}
    for name, seed in {"a": 7, "b": 7, "c": 8}.items():
        run(tmp_path / name, seed=seed, **options)
    a, b, c = (
        [reproducible(line) for line in read_metrics(tmp_path / name)] for name in "abc"
    )
    assert a == b != c
    frames = [
        pd.read_parquet(tmp_path / name / "completions.parquet") for name in "abc"
    ]
    assert frames[0].equals(frames[1]) and not frames[0].equals(frames[2])
    assert set(frames[0]["query"][frames[0]["step"] == 2]) != set(
        frames[2]["query"][frames[2]["step"] == 1]
    )  # the next seed is not the same data one step later
    assert (tmp_path / "a/model/model.safetensors").read_bytes() == (
        tmp_path / "b/model/model.safetensors"
    ).read_bytes()


def test_max_tokens_per_micro_batch_is_no_hyper_parameter(tmp_path):
    "Bug 6 in a run: small pieces or large, the first step says the same."
    lines = [
        reproducible(
            read_metrics(
                run(tmp_path / str(budget), max_tokens_per_micro_batch=budget).directory
            )[0]
        )
        for budget in (1, 8192)
    ]
    for name, x in lines[0].items():
        assert abs(x - lines[1][name]) < 1e-4, name


def test_a_run_on_a_task_object_remembers_its_name(tmp_path):
    """One that load_task knows keeps its name when the run is opened, or resumed
    where it was finished; another name no config could have."""
    for task, name in (
        (load_task("target"), "target"),
        (replace(load_task("add"), name="mine"), "add"),
    ):
        config = short_config(max_steps=1, output_dir=str(tmp_path / task.name))
        train(config, task=task, progress=False)
        assert (
            json.loads((tmp_path / task.name / "config.json").read_text())["task"]
            == task.name
        )
        again = train(replace(config, resume=True), task=task, progress=False)
        assert again.config.task == name and again.task is task


def test_the_summary_names_the_task_that_was_trained_on(tmp_path):
    "Digits are said only of a task by name: those of an object nobody knows."
    add = load_task("add", digits=3)
    for name, task, shown in (
        ("by-name", None, "sums, 2 digits"),
        ("object", add, "add"),
        ("own", replace(add, name="my sums"), "my sums"),
    ):
        config = short_config(task="sums", output_dir=str(tmp_path / name))
        found = train(config, task=task, progress=False)
        passed = task if name == "own" else None
        for summary in (
            found.summary(),
            open_run(tmp_path / name, task=passed).summary(),
        ):
            assert summary["task"] == shown
        assert re.search(
            rf"^task +{shown}$", (tmp_path / name / "summary.txt").read_text(), re.M
        )


def own(completions, **columns):
    return [float(len(text)) for text in completions]


def test_weights_are_counted_against_what_is_passed(tmp_path):
    """Two functions with two weights, whatever the config names; one function alone
    is a list of one."""
    config = short_config(reward_weights=[0.5, 2.0], output_dir=str(tmp_path / "two"))
    found = train(config, reward_funcs=[own, "brevity"], progress=False)
    line = read_metrics(found.directory)[0]
    mean = 0.5 * line["rewards/own/mean"] + 2.0 * line["rewards/brevity/mean"]
    assert abs(line["reward"] - mean) < 1e-6
    for functions in (None, own, [own] * 3):
        with pytest.raises(ValueError, match="reward_weights must .* of the [13] "):
            train(replace(config, output_dir=str(tmp_path / "x")), None, functions)
    for functions, says in (([], "at least one"), ([own, 3], "got 3")):
        with pytest.raises(ValueError, match=f"reward_funcs must .*{says}"):
            train(replace(config, output_dir=str(tmp_path / "x")), None, functions)
    assert not (tmp_path / "x").exists()


def test_what_was_passed_is_asked_for_again(tmp_path, monkeypatch, capsys):
    """Own functions and an own task: opening, chatting and resuming say what to
    pass, and import nothing."""
    task = replace(load_task("add"), name="my sums")
    config = short_config(max_steps=2, output_dir=str(tmp_path / "run"))
    train(config, task, own, progress=False)
    directory = tmp_path / "run"
    call = rf"open_run\('{directory}', reward_funcs=\[own\], task=\.\.\.\)"
    with pytest.raises(ValueError, match=f"pass it again: {call}"):
        open_run(directory)
    with pytest.raises(SystemExit, match=call):
        main(["chat", str(directory)])
    again = (
        rf"in Python, train\(saved_config\('{directory}', resume=True\), reward_funcs"
    )
    with pytest.raises(SystemExit, match=again):
        main(["resume", str(directory)])
    with pytest.raises(ValueError, match=r"open_run\('[^']*', task=\.\.\.\)"):
        open_run(directory, reward_funcs=own)
    found = open_run(directory, task=task, reward_funcs=own)
    assert found.rewards[0](completions=["123"], prompts=["1+1="]) == [3.0]
    again = replace(config, resume=True, max_steps=3)
    with pytest.raises(ValueError, match=r"train \(reward_funcs=..., task=...\)"):
        train(again, progress=False)
    saved = json.loads((directory / "config.json").read_text())
    del saved["passed"]  # a run of an older version
    (directory / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=call):
        open_run(directory)


# Bug 26: resume -----------------------------------------------------------------------

RESUMED = {
    "grpo": {"algorithm": "grpo"},
    "ppo": {"algorithm": "ppo", "kl_target": 0.001, "beta": 0.1},
    "head": {"algorithm": "ppo", "value_model": "head"},
    "dapo": {"recipe": "dapo", "num_generations": 4},
    "iterative": {
        "recipe": "iterative",
        "num_generations": 4,
        "ref_model_sync_steps": 2,
        "reward_model_prompts": 8,
        "reward_model_steps": 2,
    },
}
LONG = {
    "num_prompts": 8,
    "max_steps": 5,
    "eval_steps": 2,
    "save_steps": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "num_iterations": 2,
}


def interrupted(after):
    "A reward function that stops the run, as Ctrl-C does, in step after + 1."
    judge, calls = accuracy_reward(load_task("add")), []

    def accuracy(prompts, completions, **columns):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return judge(prompts, completions, **columns)

    return accuracy


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "Five steps without a stop, made once for each algorithm."
    runs = {}

    def get(algorithm):
        if algorithm not in runs:
            runs[algorithm] = run(
                tmp_path_factory.mktemp("straight") / algorithm,
                **LONG,
                **RESUMED[algorithm],
            ).directory
        return runs[algorithm]

    return get


def test_learning_rate_follows_the_schedule(straight):
    """Two steps of warm-up, then a cosine: 0, 1/2, 1, (1 + cos 60)/2, (1 + cos
    120)/2 of 1e-4; it is what the optimiser uses, so step 1 (with mu = 2) moves
    nothing."""
    lines = read_metrics(straight("grpo"))
    for line, share in zip(lines, (0, 0.5, 1, 0.75, 0.25)):
        assert abs(line["learning_rate"] - share * 1e-4) < 1e-12
    assert lines[0]["kl"] < 1e-6 < lines[1]["kl"]


def test_the_value_model_follows_the_schedule_too(straight):
    """After four steps both optimisers are at (1 + cos 120)/2 = 1/4 of their own
    rate; a schedule that is built and not stepped would leave one at 0."""
    policy, value = json.loads(
        (straight("ppo") / "checkpoint-4/trainer.json").read_text()
    )["schedulers"]
    for schedule, rate in ((policy, 1e-4), (value, 1e-3)):
        assert abs(schedule["_last_lr"][0] - rate / 4) < 1e-12


@pytest.mark.parametrize(
    "name, after",
    [
        ("grpo", 1),
        ("grpo", 3),
        ("ppo", 1),
        ("ppo", 3),
        ("head", 2),
        ("dapo", 2),
        ("iterative", 2),
        ("iterative", 3),
    ],
)
def test_resume(tmp_path, straight, monkeypatch, name, after):
    """Bug 26: k steps, stop, resume, N - k steps = N steps, with cosine schedule,
    warm-up, mu = 2 and adaptive beta; with a value head, refilled steps, and an
    outer loop (renewed at steps 3 and 5) whose reward model has just been trained
    when the run stops."""
    directory, options, calls = tmp_path / "run", LONG | RESUMED[name], []

    def stops(*arguments):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return step_of(arguments[2])(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training, "step_of", lambda config: stops)
        run(directory, **options)
    assert checkpoints(directory)[-1][0] == len(read_metrics(directory)) == after
    torch.manual_seed(1234)  # another process would have another global generator
    run(directory, resume=True, **options)
    same_run(directory, straight(name))
    if name == "ppo":
        assert len({line["beta"] for line in read_metrics(directory)}) == 5
    if name == "iterative":
        kept = [
            [
                json.loads(line)["step"]
                for line in (path / "preferences.jsonl").read_text().splitlines()
            ]
            for path in (directory, straight(name))
        ]
        assert kept[0] == kept[1] and set(kept[0]) == {1, 3, 5}
        assert (directory / "reward_model/model.safetensors").read_bytes() == (
            straight(name) / "reward_model/model.safetensors"
        ).read_bytes()


def test_resume_after_a_kill(tmp_path, straight):
    """Bug 26: the process is killed in the middle of whatever it does, and another
    one goes on."""
    directory = tmp_path / "run"
    flags = [
        f"--{name}={value}"
        for name, value in (
            asdict(short_config(**LONG, **RESUMED["grpo"], output_dir=str(directory)))
        ).items()
        if value is not None and not isinstance(value, list)
    ]
    process = start_process(main, ["train", *flags], log=tmp_path / "log")
    deadline = time.monotonic() + 100
    while (
        not checkpoints(directory)
        and process.is_alive()
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert checkpoints(directory), (tmp_path / "log").read_text()
    run(directory, **LONG, **RESUMED["grpo"], resume=True)
    same_run(directory, straight("grpo"))


@pytest.mark.parametrize("name", ["ppo", "dapo"])
def test_resume_from_the_shell_needs_the_directory_alone(
    tmp_path, straight, monkeypatch, name
):
    "Options, recipe and all, come from config.json; what is free to change is a flag."
    calls = []

    def stops(*arguments):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return step_of(arguments[2])(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training, "step_of", lambda config: stops)
        run(tmp_path / "run", **LONG | RESUMED[name])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="learning_rate = .*, now 0.5"):
        main(["resume", "run", "--learning_rate", "0.5"])
    with pytest.raises(SystemExit, match="--output_dir is not for resume"):
        main(["resume", "run", "--output_dir", "elsewhere"])
    assert len(read_metrics(tmp_path / "run")) == 3
    main(["resume", "run", "--max_tokens_per_micro_batch", "500"])
    same_run(tmp_path / "run", straight(name))


def test_resume_drops_what_came_after_the_checkpoint(tmp_path, straight):
    """Bug 26: steps after the last checkpoint are taken again, not twice; a
    half-written line is dropped; old checkpoints go."""
    directory, options = tmp_path / "run", LONG | RESUMED["grpo"] | {"save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        run(directory, functions=[interrupted(3)], **options)
    with open(directory / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "rew')
    run(directory, **options | {"save_steps": 1}, resume=True)
    same_run(directory, straight("grpo"))
    assert [step for step, _ in checkpoints(directory)] == [4, 5]


@pytest.mark.parametrize(
    "other",
    [{"algorithm": "ppo"}, {"learning_rate": 5e-4}, {"task": "target"}],
    ids=str,
)
def test_resume_with_other_settings_is_refused(tmp_path, other):
    """Half a run with one learning rate and half with another would be neither, and
    its config.json a lie; how often it is saved is no setting of the training."""
    options = LONG | {"max_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, functions=[interrupted(1)], **options)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ValueError) as error:
        run(tmp_path, resume=True, **options | other)
    for name, value in other.items():
        assert name in str(error.value) and repr(value) in str(error.value)
    assert (tmp_path / "config.json").read_bytes() == before
    saved = json.loads(before)
    del saved["reference_dtype"]  # a run from before that field
    (tmp_path / "config.json").write_text(json.dumps(saved))
    lean = {
        "save_steps": 2,
        "gradient_checkpointing": True,
        "max_tokens_per_micro_batch": 500,
    }  # nor is how much fits into memory
    assert len(run(tmp_path, resume=True, **options | lean).metrics) == 2


def test_the_chapter_names_what_is_free_to_change():
    "The chapter's list is that of the code."
    chapter = json.loads((ROOT / "nbs/2_run/22_run_directory.ipynb").read_text("utf-8"))
    prose = "".join("".join(cell["source"]) for cell in chapter["cells"])
    (table,) = re.findall(r"\| free to change .*?\n\n", prose, re.DOTALL)
    first_column = "".join(row.split("|")[1] for row in table.splitlines() if row)
    named = set(re.findall(r"`(\w+)`", first_column))
    assert named == run_directory._FREE - {"resume", "passed"} | {"max_steps"}


def test_a_finished_run_is_not_resumed(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.directory.rglob("*")}
    again = train(
        make_config(**asdict(finished.config) | {"resume": True}), progress=False
    )
    assert (
        "nothing to resume" in capsys.readouterr().out
        and again.accuracy == finished.accuracy
    )
    assert {
        path: path.stat().st_mtime_ns for path in finished.directory.rglob("*")
    } == before


# Bug 28: every documented option runs -------------------------------------------------

BASE = {
    "num_prompts": 8,
    "max_steps": 2,
    "reward_funcs": ["accuracy", "brevity"],
    "num_iterations": 3,
    "learning_rate": 1e-3,
    "temperature": 2.0,
    "max_completion_length": 6,
    "eval_size": 5,
}
LEARNED = {
    "reward_funcs": ["learned"],
    "reward_model_prompts": 6,
    "reward_model_steps": 1,
}
LORA = {"use_peft": True}
TABLE = {"task": str(ROOT / "tests/sums.csv")}  # prompt, answer, other, total
# field: values that are not the default, or (value, other options that it needs)
SHARED = {
    "model": ["tiny"],
    "task": ["add", "sums", "target"],
    "digits": [1, 2, 3],
    "prompt_column": [("other", TABLE)],
    "answer_column": [("total", TABLE)],
    "heldout_file": [(str(ROOT / "tests/sums_heldout.csv"), TABLE)],
    "heldout_size": [(3, TABLE)],
    "overlong_prompts": ["error", "drop"],  # what it drops is in test_prompts.py
    "reward_funcs": [["accuracy"], ["brevity"], ["process", "format"], ["overlong"]],
    "reward_weights": [[0.5, 2.0]],
    "num_prompts": [3],
    "num_iterations": [1],
    "beta": [0.0, 0.5],
    "ref_model_sync_steps": [(1, {"learning_rate": 1e-2})],
    "reward_model_prompts": [(12, LEARNED)],
    "reward_model_steps": [(3, LEARNED)],
    "epsilon": [0.02],
    "epsilon_high": [0.02],
    "delta": [(1.02, {"epsilon": 0.02})],
    "objective": ["clip", "cispo", "sapo"],
    "sapo_temperature_pos": [(2.0, {"objective": "sapo"})],
    "sapo_temperature_neg": [(0.5, {"objective": "sapo"})],
    "loss_type": ["grpo", "bnpo", "dapo", "dr_grpo"],
    "importance_sampling_level": ["token", "sequence", "sequence_token"],
    "mask_truncated_completions": [(True, {"max_completion_length": 3})],
    "entropy_coef": [0.1],
    "max_completion_length": [2],
    "temperature": [0.5],
    "top_p": [0.5],
    "top_k": [2],
    "skip_special_tokens": [False],  # what it shows is in test_brought_models.py
    "learning_rate": [1e-5],
    "lr_scheduler_type": ["constant", "constant_with_warmup", "linear", "cosine"],
    "warmup_steps": [5],
    "max_grad_norm": [0.01],
    "max_steps": [1],
    "eval_steps": [1],
    "eval_size": [3],
    "log_token_groups": [0, 99],
    "gradient_noise": [True],
    "save_steps": [1],
    "save_total_limit": [0],
    "seed": [1],
    "device": ["auto", "cpu"],
    "dtype": ["float32", "bfloat16"],
    "max_tokens_per_micro_batch": [1],
    "max_num_seqs": [3],
    "reference_dtype": ["float32", "bfloat16"],
    "gradient_checkpointing": [True],
    "resume": [True],
    "use_vllm": [False],
    "vllm_importance_sampling_correction": [False],
    "vllm_importance_sampling_clip_max": [1.0],
    "report_to": [["tensorboard"]],  # what it shows is in test_watching.py
    "use_peft": [True],
    "lora_r": [(4, LORA)],
    "lora_alpha": [(8, LORA)],
    "lora_target_modules": [(["q_proj"], LORA)],  # more of them in test_models.py
    "on_reward_error": ["stop", "drop"],
    "format_pattern": [("[0-9]{2}", {"reward_funcs": ["format"]})],
    "reward_timeout": [60.0],  # a shorter one is in test_rewards_brought.py
    "max_skipped_steps": [1],
}  # what these two do is in test_faults.py
OPTIONS = {
    "grpo": SHARED
    | {
        "algorithm": ["grpo"],
        "num_generations": [2],
        "dynamic_sampling": [(2, {"reward_funcs": ["accuracy"]})],
        "scale_rewards": ["group", "batch", "batch_centred", "none"],
        "baseline": ["mean", "leave_one_out"],
        "use_bias_correction_kl": [True],
    },
    "ppo": SHARED
    | {
        "algorithm": ["ppo"],
        "importance_sampling_level": ["token", "sequence_token"],
        "gamma": [0.5],
        "lam": [0.0, 1.0],
        "value_model": ["separate", "head"],
        "vf_coef": [0.01],
        "whiten_rewards": [True],
        "cliprange_value": [0.001],
        "value_learning_rate": [1e-5],
        "whiten_advantages": [False],
        "kl_target": [0.001],
    },
}
ONCE = {
    "model",
    "task",
    "digits",
    "prompt_column",
    "answer_column",
    "heldout_file",
    "heldout_size",
    "overlong_prompts",
    "lr_scheduler_type",
    "eval_steps",
    "eval_size",
    "save_steps",
    "save_total_limit",
    "device",
    "report_to",
    "resume",
    "use_vllm",
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_clip_max",
    "on_reward_error",
    "reward_timeout",
    "max_skipped_steps",
}  # what no algorithm sees of the run around it: with GRPO alone
REFUSED = {("ppo", "importance_sampling_level"): ["sequence"]}  # in test_bad_input.py
CASES = [
    (algorithm, name, value)
    for algorithm, options in OPTIONS.items()
    for name, values in options.items()
    for value in values
    if algorithm == "grpo" or name not in ONCE
]
TWINS = {"dapo": "bnpo", "constant_with_warmup": "constant"}  # two names of one thing
HARMLESS = {
    "algorithm",
    "model",
    "overlong_prompts",
    "skip_special_tokens",  # the embedded model has none in an answer
    "eval_steps",
    "eval_size",
    "log_token_groups",
    "gradient_noise",
    "save_steps",
    "save_total_limit",
    "device",
    "max_tokens_per_micro_batch",
    "gradient_checkpointing",
    "report_to",
    "resume",
    "on_reward_error",
    "reward_timeout",
    "max_skipped_steps",
}  # leave the training as it is
HARMLESS |= {
    "use_vllm",
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_clip_max",
}  # what they change, with another sampler, is in test_sampler.py and test_vllm.py


def test_every_option_is_tried():
    "Bug 28: each field of each config is in the table above, and each of its choices."
    for algorithm, config in CONFIGS.items():
        assert {f.name for f in fields(config)} - {"recipe", "output_dir"} == set(
            OPTIONS[algorithm]
        )
        for name, field in config.__dataclass_fields__.items():
            choices = list(field.metadata.get("choices", []))
            if typing.get_origin(field.type) is typing.Literal:
                choices = list(typing.get_args(field.type))
            if choices:
                refused = REFUSED.get((algorithm, name), [])
                assert set(choices) == {*OPTIONS[algorithm][name], *refused}, name


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    runs = {}

    def get(options):
        key = json.dumps(options, sort_keys=True)
        if key not in runs:
            runs[key] = run(tmp_path_factory.mktemp("baseline") / "run", **options)
        return runs[key]

    return get


@pytest.mark.filterwarnings("ignore:top_p=")
@pytest.mark.parametrize(
    "algorithm, name, value",
    CASES,
    ids=[f"{a}-{n}={v[0] if isinstance(v, tuple) else v}" for a, n, v in CASES],
)
def test_option(tmp_path, baseline, algorithm, name, value):
    """Bug 28: it runs, its metrics are finite, and (unless it is the default or
    harmless) it changes what is learned."""
    value, others = value if isinstance(value, tuple) else (value, {})
    plain = BASE | {"algorithm": algorithm} | others
    option = run(tmp_path / "run", **plain | {name: value})
    for line in read_metrics(option.directory):
        if line.get("explained_variance", 0) is None:  # of returns that are all equal
            del line["explained_variance"]
        assert all(map(math.isfinite, line.values()))
    assert all(p.isfinite().all() for p in option.policy.parameters())
    before = baseline(plain)
    changed = any(
        not p.equal(q)
        for p, q in zip(option.policy.parameters(), before.policy.parameters())
    )
    if name not in HARMLESS:
        assert changed == (TWINS.get(str(value), value) != getattr(before.config, name))


def test_models_from_directories(tmp_path, finished, tokenizer):
    """Bug 28: the policy may be the result of another run, and the reward a trained
    reward model."""
    torch.manual_seed(0)
    judge = RewardModel(
        LlamaForSequenceClassification(
            LlamaConfig(
                vocab_size=20,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_labels=1,
            )
        ),
        tokenizer,
    )
    losses = train_reward_model(
        judge,
        [(Query("1+2="), "3", wrong) for wrong in ("4", "5", "33", "")],
        steps=60,
        batch_size=8,
    )
    good, *bad = judge(prompts=["1+2="] * 4, completions=["3", "4", "5", "33"])
    assert losses[-1] < losses[0] and good > max(bad)
    judge.model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    again = run(
        tmp_path / "run",
        model=str(finished.directory / "model"),
        reward_funcs=[str(tmp_path / "judge"), "accuracy"],
        reward_weights=[0.5, 1.0],
    )
    line, first = read_metrics(again.directory)[0], again.completions.iloc[0]
    scores = judge(
        prompts=list(again.completions["query"]),
        completions=list(again.completions["completion"]),
    )
    assert abs(line["rewards/judge/mean"] - sum(scores) / len(scores)) < 1e-5
    right = again.task.is_right(first["completion"], again.task.parse(first["query"]))
    assert abs(first["reward"] - 0.5 * scores[0] - right) < 1e-5


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(tmp_path, recipe):
    "Bug 28: each recipe runs, and sets what it says."
    options = (
        {"num_generations": 4}
        if RECIPES[recipe]["algorithm"] == "grpo"
        else {"algorithm": "ppo"}
    )
    if recipe == "iterative":
        options |= {"reward_model_prompts": 8, "reward_model_steps": 2}
    config = run(tmp_path / "run", recipe=recipe, **options).config
    assert all(
        getattr(config, name) == value
        for name, value in (RECIPES[recipe] | options).items()
    )


def test_recipes_are_what_the_papers_say():
    """Bug 28: against the papers (in RECIPES), not against the table itself; the
    bounds of GSPO are 3e-4 and 4e-4, Dr. GRPO has no std, RLOO no group mean."""
    papers = {
        "deepseekmath": ("group", "mean", "grpo", "token", "clip", 0.04, 0.2, None),
        "dr_grpo": ("none", "mean", "dr_grpo", "token", "clip", 0.0, 0.2, None),
        "gspo": ("group", "mean", "grpo", "sequence", "clip", 0.0, 3e-4, 4e-4),
        "cispo": ("group", "mean", "dapo", "token", "cispo", 0.0, 0.2, 4.0),
        "sapo": ("group", "mean", "grpo", "token", "sapo", 0.0, 0.2, None),
        "reinforce_pp_baseline": (
            *("batch_centred", "mean", "grpo", "token", "clip"),
            *(0.01, 0.2, None),
        ),
        "rloo": ("none", "leave_one_out", "grpo", "token", "clip", 0.01, 0.2, None),
        "dapo": ("group", "mean", "dapo", "token", "clip", 0.0, 0.2, 0.28),
    }
    names = (
        "scale_rewards",
        "baseline",
        "loss_type",
        "importance_sampling_level",
        "objective",
        "beta",
        "epsilon",
        "epsilon_high",
    )
    for recipe, values in papers.items():
        assert (
            tuple(getattr(make_config(recipe=recipe), name) for name in names) == values
        ), recipe
    dapo, process, iterative = (
        make_config(recipe=recipe)
        for recipe in ("dapo", "deepseekmath_process", "iterative")
    )
    assert dapo.dynamic_sampling > 0 and dapo.reward_funcs == ["accuracy", "overlong"]
    assert (
        process.reward_funcs == ["process"]
        and iterative.reward_funcs == ["learned"]
        and iterative.ref_model_sync_steps > 0
    )
    assert (
        (process.beta, process.num_generations)
        == (iterative.beta, iterative.num_generations)
        == (0.04, 64)
    )


def test_bfloat16_samples_from_the_weights_that_it_trains(tmp_path):
    """A forward pass must see the weights after the last step, not a cached cast of
    the first ones: the KL grows as in float32."""
    options = {
        "max_steps": 3,
        "num_prompts": 8,
        "num_generations": 8,
        "learning_rate": 3e-4,
        "reward_funcs": ["accuracy", "brevity"],
    }
    low, full = (
        run(tmp_path / dtype, dtype=dtype, **options)
        for dtype in ("bfloat16", "float32")
    )
    assert 1 / 3 < low.metrics["kl"][3] / full.metrics["kl"][3] < 3, (
        low.metrics["kl"],
        full.metrics["kl"],
    )


def test_no_score_at_all_is_still_json(tmp_path):
    """Bug 22 in a run: every reward function abstains; nothing is learned, and the
    line of metrics stays valid JSON."""
    finished = run(
        tmp_path / "run",
        max_steps=2,
        functions=[lambda completions, **_: [None] * len(completions)],
    )
    assert [line["reward"] for line in read_metrics(finished.directory)] == [None, None]
    assert finished.metrics["loss"].tolist() == [0, 0]


# Command line -------------------------------------------------------------------------


def test_command_line(tmp_path, monkeypatch, capsys):
    "Train here, and talk in another process, as a user starts it."
    flags = (
        "--algorithm ppo --task add --digits 1 --max_steps 2 --num_prompts 4 "
        "--eval_size 5 --device cpu --output_dir out"
    ).split()
    monkeypatch.chdir(tmp_path)
    main(["train", *flags])
    assert "held-out accuracy after" in capsys.readouterr().out
    assert len(read_metrics(tmp_path / "out")) == 2
    spoken = python(
        "-m",
        "grpo_nb",
        "chat",
        "out",
        cwd=tmp_path,
        stdin="3+4=\nnonsense\n\n",
    )
    assert spoken.returncode == 0, spoken.stderr
    assert spoken.stdout.count("answer") == 2 and "reward" in spoken.stdout


def test_errors_of_a_process(tmp_path):
    wrong = python("-m", "grpo_nb", "train", "--temperature", "0", cwd=tmp_path)
    assert (
        wrong.returncode == 1
        and "error: temperature = 0.0" in wrong.stderr
        and "Traceback" not in wrong.stderr
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_help_lists_every_option(algorithm, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--algorithm", algorithm, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for f in fields(CONFIGS[algorithm]):
        assert (
            f"--{f.name} " in shown and " ".join(f.metadata["help"].split()) in shown
        ), f.name


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--temperature", "0"], "temperature = 0.0: .*greater than 0"),
        (["--algorithm", "dpo"], 'algorithm must be "grpo" or "ppo", got .dpo'),
        (["--algorithm", "ppo", "--num_generations", "4"], "num_generations"),
        (["--lam", "0.5"], "lam = '0.5' is not a parameter of grpo; only ppo has it"),
        (["--lam=0.5"], "lam = '0.5' is not a parameter of grpo; only ppo has it"),
        (
            ["--algorithm", "ppo", "--num_generations", "4"],
            "num_generations = '4' is not a parameter of ppo; only grpo has it",
        ),
        (["--learning_rat", "1"], "did you mean learning_rate.*allowed: algorithm"),
        (
            ["--cliprange_valu", "1"],
            r"did you mean cliprange_value \(only ppo has it\)",
        ),
        (["--beta", "0.1", "runs/x"], "runs/x. stands behind no option"),
        (["--nonsense", "1"], "nonsense = '1' is not a parameter of grpo; allowed"),
        (["--max_steps", "many"], "max_steps.*many"),
        (["chat", "/nowhere"], "'/nowhere' is not a finished run"),
        (["chat"], "arguments are required: RUN"),
        (["resume", "/nowhere"], "'/nowhere' is not a run: it has no config.json"),
        (["resume"], "usage: grpo_nb resume RUN"),
        (["resume", "--max_steps", "9"], "usage: grpo_nb resume RUN"),
        (["fetch"], "usage: grpo_nb fetch smollm2"),
        (
            ["trian"],
            "'trian' is no command; allowed: train, resume, chat, export, fetch",
        ),
        (["--task", "chess"], "task must be one of add, sums, target"),
        (["--recipe", "x"], 'recipe must be "ppo", .* or "rloo", got .x'),
        (["--model", "/nowhere"], "model must be .*got '/nowhere'"),
    ],
    ids=" ".join,
)
def test_command_line_errors(tmp_path, monkeypatch, capsys, flags, message):
    "A wrong flag ends with a message and a nonzero status, and starts no run."
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["train", *flags] if flags[0].startswith("-") else flags)
    said = (
        str(stop.value.code)
        if isinstance(stop.value.code, str)
        else capsys.readouterr().err
    )
    assert stop.value.code not in (0, None) and re.search(message, said), said
    assert not list(tmp_path.rglob("config.json"))


def test_arguments_and_recipes():
    "A flag wins over the recipe, the recipe over the default; booleans take values."
    config = parse_arguments(
        "--recipe dr_grpo --beta 0.5 --resume true --output_dir x --reward_funcs "
        "accuracy brevity --epsilon_high 0.28".split()
    )
    assert (config.scale_rewards, config.loss_type, config.beta, config.resume) == (
        "none",
        "dr_grpo",
        0.5,
        True,
    )
    assert (
        config.reward_funcs == ["accuracy", "brevity"] and config.epsilon_high == 0.28
    )
    assert (
        parse_arguments(["--recipe", "ppo"]).algorithm == "ppo"
        and parse_arguments([]).algorithm == "grpo"
    )
    for (
        algorithm,
        config,
    ) in (
        CONFIGS.items()
    ):  # what the command line makes of no flags is the config of the library
        assert parse_arguments(["--algorithm", algorithm]) == config()


def test_chat(finished, capsys):
    chat(finished, ["12+34=\n", "what?\n", "\n", "1+1=\n"], n=4)
    said = capsys.readouterr().out
    assert said.count("answer") == 2 and str(finished.directory) in said
