"""Bad input gives a clear error, which names the argument, the value and what is
allowed, before any work is lost."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import papermill
import pytest
import torch

from grpo_nb.engine.models import EngineModels
from grpo_nb.run.options import make_config
from grpo_nb.gae import gae, whiten
from grpo_nb.group import group_advantages, process_advantages
from grpo_nb.objective import aggregate, policy_loss
from grpo_nb.policy import as_rollout, encode_prompts, load_policy, token_logprobs
from grpo_nb.reference import kl
from grpo_nb import sampling
from grpo_nb.engine.data import load_task
from grpo_nb.engine.judging import RewardModel, combine, score
from grpo_nb.run.build import load_rewards
from grpo_nb.run.training import train
from grpo_nb.engine.decoding import sample
from grpo_nb.task import Query
from grpo_nb.engine.micro_batch import micro_batches
from grpo_nb.update import update
from grpo_nb.value import value_loss
from helpers import ROOT, character_tokenizer, random_model, read_metrics, short_config

ONE = torch.ones(4)
TABLE = torch.ones(4, 3)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"temperature": 0}, ["temperature", "0", "greater than 0"]),
        ({"temperature": -1.5}, ["temperature", "-1.5", "greater than 0"]),
        ({"temperature": math.nan}, ["temperature", "nan"]),
        (
            {"num_generations": 1},
            ["num_generations", "1", "greater than or equal to 2"],
        ),
        ({"algorithm": "dpo"}, ["algorithm", "'dpo'", '"grpo" or "ppo"']),
        ({"task": "chess"}, ["task", "'chess'", "add, sums, target"]),
        ({"dtype": "float16"}, ["dtype", "'float16'", "'float32' or 'bfloat16'"]),
        ({"device": "cuda:99"}, ["device", "'cuda:99'", '"auto"']),
        ({"device": "abacus"}, ["device", "'abacus'", '"auto"']),
        ({"recipe": "x"}, ["recipe", "'x'", "deepseekmath"]),
        ({"top_p": 0.0}, ["top_p", "0.0", "greater than 0"]),
        ({"top_p": 1.1}, ["top_p", "1.1", "less than or equal to 1"]),
        ({"top_k": -1}, ["top_k", "-1", "greater than or equal to 0"]),
        ({"num_prompts": 0}, ["num_prompts", "0", "greater than 0"]),
        ({"num_prompts": 2.5}, ["num_prompts", "2.5", "integer"]),
        ({"max_steps": "many"}, ["max_steps", "'many'", "integer"]),
        ({"digits": 4}, ["digits", "4", "1, 2 or 3"]),
        ({"beta": -0.1}, ["beta", "-0.1", "greater than or equal to 0"]),
        ({"learning_rate": 0.0}, ["learning_rate", "0.0", "greater than 0"]),
        ({"delta": 1.0}, ["delta", "1.0", "greater than 1"]),
        (
            {"scale_rewards": "std"},
            ["scale_rewards = 'std'", '"batch_centred" or "none"'],
        ),
        ({"objective": "ppo"}, ["objective = 'ppo'", 'be "clip", "cispo" or "sapo"']),
        (
            {"loss_type": "sum"},
            ["loss_type = 'sum'", 'be "grpo", "bnpo", "dapo" or "dr_grpo"'],
        ),
        (
            {"importance_sampling_level": "word"},
            [
                "importance_sampling_level",
                "'word'",
                'be "token", "sequence" or "sequence_token"',
            ],
        ),
        (
            {"importance_sampling_level": "sequence", "algorithm": "ppo"},
            [
                'importance_sampling_level = "sequence"',
                'algorithm = "ppo"',
                '"token" or "sequence_token"',
            ],
        ),
        (
            {"importance_sampling_level": "sequence", "reward_funcs": ["process"]},
            ["importance_sampling_level", '"sequence"', '"sequence_token"', "process"],
        ),
        ({"delta": 1.19}, ["delta", "1.19", "1.2"]),
        ({"delta": 1.9, "epsilon_high": 1.0}, ["delta", "1.9", "2.0"]),
        ({"delta": 1.3, "epsilon": 0.5}, ["delta", "1.3", "1.5"]),
        (
            {"delta": 9.0, "objective": "cispo"},
            ["delta", "9.0", '"cispo"', "None"],
        ),
        (
            {"delta": 9.0, "objective": "sapo"},
            ["delta", "9.0", '"sapo"', "None"],
        ),
        (
            {"epsilon_high": 0.28, "recipe": "sapo"},
            ["epsilon_high", "0.28", '"sapo"', "None"],
        ),
        ({"sapo_temperature_pos": 0}, ["sapo_temperature_pos", "greater than 0"]),
        (
            {"sapo_temperature_neg": -1.05, "algorithm": "ppo"},
            ["sapo_temperature_neg", "-1.05", "greater than 0"],
        ),
        (
            {"use_bias_correction_kl": True, "beta": 0.0},
            ["use_bias_correction_kl", "True", "beta is 0"],
        ),
        (
            {"algorithm": "ppo", "kl_target": 6.0, "beta": 0.0},
            ["kl_target", "6.0", "beta is 0"],
        ),
        ({"lr_scheduler_type": "zigzag"}, ["lr_scheduler_type", "'zigzag'", "cosine"]),
        ({"reward_funcs": []}, ["reward_funcs", "[]", "at least 1"]),
        ({"nonsense": 3}, ["nonsense", "3", "allowed", "num_prompts"]),
        ({"algorithm": "grpo", "lam": 0.5}, ["lam", "0.5", "only ppo"]),
        (
            {"algorithm": "ppo", "num_generations": 8},
            ["num_generations", "8", "only grpo"],
        ),
        ({"learning_rate": math.inf}, ["learning_rate", "inf", "finite"]),
        ({"reward_weights": [math.nan]}, ["reward_weights", "nan", "finite"]),
        ({"temperature": 0, "top_k": -1}, ["temperature", "top_k"]),
    ],
    ids=str,
)
def test_config(options, words):
    """Every wrong option is refused when the config is made, before there is a model
    or a directory; several at once are all named."""
    with pytest.raises(ValueError) as error:
        make_config(**options)
    for word in words:
        assert word in str(error.value)
    assert "pydantic" not in str(error.value)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: group_advantages(ONE, 1), ["num_generations", "1", "at least 2"]),
        (
            lambda: group_advantages(ONE, 3),
            ["rewards", "4", "multiple of num_generations = 3"],
        ),
        (lambda: group_advantages(TABLE, 2), ["rewards", "(4, 3)", "[N]"]),
        (
            lambda: group_advantages(ONE, 2, "std"),
            ["scale_rewards", "'std'", '"group", "batch", "batch_centred" or "none"'],
        ),
        (
            lambda: group_advantages(ONE, 2, baseline="best"),
            ["baseline", "'best'", '"leave_one_out"'],
        ),
        (
            lambda: process_advantages(TABLE, 1),
            ["num_generations", "1", "at least 2"],
        ),
        (
            lambda: process_advantages(ONE, 2),
            ["step_rewards", "[N, T]", "(4,)"],
        ),
        (
            lambda: process_advantages(TABLE.long(), 2),
            ["step_rewards", "floating point", "torch.int64"],
        ),
        (
            lambda: process_advantages(TABLE, 3),
            ["step_rewards", "4", "multiple of num_generations = 3"],
        ),
        (
            lambda: policy_loss(TABLE, TABLE, torch.ones(3), TABLE > 0),
            ["advantages", "(3, 1)", "4, 3"],
        ),
        (
            lambda: policy_loss(TABLE, TABLE, ONE, TABLE > 0, objective="x"),
            ["objective", "'x'", 'be "clip", "cispo" or "sapo"'],
        ),
        (
            lambda: policy_loss(
                TABLE, TABLE, ONE, TABLE > 0, sapo_temperature_pos=math.nan
            ),
            ["sapo_temperature_pos", "positive and finite", "nan"],
        ),
        (
            lambda: policy_loss(
                TABLE, TABLE, ONE, TABLE > 0, sapo_temperature_neg=math.inf
            ),
            ["sapo_temperature_neg", "positive and finite", "inf"],
        ),
        (
            lambda: policy_loss(
                TABLE, TABLE, ONE, TABLE > 0, importance_sampling_level="x"
            ),
            [
                "importance_sampling_level",
                "'x'",
                'be "token", "sequence" or "sequence_token"',
            ],
        ),
        (
            lambda: policy_loss(
                TABLE,
                TABLE,
                torch.arange(12.0).view(4, 3),
                TABLE > 0,
                importance_sampling_level="sequence",
            ),
            ["importance_sampling_level", '"sequence"', "advantages", "sequence_token"],
        ),
        (
            lambda: policy_loss(TABLE, TABLE, ONE, TABLE > 0, delta=1.1),
            ["delta", "1.1", "at least 1 + epsilon_high = 1.2"],
        ),
        (
            lambda: policy_loss(
                TABLE, TABLE, ONE, TABLE > 0, epsilon_high=2.0, delta=2.9
            ),
            ["delta", "2.9", "at least 1 + epsilon_high = 3.0"],
        ),
        (
            lambda: policy_loss(TABLE, TABLE, ONE, TABLE > 0, delta=math.nan),
            ["delta", "nan", "at least 1 + epsilon_high"],
        ),
        (
            lambda: gae(TABLE, TABLE, torch.tensor([[True, False, True]] * 4)),
            ["mask", "right only", "gap"],
        ),
        (
            lambda: gae(TABLE, TABLE, torch.tensor([[False, True, True]] * 4)),
            ["mask", "right only", "gap"],
        ),
        (
            lambda: gae(3e38 * TABLE, 3e38 * TABLE, TABLE > 0),
            ["rewards and values", "torch.float32"],
        ),
        (
            lambda: group_advantages(torch.tensor([0.0, math.inf]), 2),
            ["rewards", "inf", "1e+150"],
        ),
        (
            lambda: group_advantages(
                torch.tensor([0.0, -1e300], dtype=torch.float64), 2
            ),
            ["rewards", "-1e+300", "1e+150"],
        ),
        (
            lambda: group_advantages(torch.tensor([3e38, -3e38, -3e38]), 3, "none"),
            ["rewards", "torch.float32", "4e+38"],
        ),
        (
            lambda: process_advantages(torch.tensor([[1.0], [math.inf]]), 2),
            ["step_rewards", "completion 1", "inf", "1e+150"],
        ),
        (
            lambda: value_loss(0 * TABLE, 0 * TABLE, 1e20 * TABLE, TABLE > 0),
            ["returns", "torch.float32", "1e+20"],
        ),
        (
            lambda: aggregate(TABLE, TABLE > 0, "x"),
            ["loss_type", "'x'", 'be "grpo", "bnpo", "dapo" or "dr_grpo"'],
        ),
        (
            lambda: aggregate(TABLE, TABLE > 0, "dr_grpo"),
            ["max_completion_length", "None"],
        ),
        (lambda: kl(TABLE, TABLE, "k4"), ["estimator", "'k4'", '"k1", "k2" or "k3"']),
        (lambda: kl(TABLE, ONE), ["ref_logprobs", "(4, 3)", "(4,)"]),
        (
            lambda: gae(TABLE, TABLE[:, :2], TABLE > 0),
            ["rewards, values and mask", "4, 2"],
        ),
        (lambda: gae(TABLE.long(), TABLE, TABLE > 0), ["rewards", "torch.int64"]),
        (
            lambda: whiten(TABLE.long(), TABLE > 0),
            ["x must be floating point", "torch.int64"],
        ),
        (
            lambda: group_advantages(ONE.long(), 2),
            ["rewards", "floating point", "torch.int64"],
        ),
        (
            lambda: policy_loss(TABLE, TABLE, ONE, TABLE),
            ["mask be bool", "torch.float32"],
        ),
        (lambda: combine(TABLE, [1.0]), ["reward_weights", "1", "3"]),
        (lambda: load_task("chess"), ["task", "'chess'", "add, sums, target"]),
        (lambda: load_task("add", digits=9), ["digits", "9", "1, 2 or 3"]),
        (
            lambda: load_task("add").queries("test", 3),
            ["split", "'test'", '"train" or "heldout"'],
        ),
        (lambda: load_task("add").queries("train", 0), ["n must be at least 1", "0"]),
        (
            lambda: load_policy("/nowhere/at/all"),
            ["model", "'/nowhere/at/all'", "'tiny'"],
        ),
        (lambda: load_policy("no-such/model"), ["model", "'no-such/model'", "hub id"]),
        (lambda: load_policy("tiny", "cuda:99"), ["device", "'cuda:99'", '"cpu"']),
        (
            lambda: load_policy("tiny", "cpu", "int3"),
            ["dtype", "'int3'", '"float32", "bfloat16" or'],
        ),
        (
            lambda: load_rewards(["beauty"], load_task("add")),
            ["reward_funcs", "'beauty'", "accuracy, math, choice, brevity"],
        ),
        (lambda: load_rewards([], load_task("add")), ["reward_funcs", "at least one"]),
        (
            lambda: encode_prompts(character_tokenizer(), []),
            ["queries", "at least one", "none"],
        ),
        (
            lambda: encode_prompts(character_tokenizer(), [Query("1"), Query("")]),
            ["query 1", "empty", "''"],
        ),
        (
            lambda: encode_prompts(
                character_tokenizer(), [Query([{"role": "user", "content": "1"}])]
            ),
            ["query 0", "no chat template"],
        ),
        (
            lambda: as_rollout(
                character_tokenizer(), [Query("1"), Query("2")], ["1", "2", "3"]
            ),
            ["completions", "multiple of the 2 queries", "3"],
        ),
    ],
)
def test_functions(call, words):
    "The leaves of the library check their arguments, too: shapes, choices, ranges."
    with pytest.raises(ValueError) as error:
        call()
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"queries": []}, ["queries", "none", "at least one"]),
        ({"queries": [Query("")]}, ["query 0", "empty"]),
        (
            {"queries": [Query("1"), Query("1" * 61)]},
            ["query 1", "61 prompt tokens", "max_completion_length 4", "context of 64"],
        ),
        ({"max_completion_length": 64}, ["max_completion_length", "64"]),
        ({"num_generations": 0}, ["num_generations", "0", ">= 1"]),
        ({"max_completion_length": 0}, ["max_completion_length", "0", ">= 1"]),
        ({"temperature": 0.0}, ["temperature", "0.0", "> 0"]),
        ({"temperature": -1}, ["temperature", "-1", "> 0"]),
        ({"top_p": 0}, ["top_p", "0", "<= 1"]),
        ({"top_k": -1}, ["top_k", "-1", ">= 0"]),
        ({"temperature": float("nan")}, ["temperature", "nan", "> 0"]),
        ({"num_generations": float("nan")}, ["num_generations", "nan", ">= 1"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("sample", [sampling.sample, sample], ids=["simple", "fast"])
def test_sample(llama, tokenizer, sample, options, words):
    arguments = {
        "queries": [Query("1+2=")],
        "num_generations": 2,
        "max_completion_length": 4,
    } | options
    with pytest.raises(ValueError) as error:
        sample(llama, tokenizer, **arguments)
    for word in words:
        assert word in str(error.value)


def test_the_context_may_be_filled_to_the_last_token(llama, tokenizer):
    for sampler in (sampling.sample, sample):
        rollout = sampler(llama, tokenizer, [Query("1" * 60)], 1, 4)
        assert rollout.completion_ids.shape[1] <= 4


def test_a_rollout_checks_its_shapes(rollout):
    "A batch that the group size does not divide, and masks of another shape."
    with pytest.raises(
        ValueError,
        match="completion_ids must have 3 queries x 2 generations = 6 rows, got 9",
    ):
        replace(rollout, num_generations=2)
    with pytest.raises(
        ValueError,
        match=r"completion_mask must be Bool\[Tensor, 'N T'\] with N = 9; got "
        r"\(torch.bool, 9, 5\)",
    ):
        replace(rollout, completion_mask=rollout.completion_mask[:, 1:])
    with pytest.raises(ValueError, match="num_generations be at least 1, got 3 and 0"):
        replace(rollout, num_generations=0)
    with pytest.raises(ValueError, match="groups must name at least one group"):
        rollout.select([])
    with pytest.raises(
        ValueError, match="max_tokens_per_micro_batch must be at least 1, got 0"
    ):
        micro_batches(rollout, 0)


def test_an_update_needs_advantages(llama, rollout):
    with pytest.raises(ValueError, match="rollout.advantages is None"):
        update(
            EngineModels(llama, None, None),
            replace(rollout, advantages=None),
            short_config(),
        )


def test_an_update_with_a_beta_needs_the_reference(llama, rollout):
    "Else the KL would be left out of the loss without a word."
    bare = replace(rollout, advantages=torch.zeros(len(rollout)), ref_logprobs=None)
    with pytest.raises(ValueError, match="rollout.ref_logprobs is None.*beta=0"):
        update(EngineModels(llama, None, None), bare, short_config(), beta=0.1)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        token_logprobs(llama, rollout, 0)


# Reward functions ---------------------------------------------------------------------


def raises(**_):
    raise KeyError("answer")


@pytest.mark.parametrize(
    "function, error, words",
    [
        (raises, RuntimeError, ["'raises'", "KeyError", "answer"]),
        (
            lambda completions, **_: [1.0] * (len(completions) - 1),
            ValueError,
            ["'<lambda>'", "return 3 scores", "2"],
        ),
        (lambda **_: 1.0, TypeError, ["'<lambda>'", "list of 3 numbers", "float"]),
        (lambda **_: None, TypeError, ["'<lambda>'", "list of 3 numbers", "NoneType"]),
        (
            lambda **_: torch.tensor(1.0),
            ValueError,
            ["'<lambda>'", "return 3 scores", "1"],
        ),
        (
            lambda **_: [1.0, math.nan, 0.0],
            ValueError,
            ["'<lambda>'", "nan", "completion 1", "finite number or None"],
        ),
        (
            lambda **_: [1.0, math.inf, 0.0],
            ValueError,
            ["'<lambda>'", "inf", "completion 1"],
        ),
        (
            lambda **_: torch.tensor([1.0, torch.nan, 0.0]),
            ValueError,
            ["nan", "completion 1"],
        ),
        (
            lambda **_: [1.0, "good", 0.0],
            TypeError,
            ["'<lambda>'", "'good'", "completion 1", "a number or None"],
        ),
        (lambda **_: [1.0, [1.0], 0.0], TypeError, ["[1.0]", "completion 1"]),
        (lambda **_: "abc", TypeError, ["'a'", "completion 0"]),
        (
            lambda **_: {"a": 1, "b": 2, "c": 3},
            TypeError,
            ["list of 3 numbers", "dict"],
        ),
    ],
    ids=[
        "raises",
        "too few",
        "a number",
        "None",
        "0-d tensor",
        "NaN",
        "inf",
        "NaN in a tensor",
        "text",
        "nested",
        "string",
        "dict",
    ],
)
def test_reward_function(tokenizer, function, error, words):
    "The function is named, with what it returned."
    rollout = as_rollout(tokenizer, [Query("1+2=")], ["3", "4", "5"])
    with pytest.raises(error) as caught:
        score(rollout, [function])
    for word in words:
        assert word in str(caught.value)
    assert rollout.rewards is None


@pytest.mark.parametrize(
    "scores",
    [
        [1, 0.5, None],
        (1.0, 0.0, 0.5),
        torch.tensor([1, 0, 1]),
        [torch.tensor(1.0), 0, True],
    ],
    ids=["list", "tuple", "tensor", "mixed"],
)
def test_reward_functions_may_return(tokenizer, scores):
    rollout = as_rollout(tokenizer, [Query("1+2=")], ["3", "4", "5"])
    score(rollout, [lambda **_: scores])
    expected = [math.nan if x is None else float(x) for x in scores]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(rollout.rewards, expected, equal_nan=True)


def test_a_reward_function_that_fails_late_loses_nothing(tmp_path):
    "What was sampled and measured before it raised is in the directory."
    calls = []

    def fails_late(completions, **_):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("judge is down")
        return [float(len(text)) for text in completions]

    with pytest.raises(
        RuntimeError, match="'fails_late' raised OSError: judge is down"
    ):
        train(
            short_config(max_steps=5, output_dir=str(tmp_path)),
            reward_funcs=[fails_late],
            progress=False,
        )
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert set(pd.read_parquet(tmp_path / "completions.parquet")["step"]) == {1, 2}


def test_a_reward_model_has_one_output(tokenizer):
    with pytest.raises(ValueError, match="num_labels=1, got 3"):
        RewardModel(SimpleNamespace(config=SimpleNamespace(num_labels=3)), tokenizer)


# Models -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_without_a_pad_token_is_no_obstacle(kind):
    """Masks say where padding is: a tokenizer without a pad token samples and trains
    exactly as one with it."""
    outcomes = []
    for pad in ("<pad>", None, "<eos>"):
        model, tokenizer = (
            random_model(kind, dtype=torch.float32),
            character_tokenizer(pad=pad),
        )
        model.config.pad_token_id = model.generation_config.pad_token_id = (
            tokenizer.pad_token_id
        )
        rollout = sample(
            model,
            tokenizer,
            [Query("1+2="), Query("34+567=")],
            3,
            6,
            generator=torch.Generator().manual_seed(0),
        )
        rollout.advantages = torch.arange(6.0) - 2.5
        metrics = update(
            EngineModels(model, None, torch.optim.SGD(model.parameters(), lr=0.1)),
            rollout,
            short_config(),
        )
        outcomes.append(
            (
                rollout.completion_ids[rollout.completion_mask].tolist(),
                rollout.completion_mask.tolist(),
                metrics,
                [p.detach().clone() for p in model.parameters()],
            )
        )
    for other in outcomes[1:]:
        assert other[:3] == outcomes[0][:3] and all(
            p.equal(q) for p, q in zip(other[3], outcomes[0][3])
        )


def test_a_model_without_an_end_is_cut_at_the_limit():
    "No EOS id anywhere: completions run to the limit and are called truncated."
    model, tokenizer = random_model(), character_tokenizer(eos=None)
    model.generation_config.eos_token_id = None
    rollout = sample(model, tokenizer, [Query("1+2=")], 3, 5)
    assert (
        rollout.completion_mask.all()
        and rollout.truncated.all()
        and rollout.completion_ids.shape == (3, 5)
    )


def test_an_unknown_model_leaves_no_run_behind(tmp_path):
    "After the error the same directory can be used."
    for options in ({"model": "/nowhere"}, {"reward_funcs": ["/nowhere"]}):
        with pytest.raises(ValueError, match="'/nowhere'"):
            train(
                short_config(output_dir=str(tmp_path / "run"), **options),
                progress=False,
            )
    train(short_config(output_dir=str(tmp_path / "run")), progress=False)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_completion_length": 300}, "max_completion_length 300.*context of 256"),
        ({"task": "add_chat"}, "no chat template"),
    ],
    ids=["too long", "chat"],
)
def test_a_task_that_the_model_cannot_do_leaves_no_run_behind(
    tmp_path, options, message
):
    """More tokens than the embedded model's context of 256, or a chat without a chat
    template: refused before anything is written."""
    with pytest.raises(ValueError, match=message):
        train(short_config(output_dir=str(tmp_path / "run"), **options), progress=False)
    train(short_config(output_dir=str(tmp_path / "run")), progress=False)


# Names --------------------------------------------------------------------------------

UNREACHED = """
import json, sys, time
slept = []
time.sleep = slept.append
import torch
from grpo_nb.policy import load_policy
from grpo_nb.engine.data import load_task
from grpo_nb.engine.judging import RewardModel
from grpo_nb.run.build import load_rewards, load_value_model
add, (policy, _) = load_task("add"), load_policy("tiny", "cpu")
loaders = {
    "model": lambda name: load_policy(name, "cpu"),
    "value_model": lambda name: load_value_model(name, policy),
    "reward model": lambda name: RewardModel.from_pretrained(name, "cpu"),
    "reward_funcs": lambda name: load_rewards([name], add, "cpu"),
    "task": load_task,
    "gsm8k": lambda name: load_task("gsm8k:" + name),
}
errors = {}
for what, name in json.loads(sys.argv[1]):
    try:
        loaders[what](name)
    except ValueError as error:
        errors[what + " " + name] = str(error)
print("\\n" + json.dumps([errors, slept]))
"""
KINDS = ("model", "value_model", "reward model", "reward_funcs", "task", "gsm8k")


def test_a_name_that_is_nowhere_is_not_waited_for(tmp_path):
    """No network: a path or a rule that is misspelt is refused with what is near; a
    name on the hub is tried once."""
    (tmp_path / "runs/0001/model").mkdir(parents=True)
    (tmp_path / "data.jsonl").write_text("")
    names = [(what, name) for what in KINDS for name in ("no/such", "rnus/0001/model")]
    names += [("reward_funcs", "acuracy"), ("model", "tinny"), ("model", "gpt2")]
    names += [("model", "runs/0002"), ("value_model", "seperate"), ("task", "ad")]
    names += [("task", "dta.jsonl"), ("model", "~/nothing"), ("model", "./x/y")]
    names += [("reward_funcs", "rules.py"), ("model", "a//b"), ("model", "x" * 5000)]
    environment = {x: y for x, y in os.environ.items() if "OFFLINE" not in x}
    done = subprocess.run(
        [sys.executable, "-c", UNREACHED, json.dumps(names)],
        env=environment
        | {"HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    errors, slept = json.loads(done.stdout.splitlines()[-1])
    assert slept == [] and errors.keys() == {" ".join(pair) for pair in names}
    near = {name: x.partition("near: ")[2] for name, x in errors.items()}
    assert near["reward_funcs acuracy"] == "accuracy" and near["model tinny"] == "tiny"
    assert near["value_model seperate"] == "separate" and near["task ad"] == "add"
    assert (
        near["task dta.jsonl"] == "data.jsonl"
        and near["model runs/0002"] == "runs/0001"
    )
    for what in KINDS:
        assert near[f"{what} rnus/0001/model"] == "runs/0001/model", what
        assert near[f"{what} no/such"] == ""
    hub = {"model gpt2", *(f"{what} no/such" for what in KINDS)}
    local = {
        "reward_funcs acuracy",
        "model runs/0002",
        "model ./x/y",
        "model ~/nothing",
    }
    for name in local | {"reward_funcs rules.py", "reward model rnus/0001/model"}:
        assert "no such path" in errors[name], errors[name]
    assert not any("no such path" in errors[name] for name in hub)


# Directories --------------------------------------------------------------------------


def test_an_old_run_is_not_touched(tmp_path):
    config = short_config(output_dir=str(tmp_path / "run"))
    train(config, progress=False)
    before = {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in (tmp_path / "run").rglob("*")
        if path.is_file()
    }
    with pytest.raises(ValueError) as error:
        train(config, progress=False)
    for word in ("output_dir", str(tmp_path / "run"), "already holds a run", "resume"):
        assert word in str(error.value)
    assert {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in (tmp_path / "run").rglob("*")
        if path.is_file()
    } == before


def test_a_file_is_not_a_directory(tmp_path):
    (tmp_path / "run").write_text("notes")
    with pytest.raises(ValueError, match="output_dir .* is a file"):
        train(short_config(output_dir=str(tmp_path / "run")), progress=False)
    assert (tmp_path / "run").read_text() == "notes"


def test_runs_without_a_name_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="resume = True needs output_dir"):
        train(short_config(resume=True), progress=False)
    for _ in range(2):
        train(short_config(), progress=False)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["0001", "0002"]


# Papermill ----------------------------------------------------------------------------


def test_papermill_parameters(tmp_path, monkeypatch):
    """A parameter that no config has stops the notebook before a model is loaded.

    That the cells say what `make_config` says of any others is in test_fuzz.py."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(papermill.PapermillExecutionError) as error:
        papermill.execute_notebook(
            ROOT / "nbs/experiments/train.ipynb",
            tmp_path / "out.ipynb",
            {"nonsense": 3},
            progress_bar=False,
            kernel_name="python3",
            log_output=False,
        )
    said = re.sub(r"\x1b\[[0-9;]*m", "", str(error.value))
    for word in ("nonsense = 3", "not a parameter of grpo", "num_prompts"):
        assert word in said, said
    assert not list(tmp_path.rglob("config.json"))


def test_a_reward_model_is_not_made_of_a_policy_with_adapters():
    "Its weights would be named after the adapters, not after the trunk."
    policy = random_model("llama")
    policy.peft_config = {}
    with pytest.raises(ValueError, match="policy has adapters .*before they are added"):
        RewardModel.from_policy(policy, character_tokenizer())
