"""Reward functions that people bring in a file: the signatures that they know, what is
said of what is wrong, checksums, and that no run directory gets its code imported."""

import asyncio
import hashlib
import json
import math
import sys
import threading
import time

import numpy as np
import pytest
import torch

from grpo_nb.engine import judging
from grpo_nb.engine.data import as_task
from grpo_nb.engine.judging import judge, score, timed_score
from grpo_nb.engine.rewards import as_reward_function, load_reward_function
from grpo_nb.policy import as_rollout
from grpo_nb.run import command_line
from grpo_nb.run.command_line import main
from grpo_nb.run.options import make_config
from grpo_nb.run.run_directory import saved_config
from grpo_nb.run.training import open_run, train
from grpo_nb.task import Query
from helpers import character_tokenizer, read_metrics

FUNCTIONS = """
import asyncio
import functools

import numpy as np
import torch

from its_neighbour import is_same


def trl(completions, answer, **kwargs):
    return [float(is_same(*pair)) for pair in zip(completions, answer)]


def plain(prompts, completions, completion_ids, answer):
    return trl(completions, answer)


def verl(data_source, solution_str, ground_truth, extra_info):
    assert data_source == "sums" and extra_info["index"] >= 0
    return is_same(solution_str, ground_truth)


def dapo(solution_str, ground_truth, strict_box_verify=False, pause_tokens_index=None):
    right = is_same(solution_str, ground_truth)
    return {"score": 1.0 if right else 0.0, "acc": right, "pred": solution_str}


def batch(data_sources, solution_strs, ground_truths, extra_infos):
    return [{"score": is_same(*pair)} for pair in zip(solution_strs, ground_truths)]


def openrlhf(queries, prompts, labels):
    texts = [query[len(prompt):] for query, prompt in zip(queries, prompts)]
    return torch.tensor(trl(texts, labels))


def openrlhf_dict(queries, prompts, labels, **kwargs):
    rewards = openrlhf(queries, prompts, labels)
    return {"rewards": rewards[:, None], "scores": rewards, "extra_logs": {}}


async def slow_trl(completions, answer, **kwargs):
    await asyncio.sleep(0.01)
    return trl(completions, answer)


async def slow_verl(data_source, solution_str, ground_truth, extra_info=None):
    await asyncio.sleep(0.01)
    return float(is_same(solution_str, ground_truth))


async def slow_openrlhf(queries, prompts, labels):
    return openrlhf(queries, prompts, labels)


def an_array(completions, answer, **kwargs):
    return np.array(trl(completions, answer))


def halves(completions, answer, **kwargs):
    return torch.tensor(trl(completions, answer), dtype=torch.bfloat16)


def truths(completions, answer, **kwargs):
    return [np.bool_(is_same(*pair)) for pair in zip(completions, answer)]


class Judge:
    def __call__(self, completions, answer, **kwargs):
        return trl(completions, answer)


an_object = Judge()
a_partial = functools.partial(trl)
NUMBER = 3


def neither(solution, answer):
    return 1.0
"""
NAMES = (
    "trl plain verl dapo batch openrlhf openrlhf_dict slow_trl slow_verl "
    "slow_openrlhf an_array halves truths an_object a_partial"
).split()


@pytest.fixture
def folder(tmp_path):
    "A folder with functions, and a file beside them that they import."
    (tmp_path / "its_neighbour.py").write_text(
        "def is_same(a, b):\n    return a == b\n"
    )
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    return tmp_path


def rollout_of(completions, prompts=("12+34=",), **columns):
    columns = {"answer": "46", "data_source": "sums", "extra_info": {"index": 1}}
    queries = [Query(prompt, columns) for prompt in prompts]
    return as_rollout(character_tokenizer(), queries, completions)


@pytest.mark.parametrize("name", NAMES)
def test_each_signature_gives_the_same_scores(folder, name):
    f = load_reward_function(f"{folder}/functions.py:{name}")
    found = judge([f], rollout_of(["46", "47", "46", ""]))
    assert found == [[1.0, 0.0, 1.0, 0.0]]
    assert score(rollout_of(["46"] * 2), [f]) == {f"rewards/{name}/mean": 1.0}


@pytest.mark.parametrize("name", ["verl", "openrlhf", "trl"])
def test_chats_are_judged_by_their_text(folder, name):
    f = load_reward_function(f"{folder}/functions.py:{name}")
    if name == "trl":
        return  # a list of messages, as in TRL
    chat = [{"role": "user", "content": "12+34"}]
    columns = {"answer": "46", "data_source": "sums", "extra_info": {"index": 1}}
    message = [{"role": "assistant", "content": "46"}]
    found = f(
        prompts=[chat], completions=[message], **{x: [y] for x, y in columns.items()}
    )
    assert list(found) == [name == "verl"]


def test_where_the_ground_truth_is(folder):
    f = as_reward_function(
        lambda solution_str, ground_truth: float(ground_truth == "7")
    )
    row = {"prompts": ["q"], "completions": ["7"]}
    assert f(**row, answer=["7"]) == f(**row, ground_truth=["7"], answer=["8"]) == [1]
    assert f(**row, reward_model=[{"ground_truth": "7", "style": "rule"}]) == [1]
    with pytest.raises(ValueError, match="needs a ground truth: .* rows have level"):
        f(**row, level=[1])


SIGNATURES = [
    ("functions.py:neither", ["neither(solution, answer)", "solution_str", "queries"]),
    ("functions.py:NUMBER", ["NUMBER must be a function, got int"]),
    ("functions.py:Judge", ["Judge must be a function, got a class"]),
    ("functions.py:trll", ["has no trll", "near: trl"]),
    ("functions.py", ["functions.py:name", "trl, plain, verl"]),
    ("functions.py:", ["functions.py:name", "trl, plain, verl"]),
    ("functionz.py:trl", ["there is no file", "functions.py"]),
    ("syntax.py:f", ["syntax.py, line 2"]),
    ("raises.py:f", ["raises.py, line 3", "ZeroDivisionError"]),
    ("deep.py:f", ["broken_neighbour.py, line 1", "ValueError: no"]),
    ("leaves.py:f", ["leaves.py, line 2", "SystemExit"]),
    ("missing.py:f", ["missing.py, line 1", "no_such_package_here"]),
    ("nul.py:f", ["nul.py"]),
]


@pytest.mark.parametrize(
    "name, words", SIGNATURES, ids=[name for name, _ in SIGNATURES]
)
def test_what_is_wrong_with_a_file_is_said_before_anything_is_done(folder, name, words):
    "With the file and the line; nothing is written, and no model is loaded."
    (folder / "syntax.py").write_text("def f(completions):\n    return 1 +\n")
    (folder / "raises.py").write_text("import math\n\n1 / 0\n")
    (folder / "deep.py").write_text("import broken_neighbour\n")
    (folder / "broken_neighbour.py").write_text("raise ValueError('no')\n")
    (folder / "leaves.py").write_text("import sys\nsys.exit(2)\n")
    (folder / "missing.py").write_text("import no_such_package_here\n")
    (folder / "nul.py").write_bytes(b"def f():\0\n")
    modules = set(sys.modules)
    config = make_config(
        reward_funcs=[f"{folder}/{name}"],
        output_dir=str(folder / "run"),
        model="no/such-model",
    )
    with pytest.raises(ValueError) as caught:
        train(config)
    assert all(word in str(caught.value) for word in ["reward_funcs", *words])
    assert not (folder / "run").exists() and str(folder) not in sys.path
    new = {module for module in set(sys.modules) - modules if "reward_" in module}
    assert not new or name.startswith("functions.py")


def test_a_file_stands_in_the_way_of_no_module(folder):
    "Neighbours of two folders with one name are two, and a known module is not lost."
    import helpers

    (folder / "a").mkdir()
    (folder / "b").mkdir()
    for name, value in (("a", 1.0), ("b", 2.0)):
        (folder / name / "helpers.py").write_text(f"VALUE = {value}\n")
        (folder / name / "f.py").write_text(
            "import helpers\n\ndef f(completions):\n"
            "    return [helpers.VALUE] * len(completions)\n"
        )
    found = [load_reward_function(f"{folder}/{name}/f.py:f") for name in "ab"]
    assert [f(completions=["x"]) for f in found] == [[1.0], [2.0]]
    assert sys.modules["helpers"] is helpers and str(folder / "a") not in sys.path


def test_the_digest_is_that_of_what_is_run(folder):
    "Of one file its sha256; a change of it or of a neighbour is seen at once."
    file = folder / "one.py"
    digests = []
    for value in (b"1.0", b"0.5"):  # as long, and within one second
        file.write_bytes(b"def f(completions):\n    return [" + value + b"]\n")
        f = load_reward_function(f"{file}:f")
        assert f(completions=["x"]) == [float(value)]
        assert f.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        digests.append(f.sha256)
    name = f"{folder}/functions.py:trl"
    digests.append(load_reward_function(name).sha256)
    assert load_reward_function(name).function is load_reward_function(name).function
    neighbour = folder / "its_neighbour.py"
    neighbour.write_text("def is_same(a, b):\n    return a != b\n")
    changed = load_reward_function(name)
    assert changed(completions=["46"], answer=["46"]) == [0.0]
    assert len({*digests, changed.sha256}) == 4


ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(8)]
SMALL = (
    "--num_prompts 2 --num_generations 2 --eval_size 2 --max_completion_length 4 "
    "--device cpu --save_steps 1 --lr_scheduler_type constant"
).split()


@pytest.fixture
def trained(folder, tmp_path, capsys):
    "A run from the command line with a function of a file, and a rule."
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in ROWS))
    run = str(tmp_path / "run")
    spec = f"{folder}/functions.py:trl"
    arguments = ["--task", str(rows), "--max_steps", "1", "--output_dir", run]
    main(["train", *arguments, *SMALL, "--reward_funcs", spec, "brevity"])
    capsys.readouterr()
    return run, spec


def ended(*arguments):
    "What a command that is refused says."
    with pytest.raises(SystemExit) as caught:
        main([*arguments])
    return str(caught.value)


def test_a_run_from_the_command_line(trained, monkeypatch, capsys):
    "Train, look, resume, chat: each names the file again, and compares."
    run, spec = trained
    config = json.loads(open(f"{run}/config.json").read())
    digest = load_reward_function(spec).sha256
    described = {"name": "trl", "sha256": digest, "file": spec}
    assert config["passed"]["functions"] == {"reward_funcs[0]": described}
    assert config["reward_funcs"] == ["trl", "brevity"]
    (line,) = read_metrics(run)
    assert {"rewards/trl/mean", "rewards/brevity/mean"} <= line.keys()
    assert line["rewards/trl/seconds"] >= 0

    ask = f"--reward_funcs {spec} brevity"
    assert ask in ended("resume", run) and ask in ended("chat", run)
    with pytest.raises(ValueError, match=rf"reward_funcs=\['{spec}', 'brevity'\]"):
        open_run(run)

    talks = []
    monkeypatch.setattr(command_line, "chat", talks.append)
    main(["chat", run, "--reward_funcs", spec, "brevity"])
    assert talks[0].answers("1+1=", 2)["reward"].notna().all()
    opened = open_run(run, reward_funcs=[spec, "brevity"])
    assert opened.rewards[0].func.__name__ == "trl"
    main(["resume", run, "--max_steps", "2", "--reward_funcs", spec, "brevity"])
    assert len(read_metrics(run)) == 1  # it was finished


def test_a_changed_file_is_refused(trained, folder):
    run, spec = trained
    neighbour = folder / "its_neighbour.py"
    neighbour.write_text(neighbour.read_text() + "# changed\n")
    changed = "reward_funcs[0] is not the trl that it was: another source"
    assert changed in ended("resume", run, "--reward_funcs", spec, "brevity")
    assert changed in ended("chat", run, "--reward_funcs", spec, "brevity")
    for other in (spec, f"{folder}/functions.py:plain", lambda completions, **_: [0.0]):
        with pytest.raises(ValueError, match=r"other reward functions \(reward_funcs"):
            open_run(run, reward_funcs=[other, "brevity"])


def test_an_interrupted_run_goes_on_with_its_file_alone(folder, tmp_path):
    spec = f"{folder}/functions.py:verl"
    columns = {"data_source": "sums", "extra_info": {"index": 0}}
    task = [row | columns for row in ROWS]
    options = {
        "num_prompts": 2,
        "num_generations": 2,
        "eval_size": 2,
        "max_completion_length": 4,
        "save_steps": 1,
        "device": "cpu",
        "output_dir": str(tmp_path / "run"),
        "reward_funcs": spec,
    }

    def stop(line):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        train(make_config(**options, max_steps=2), task, progress=False, on_step=stop)
    config = saved_config(tmp_path / "run", resume=True)
    assert config.reward_funcs == ["verl"]
    with pytest.raises(
        ValueError, match=r"pass its own to train \(reward_funcs=\.\.\."
    ):
        train(config, task, progress=False)
    run = train(config, task, reward_funcs=spec, progress=False)
    assert len(run.metrics) == 2


def test_a_config_that_names_code_is_not_followed(trained, tmp_path):
    "Whatever stands in a run's files: only what this call names is imported."
    run, spec = trained
    evil = tmp_path / "evil.py"
    evil.write_text(
        f"open({str(tmp_path / 'was_here')!r}, 'w')\ndef f(completions): 0\n"
    )
    path = tmp_path / "run/config.json"
    config = json.loads(path.read_text())
    config["reward_funcs"] = [f"{evil}:f"]
    for passed in ({}, config["passed"]):
        path.write_text(json.dumps(config | {"passed": passed}))
        ended("chat", run)
        ended("resume", run)
        for look in (open_run, saved_config):
            with pytest.raises(ValueError):
                look(run)
    assert not (tmp_path / "was_here").exists()


# Slow ones ----------------------------------------------------------------------------


def one(prompts, completions, **_):
    return [1.0] * len(completions)


def test_a_call_that_takes_too_long(recwarn):
    "Both kinds of function; `stop` and `drop`; the others are judged."
    done = threading.Event()

    def stuck(prompts, completions, **_):
        done.wait(20)

    cancelled = []

    async def waits(prompts, completions, **_):
        try:
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    begun = time.perf_counter()
    for f in (stuck, waits):
        with pytest.raises(
            RuntimeError, match=f"'{f.__name__}'.*reward_timeout = 0.05"
        ):
            score(rollout_of(["46", "47"]), [one, f], timeout=0.05)
        rollout = rollout_of(["46"] * 4, ["1+1=", "2+2="])
        means, seconds = timed_score(rollout, [one, f], None, "drop", 0.05)
        assert not rollout.scored.any() and math.isnan(means["rewards/one/mean"])
        assert 0.05 <= seconds[f"rewards/{f.__name__}/seconds"] < 5
    done.set()
    assert time.perf_counter() - begun < 5 and cancelled


def test_a_limit_changes_no_reward():
    f = [one, lambda completions, **_: np.arange(len(completions))]
    plain, limited = rollout_of(["46"] * 4), rollout_of(["46"] * 4)
    assert score(plain, f) == score(limited, f, timeout=60.0)
    assert plain.rewards.equal(limited.rewards)


def test_what_a_function_raises_in_its_thread_is_what_is_said():
    def raises(prompts, completions, **_):
        raise TimeoutError("the server is away")

    for timeout in (None, 5.0):
        with pytest.raises(
            RuntimeError, match="raised TimeoutError: the server is away"
        ):
            judge([raises], rollout_of(["46"] * 2), timeout)


def test_gradients_are_off_in_the_thread_where_they_are_off_here():
    found = []

    def looks(prompts, completions, **_):
        found.append(torch.is_grad_enabled())
        return [0.0] * len(completions)

    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            judge([looks], rollout_of(["46"] * 2), 5.0)
    assert found == [True, False]


def test_groups_that_may_be_dropped_wait_together():
    async def distant(prompts, completions, **_):
        await asyncio.sleep(0.2)
        return [1.0] * len(completions)

    rollout = rollout_of(["46"] * 16, [f"{i}+1=" for i in range(8)])
    begun = time.perf_counter()
    _, seconds = timed_score(rollout, [distant] * 2, None, "drop")
    assert time.perf_counter() - begun < 0.9
    assert 0.2 <= seconds["rewards/distant/seconds"] < 0.9


def test_a_slow_function_is_named_while_it_is_waited_for(monkeypatch, capsys):
    monkeypatch.setattr(judging, "_PATIENCE", 0.05)

    def dawdles(prompts, completions, **_):
        time.sleep(0.2)
        return [1.0] * len(completions)

    async def distant(prompts, completions, **_):
        await asyncio.sleep(0.4)
        return [1.0] * len(completions)

    judge([one], rollout_of(["46"] * 2))
    assert capsys.readouterr().err == ""
    judge([dawdles, distant], rollout_of(["46"] * 2))
    lines = capsys.readouterr().err.splitlines()
    assert "waiting for reward function dawdles: 0 s" in lines
    assert "waiting for reward function distant: 0 s" in lines


# By name ------------------------------------------------------------------------------


def test_a_form_needs_its_pattern(tmp_path):
    "Rows have no form of their own; `.+` would pay anything."
    small = {"num_prompts": 2, "eval_size": 2, "device": "cpu", "max_steps": 1}
    small |= {"num_generations": 2, "max_completion_length": 4}
    small |= {"reward_funcs": "format", "output_dir": str(tmp_path / "run")}
    with pytest.raises(ValueError, match="no form of its own; format_pattern must be"):
        train(make_config(**small), ROWS, progress=False)
    with pytest.raises(ValueError, match=r"format_pattern = '\(': is no regular"):
        make_config(**small, format_pattern="(")
    unused = make_config(**small | {"reward_funcs": "brevity"}, format_pattern="x")
    with pytest.raises(ValueError, match="format_pattern = 'x' does nothing"):
        train(unused, ROWS, progress=False)
    assert not (tmp_path / "run").exists()
    run = train(make_config(**small, format_pattern="[0-9]"), ROWS, progress=False)
    one_digit = run.completions["completion"].str.fullmatch("[0-9]")
    assert run.completions["reward"].tolist() == one_digit.astype(float).tolist()


def test_math_by_name_judges_held_out_answers_too(tmp_path):
    config = make_config(
        num_prompts=2,
        num_generations=2,
        eval_size=2,
        max_steps=1,
        max_completion_length=4,
        device="cpu",
        reward_funcs=["math", "brevity"],
        output_dir=str(tmp_path / "run"),
    )
    rows = [{"prompt": f"{i}+1=", "answer": rf"\boxed{{{i + 1}}}"} for i in range(8)]
    run = train(config, rows, progress=False)
    (line,) = read_metrics(run.directory)
    assert line["eval/accuracy"] > 0  # the strict rule calls no digit `\boxed{2}`
    assert open_run(run.directory, task=rows).task.is_right("2", as_task(rows).query(1))
    with pytest.raises(
        ValueError, match="choice: .*row 1 must have as its answer a let"
    ):
        train(
            make_config(reward_funcs="choice", output_dir=str(tmp_path / "other")), rows
        )
    with pytest.raises(ValueError, match="math: task .* has no right answers"):
        train(
            make_config(reward_funcs="math", output_dir=str(tmp_path / "other")),
            [{"prompt": "1+1="}],
        )
