"""Every public function against arguments that nobody should give it, drawn by
machine.

A call ends in one of two ways: with the right result (that of an independent, slow
computation where there is one; always of the right shape and dtype, and finite where
what counts is finite), or with a `ValueError` or `TypeError`. It is never a wrong
number, a crash from torch's depths, or a hang. A `ValueError` names an argument;
where a text or None stands for a number, Python's own `TypeError` is as good. What
takes a tensor, a rollout, a model, a task or a function always gets one here, of
whatever shape, dtype and content: a list in the place of a tensor is Python's
`AttributeError`.

The same cases every time; `GRPO_NB_FUZZ=1000` draws a thousand new ones for each
test."""

import ast
import contextlib
import copy
import fnmatch
import importlib
import inspect
import io
import itertools
import json
import math
import operator
import os
import pkgutil
import random
import re
import shutil
import string
import tempfile
import warnings
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo_nb
from grpo_nb import gae as gae_stage, group as group_stage
from grpo_nb.engine import distributed, vllm_sampler
from grpo_nb.evidence import ledger, oracles, plots, sweep as sweeping, trl_oracles
from grpo_nb.gae import gae, whiten
from grpo_nb.group import (
    SCALES,
    group_advantages,
    has_variance,
    informative,
    process_advantages,
)
from grpo_nb.run.options import CONFIGS, Config, GRPOConfig, PPOConfig, make_config
from grpo_nb.evidence.cost import (
    Size,
    cost_table,
    flops,
    forward_flops,
    measure_flops,
    parameters,
    training_bytes,
)
from grpo_nb.evidence.designs import difference_of_shares
from grpo_nb.evidence.statistics import (
    Claim,
    difference,
    interval,
    iqm,
    paired_difference,
    pass_at_k,
    verdicts,
)
from grpo_nb.engine import adapters, packing
from grpo_nb.engine.micro_batch import in_micro_batches, in_order, micro_batches
from grpo_nb.engine.packing import (
    completions_per_row,
    first_of_equal,
    passes_trial,
    rows_alone,
    shared_rows,
    shares_prompt,
    sharing_width,
    takes_padding,
)
from grpo_nb.figure import boxes, draw_figure
from grpo_nb.objective import aggregate, policy_loss, ratio
from grpo_nb.loading import check_causal, check_weights
from grpo_nb.policy import as_rollout, check_tokens, encode_prompts
from grpo_nb.policy import eos_token_ids
from grpo_nb.policy import load_policy, model_inputs, padding_id
from grpo_nb.loading import resolve_device, resolve_dtype
from grpo_nb.policy import position_ids
from grpo_nb.policy import token_logprobs
from grpo_nb.reference import (
    adapt_beta,
    kl,
    kl_in_reward,
    next_beta,
    reference_logprobs,
    token_rewards,
)
from grpo_nb.reward import (
    accuracy_reward,
    bradley_terry_loss,
    brevity_reward,
    format_reward,
    overlong_reward,
    process_reward,
    text_of,
)
from grpo_nb.checks import alternatives, check_choice, check_shapes, to_dtype
from grpo_nb.engine.judging import combine, judge, name_of, names_of, score
from grpo_nb.reward import score as plain_score
from grpo_nb.rollout import Rollout
from grpo_nb.run.dynamic_sampling import dynamic_sampling, rounds_of, step_of
from grpo_nb.sampling import check_context, check_numbers, decode_completions
from grpo_nb.engine.decoding import lacks_memory, sample
from grpo_nb.sampling import keep_likely, prepare_prompts
from grpo_nb.sampling import sample as simple_sample
from grpo_nb.evidence.sweep import cell_name, grid, sweep
from grpo_nb.task import (
    TASKS,
    Query,
    Task,
    add,
    add_chat,
    evaluate_expression,
    load_task,
    sums,
    target,
)
from grpo_nb.engine.hub import fetch_smollm2
from grpo_nb.run.build import Trainer, build_models, build_schedulers, load_rewards
from grpo_nb.run.checkpoint import RunState, checkpoints, is_whole, load_checkpoint
from grpo_nb.run.checkpoint import resume, save_checkpoint
from grpo_nb.run.command_line import main, parse_arguments, resume_arguments
from grpo_nb.run.diagnostics import StepGroups, groups_from_rows, token_numbers
from grpo_nb.run.iterative import preference_pairs
from grpo_nb.run.run_directory import prepare_directory, read_completions, read_json
from grpo_nb.run.training import Run, open_run, rollout_metrics, table, train
from grpo_nb.engine.models import EngineModels, importance_weights
from grpo_nb.update import batch_loss, update
from grpo_nb.value import ValueModel, predict_values, value_loss
from helpers import (
    CHARACTERS,
    EOS,
    ROOT,
    VOCABULARY,
    advantages_by_definition,
    character_tokenizer,
    dense_steps,
    process_advantages_by_definition,
    random_model,
    short_config,
)

EXAMPLES = int(os.environ.get("GRPO_NB_FUZZ", 40))
settings.register_profile(
    "fuzz",
    deadline=None,
    max_examples=EXAMPLES,
    database=None,
    derandomize="GRPO_NB_FUZZ" not in os.environ,
    report_multiple_bugs=False,
)
COVERED = set()


def fuzz(*functions, times=5):
    """A test of these functions over what `given` draws; `times`: the quicker a test
    is, the more often."""

    def decorate(test):
        COVERED.update(f"{f.__module__}.{f.__qualname__}" for f in functions)
        return settings(settings.get_profile("fuzz"), max_examples=times * EXAMPLES)(
            test
        )

    return decorate


class Outside(Exception):
    "What an oracle raises for arguments that are to be refused."


def need(condition):
    if not condition:
        raise Outside


# The mathematics: tensors -------------------------------------------------------------

ODD = [
    -1,
    0,
    1,
    0.5,
    2.5,
    -0.1,
    1e30,
    10**15,
    math.nan,
    math.inf,
    -math.inf,
    None,
    "1",
    "",
    True,
]
RESHAPED = {
    "[N, T-1]": lambda x: x[..., :-1],
    "[1, ...]": lambda x: x[None],
    "[..., 1]": lambda x: x[..., None],
    "first row": lambda x: x[:1],
    "no rows": lambda x: x[:0],
    "no columns": lambda x: x[..., :0],
    "flat": lambda x: x.flatten(),
    "one column": lambda x: x[..., :1],
    "turned": lambda x: x.mT if x.dim() > 1 else x[:, None],
    "a number": lambda x: x.flatten().sum(),
}
DTYPES = [torch.int64, torch.int32, torch.float16, torch.bfloat16, torch.float32]


def numbers(*shape):
    return st.integers(0, 2**31).map(
        lambda seed: torch.randn(
            *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
    )


@st.composite
def batches(draw, *names, vectors=()):
    """[N, T] tensors and [N] vectors of one size, with a mask of rows up to a
    length, which may be 0; N and T may be 0, too. On padding stands anything."""
    N, T = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    mask = (
        torch.arange(T)
        < torch.tensor(
            draw(st.lists(st.integers(0, T), min_size=N, max_size=N)), dtype=torch.long
        )[:, None]
    )
    junk = st.sampled_from([0.0, 99.0, -7.0, math.nan, -math.inf])
    return (
        {name: draw(numbers(N, T)).masked_fill(~mask, draw(junk)) for name in names}
        | {name: draw(numbers(N)) for name in vectors}
        | {"mask": mask}
    )


@st.composite
def spoilt(draw, arguments):
    "The arguments, and nearly always one of them, or two, as they should not be."
    for name in draw(
        st.lists(st.sampled_from(sorted(arguments)), max_size=2, unique=True)
    ):
        x = arguments[name]
        if isinstance(x, torch.Tensor):
            how = draw(st.sampled_from(["shape", "dtype", "numbers"]))
            if how == "shape":
                x = RESHAPED[draw(st.sampled_from(sorted(RESHAPED)))](x)
            elif how == "dtype":
                x = x.to(draw(st.sampled_from(DTYPES)))  # a mask of numbers, too
            elif x.is_floating_point() and x.numel():
                x = (
                    x.flatten()
                    .index_fill(
                        0,
                        torch.tensor(draw(st.integers(0, x.numel() - 1))),
                        draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e30])),
                    )
                    .view(x.shape)
                )
        else:
            x = draw(st.sampled_from([*ODD, "group", "sequence", "sequence_token"]))
        arguments[name] = x
    return arguments


def outcome(f, arguments, *names):
    """What the call returns; None if it is refused. Any other exception than a
    refusal that names an argument goes on."""
    try:
        return f(**arguments)
    except TypeError as error:
        assert str(error)
    except ValueError as error:
        inside = [
            field.name
            for x in arguments.values()
            if is_dataclass(x)
            for field in fields(x)
        ]  # of a rollout or a config
        assert any(name in str(error) for name in [*arguments, *inside, *names]), (
            f"no argument is named: {error}"
        )


def refused(call, *names):
    """The same for a call: what it returns, or None if it is refused by one of these
    names."""
    return outcome(lambda: call(), {}, *names)


def counted_nan(arguments):
    "Is there a NaN where the mask is true, or where there is no mask?"
    mask = arguments.get("mask")
    return any(
        x[mask].isnan().any()
        if mask is not None and mask.dtype == torch.bool and x.shape == mask.shape
        else x.isnan().any()
        for x in arguments.values()
        if isinstance(x, torch.Tensor)
    )


def agrees(f, arguments, oracle):
    """The function refuses what the oracle refuses, and else returns the oracle's
    numbers (NaN where the oracle has one)."""
    try:
        expected = oracle(**arguments)
    except (Outside, TypeError):
        expected = Outside
    except OverflowError:
        expected = None  # too large for Python's floats: any number, but no crash
    found = outcome(f, arguments)
    if expected is None:
        return
    assert (found is None) == (expected is Outside), (found, expected)
    if found is None:
        return
    given = [
        x.dtype
        for x in arguments.values()
        if isinstance(x, torch.Tensor) and x.dtype != torch.bool
    ]
    for x, y in zip(
        *((found, expected) if isinstance(found, tuple) else ((found,), (expected,))),
        strict=True,
    ):
        y = torch.as_tensor(y, dtype=torch.float64)
        assert x.shape == y.shape and (x.is_floating_point() or x.dtype == torch.bool)
        tolerance = max(
            {
                torch.float16: 2e-2,
                torch.bfloat16: 2e-1,
                torch.float32: 1e-4,
                torch.float64: 1e-9,
            }.get(dtype, 1e-4)
            for dtype in [x.dtype, *given]
        )
        clear = y.abs() < 1e3  # not infinite or NaN either
        if counted_nan(arguments):
            clear &= ~x.isnan()  # Python's min and max may drop a NaN, torch's do not
        torch.testing.assert_close(
            x.double()[clear], y[clear], rtol=tolerance, atol=tolerance
        )


def is_mask(x):
    return x.dtype == torch.bool and x.dim() == 2


def floats(*tensors):
    return all(x.is_floating_point() for x in tensors)


def real(x, mask):
    "The rows of what counts, as lists."
    return [
        [v for v, m in zip(row, keep) if m]
        for row, keep in zip(x.tolist(), mask.tolist())
    ]


def filled(rows, mask):
    "Rows of what counts, as a table with 0 elsewhere."
    table = [[0.0] * mask.shape[1] for _ in range(mask.shape[0])]
    for row, values, keep in zip(table, rows, mask.tolist()):
        for t, x in zip([t for t, m in enumerate(keep) if m], values):
            row[t] = x
    return torch.tensor(table, dtype=torch.float64).view(mask.shape)


def exp(x):
    "As in the library: constant above 20."
    return math.exp(min(x, 20.0))


def slow_gae(rewards, values, mask, gamma=1.0, lam=0.95):
    need(
        is_mask(mask)
        and rewards.shape == values.shape == mask.shape
        and floats(rewards)
        and 0 <= gamma <= 1
        and 0 <= lam <= 1
        and not (mask[:, 1:] & ~mask[:, :-1]).any()
    )
    advantages, returns = [], []
    for r, v in zip(real(rewards, mask), real(values, mask)):
        deltas = [
            x + gamma * after - before for x, before, after in zip(r, v, [*v[1:], 0.0])
        ]
        A = [
            sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(r)))
            for t in range(len(r))
        ]
        advantages.append(A)
        returns.append([a + b for a, b in zip(A, v)])
    largest = torch.finfo(rewards.dtype).max
    need(not any(abs(x) > largest for row in advantages + returns for x in row))
    return filled(advantages, mask), filled(returns, mask)


@fuzz(gae)
@given(st.data())
def test_gae(data):
    arguments = data.draw(batches("rewards", "values")) | data.draw(
        st.fixed_dictionaries(
            {}, optional={"gamma": st.floats(0, 1), "lam": st.floats(0, 1)}
        )
    )
    agrees(gae, data.draw(spoilt(arguments)), slow_gae)


def slow_whiten(x, mask, shift_mean=True):
    need(is_mask(mask) and x.shape == mask.shape and floats(x))
    rows = real(x, mask)
    every = [v for row in rows for v in row]
    if not every:
        return filled(rows, mask)
    mean = math.fsum(every) / len(every)
    std = (
        math.sqrt(math.fsum((v - mean) ** 2 for v in every) / (len(every) - 1)) + 1e-8
        if len(set(every)) > 1
        else math.inf
    )
    return filled(
        [[(v - mean) / std + (not shift_mean) * mean for v in row] for row in rows],
        mask,
    )


@fuzz(whiten)
@given(st.data())
def test_whiten(data):
    agrees(
        whiten,
        data.draw(spoilt(data.draw(batches("x"))))
        | {"shift_mean": data.draw(st.booleans())},
        slow_whiten,
    )


def slow_ratio(logprobs, old_logprobs, mask, level="token"):
    need(
        is_mask(mask)
        and logprobs.shape == old_logprobs.shape == mask.shape
        and level in ("token", "sequence", "sequence_token")
    )
    differences = [
        [x - y for x, y in zip(*rows)]
        for rows in zip(real(logprobs, mask), real(old_logprobs, mask))
    ]
    if level == "token":
        return torch.where(
            mask, filled([[exp(x) for x in row] for row in differences], mask), 1.0
        )
    return torch.tensor(
        [[exp(sum(row) / max(1, len(row)))] * mask.shape[1] for row in differences],
        dtype=torch.float64,
    ).view(mask.shape)


LEVELS = st.sampled_from(["token", "sequence", "sequence_token"])


@fuzz(ratio)
@given(st.data())
def test_ratio(data):
    arguments = data.draw(
        spoilt(
            data.draw(batches("logprobs", "old_logprobs"))
            | {"level": data.draw(LEVELS)}
        )
    )
    agrees(ratio, arguments, slow_ratio)


def slow_policy_loss(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    epsilon=0.2,
    epsilon_high=None,
    delta=None,
    importance_sampling_level="token",
    objective="clip",
    sapo_temperature_pos=1.0,
    sapo_temperature_neg=1.05,
):
    rho = slow_ratio(logprobs, old_logprobs, mask, importance_sampling_level)
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    need(
        epsilon >= 0
        and epsilon_high >= 0
        and (objective != "clip" or delta is None or delta >= 1 + epsilon_high)
        and objective in ("clip", "cispo", "sapo")
        and all(0 < t < math.inf for t in (sapo_temperature_pos, sapo_temperature_neg))
    )
    N, T = mask.shape
    need(advantages.shape in ((N,), (N, 1), (N, T)))
    A = [
        [x] * T if advantages.dim() == 1 else x * (T if len(x) != T else 1)
        for x in advantages.tolist()
    ]
    if importance_sampling_level == "sequence" and advantages.dim() == 2:
        for row in real(torch.tensor(A).view(N, T), mask):
            need(any(map(math.isnan, row)) or len(set(row)) <= 1)
    loss = torch.zeros(N, T, dtype=torch.float64)
    for i in range(N):
        for t in range(T):
            if not mask[i, t]:
                continue
            r, a, new = rho[i, t].item(), A[i][t], logprobs[i, t].item()
            clipped = min(max(r, 1 - epsilon), 1 + epsilon_high)
            tau = sapo_temperature_pos if a > 0 else sapo_temperature_neg
            loss[i, t] = {
                "clip": -min(min(r, delta or math.inf) * a, clipped * a),
                "cispo": -min(r, 1 + epsilon_high) * a * new,
                "sapo": -a * 2 / tau * (1 + math.tanh(tau * (r - 1) / 2)),
            }[objective]
    return loss


@fuzz(policy_loss)
@given(st.data())
def test_policy_loss(data):
    "Also by its gradient: what is not real, be it NaN, moves nothing."
    vector = data.draw(st.booleans())
    arguments = data.draw(
        batches(
            "logprobs",
            "old_logprobs",
            *([] if vector else ["advantages"]),
            vectors=["advantages"] if vector else [],
        )
    )
    arguments |= data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "epsilon": st.floats(0, 1),
                "epsilon_high": st.floats(0, 4) | st.none(),
                "delta": st.floats(1.01, 4) | st.none(),
                "importance_sampling_level": LEVELS,
                "objective": st.sampled_from(["clip", "cispo", "sapo"]),
                "sapo_temperature_pos": st.floats(0.01, 10),
                "sapo_temperature_neg": st.floats(0.01, 10),
            },
        )
    )
    arguments = data.draw(spoilt(arguments))
    agrees(lambda **a: policy_loss(**a)[0], arguments, slow_policy_loss)
    if outcome(policy_loss, arguments) is None or not floats(arguments["logprobs"]):
        return
    logprobs, mask = arguments["logprobs"].clone().requires_grad_(), arguments["mask"]
    loss = policy_loss(**arguments | {"logprobs": logprobs})[0]
    if not loss.requires_grad or not loss[mask].isfinite().all():
        return
    loss.sum().backward()
    assert (logprobs.grad[~mask] == 0).all()
    rows = (loss.detach().abs() < 1e3).all(1)
    for x in (
        arguments["logprobs"],
        arguments["old_logprobs"],
        arguments["advantages"],
    ):
        rows &= (
            torch.where(mask, x if x.dim() == 2 else x[:, None], 0.0).abs() < 100
        ).all(1)
    assert logprobs.grad[rows].isfinite().all()


def slow_aggregate(
    loss,
    mask,
    loss_type="grpo",
    max_completion_length=None,
    num_sequences=None,
    num_tokens=None,
):
    need(
        is_mask(mask)
        and loss.shape == mask.shape
        and loss_type in ("grpo", "bnpo", "dapo", "dr_grpo")
    )
    rows = [row for row in real(loss, mask) if row]
    given, counted = (
        (num_tokens, sum(map(len, rows)))
        if loss_type in ("bnpo", "dapo")
        else (num_sequences, len(rows))
    )
    count = max(counted if given is None else given, 1)
    if loss_type == "grpo":
        return sum(sum(row) / len(row) for row in rows) / count
    if loss_type in ("bnpo", "dapo"):
        return sum(map(sum, rows)) / count
    need(max_completion_length is not None and max_completion_length > 0)
    return sum(map(sum, rows)) / (count * max_completion_length)


@fuzz(aggregate)
@given(st.data())
def test_aggregate(data):
    arguments = data.draw(batches("loss")) | {
        "loss_type": data.draw(st.sampled_from(["grpo", "bnpo", "dapo", "dr_grpo"])),
        "max_completion_length": data.draw(st.integers(1, 9)),
    }
    arguments |= data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "num_sequences": st.integers(0, 9),
                "num_tokens": st.integers(0, 99),
            },
        )
    )
    agrees(aggregate, data.draw(spoilt(arguments)), slow_aggregate)


def slow_value_loss(
    values, old_values, returns, mask, cliprange_value=0.2, num_tokens=None
):
    need(
        is_mask(mask)
        and values.shape == old_values.shape == returns.shape == mask.shape
        and cliprange_value >= 0
    )
    total, count = 0.0, 0
    for row in zip(*(real(x, mask) for x in (values, old_values, returns))):
        for v, old, R in zip(*row):
            clipped = min(max(v, old - cliprange_value), old + cliprange_value)
            total, count = total + max((v - R) ** 2, (clipped - R) ** 2) / 2, count + 1
    return total / max(count if num_tokens is None else num_tokens, 1)


@fuzz(value_loss)
@given(st.data())
def test_value_loss(data):
    arguments = data.draw(batches("values", "old_values", "returns"))
    arguments |= data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "cliprange_value": st.floats(0, 2),
                "num_tokens": st.integers(0, 99),
            },
        )
    )
    arguments = data.draw(spoilt(arguments))
    agrees(value_loss, arguments, slow_value_loss)
    if outcome(value_loss, arguments) is None or not floats(arguments["values"]):
        return
    values = arguments["values"].clone().requires_grad_()
    value_loss(**arguments | {"values": values}).backward()
    assert (values.grad[~arguments["mask"]] == 0).all()


def slow_kl(logprobs, ref_logprobs, estimator="k3"):
    need(logprobs.shape == ref_logprobs.shape and estimator in ("k1", "k2", "k3"))
    d = [
        y - x
        for x, y in zip(logprobs.flatten().tolist(), ref_logprobs.flatten().tolist())
    ]
    k3 = [exp(x) - min(x, 20.0) - 1 for x in d]
    return torch.tensor(
        [{"k1": -x, "k2": x * x / 2, "k3": y}[estimator] for x, y in zip(d, k3)],
        dtype=torch.float64,
    ).view(logprobs.shape)


@fuzz(kl)
@given(st.data())
def test_kl(data):
    batch = data.draw(batches("logprobs", "ref_logprobs"))
    agrees(
        kl,
        data.draw(
            spoilt(
                {name: batch[name] for name in ("logprobs", "ref_logprobs")}
                | {"estimator": data.draw(st.sampled_from(["k1", "k2", "k3"]))}
            )
        ),
        slow_kl,
    )


def slow_kl_in_reward(scores, logprobs, ref_logprobs, mask, beta):
    need(
        is_mask(mask)
        and logprobs.shape == ref_logprobs.shape == mask.shape
        and scores.shape == mask.shape[:1]
    )
    price = -beta
    rows = [
        [price * (x - y) for x, y in zip(*pair)]
        for pair in zip(real(logprobs, mask), real(ref_logprobs, mask))
    ]
    return filled(
        [
            [*row[:-1], row[-1] + s] if row else []
            for row, s in zip(rows, scores.tolist())
        ],
        mask,
    )


@fuzz(kl_in_reward)
@given(st.data())
def test_kl_in_reward(data):
    arguments = data.draw(batches("logprobs", "ref_logprobs", vectors=["scores"])) | {
        "beta": data.draw(st.floats(0, 2))
    }
    agrees(kl_in_reward, data.draw(spoilt(arguments)), slow_kl_in_reward)


def slow_check_shapes(mask, x):
    need(is_mask(mask) and x.shape == mask.shape)
    return torch.zeros(0)


@fuzz(check_shapes, check_choice, alternatives)
@given(st.data(), st.lists(st.text(max_size=2), min_size=1, max_size=3), st.text())
def test_checks(data, table, choice):
    "What is refused is named; a choice is refused with all that is allowed."
    arguments = data.draw(spoilt(data.draw(batches("x"))))

    def check(mask, x):
        check_shapes(mask, x=x)
        return torch.zeros(0)

    agrees(check, arguments, slow_check_shapes)
    try:
        check_choice("choice", choice, table)
    except ValueError as error:
        assert choice not in table
        assert str(error).endswith(f"must be {alternatives(table)}, got {choice!r}")
        assert all(f'"{entry}"' in str(error) for entry in table)
    else:
        assert choice in table
    # a choice that cannot be hashed is refused, too, by a table of functions
    with pytest.raises(ValueError, match="choice must be "):
        check_choice("choice", [choice], dict.fromkeys(table))


@fuzz(to_dtype)
@given(
    st.lists(st.floats(), max_size=4),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_result_fits_its_dtype(numbers, dtype):
    "Or is refused: what is not NaN and lies beyond the largest number of the dtype."
    x = torch.tensor(numbers, dtype=torch.float64)
    largest = torch.finfo(dtype).max
    if any(abs(number) > largest for number in numbers):
        with pytest.raises(ValueError, match="rewards are too large or too far apart"):
            to_dtype(name="rewards", x=x, dtype=dtype)
    else:
        result = to_dtype(name="rewards", x=x, dtype=dtype)
        assert result.dtype == dtype and result.isnan().equal(x.isnan())


# The mathematics: groups --------------------------------------------------------------


LARGEST = torch.finfo(torch.float32).max


def groups_of(rewards, G):
    need(rewards.dim() == 1 and floats(rewards) and G >= 1 and len(rewards) % G == 0)
    return [rewards[i : i + G].tolist() for i in range(0, len(rewards), G)]


def slow_has_variance(rewards, num_generations):
    return torch.tensor(
        [
            len({r for r in group if not math.isnan(r)}) > 1
            for group in groups_of(rewards, num_generations)
        ],
        dtype=torch.bool,
    )


def slow_group_advantages(
    rewards, num_generations, scale_rewards="group", baseline="mean", eps=1e-4
):
    need(
        num_generations >= 2
        and eps >= 0
        and scale_rewards in ("group", "batch", "batch_centred", "none")
        and baseline in ("mean", "leave_one_out")
    )
    groups = groups_of(rewards, num_generations)
    need(not any(abs(r) > LARGEST for group in groups for r in group))
    result = sum(advantages_by_definition(groups, scale_rewards, baseline, eps), [])
    need(not any(abs(a) > torch.finfo(rewards.dtype).max for a in result))
    return result


REWARDS = st.lists(st.sampled_from([0.0, 1.0, 0.5, -2.0, math.nan]), max_size=12).map(
    lambda x: torch.tensor(x, dtype=torch.float64)
)


@fuzz(has_variance, group_advantages)
@given(st.data())
def test_group_advantages(data):
    arguments = {
        "rewards": data.draw(REWARDS),
        "num_generations": data.draw(st.integers(1, 4)),
    }
    more = data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "scale_rewards": st.sampled_from(list(SCALES)),
                "baseline": st.sampled_from(["mean", "leave_one_out"]),
                "eps": st.floats(0, 1),
            },
        )
    )
    agrees(has_variance, data.draw(spoilt(dict(arguments))), slow_has_variance)
    agrees(group_advantages, data.draw(spoilt(arguments | more)), slow_group_advantages)


def slow_process_advantages(
    step_rewards,
    num_generations,
    scale_rewards="group",
    baseline="mean",
    eps=1e-4,
):
    need(step_rewards.dim() == 2 and floats(step_rewards))
    need(
        num_generations >= 2
        and len(step_rewards) % num_generations == 0
        and eps >= 0
        and scale_rewards in ("group", "batch", "batch_centred", "none")
        and baseline in ("mean", "leave_one_out")
    )
    need(not step_rewards.isinf().any())
    if not step_rewards.numel():
        return torch.zeros(step_rewards.shape)
    steps = [
        [(t, r) for t, r in enumerate(row) if not math.isnan(r)]
        for row in step_rewards.tolist()
    ]
    T = step_rewards.shape[1]
    options = {"scale": scale_rewards, "baseline": baseline, "eps": eps}
    result = process_advantages_by_definition(steps, num_generations, T, **options)
    largest = torch.finfo(step_rewards.dtype).max
    need(not any(abs(a) > largest for row in result for a in row))
    return torch.tensor(result, dtype=torch.float64).view(step_rewards.shape)


@st.composite
def stepwise(draw):
    "Steps of up to seven completions of up to four tokens, T = 0 among them."
    T = draw(st.integers(0, 4))
    ends = draw(st.lists(st.sets(st.integers(0, T - 1)), max_size=7) if T else NO_ENDS)
    reward = st.sampled_from([0.0, 1.0, 0.5])
    steps = [[(end, draw(reward)) for end in sorted(row)] for row in ends]
    return {
        "step_rewards": dense_steps(steps, T),
        "num_generations": draw(st.integers(2, 3)),
    }


NO_ENDS = st.lists(st.just(set()), max_size=7)


@fuzz(process_advantages)
@given(st.data())
def test_process_advantages(data):
    "Of other shapes and kinds, infinite, of a number that the group does not divide."
    choices = {
        "scale_rewards": st.sampled_from(list(SCALES)),
        "baseline": st.sampled_from(["mean", "leave_one_out"]),
        "eps": st.floats(0, 1),
    }
    options = data.draw(st.fixed_dictionaries({}, optional=choices))
    arguments = data.draw(spoilt(data.draw(stepwise()) | options))
    agrees(process_advantages, arguments, slow_process_advantages)


# Numbers ------------------------------------------------------------------------------


def slow_adapt_beta(beta, observed_kl, kl_target, num_completions, horizon=10_000):
    need(kl_target > 0 and horizon > 0)
    error = observed_kl / kl_target - 1
    return beta * (
        1
        + (error if math.isnan(error) else max(-0.2, min(0.2, error)))
        * num_completions
        / horizon
    )


@fuzz(adapt_beta)
@given(st.data())
def test_adapt_beta(data):
    arguments = {
        "beta": 0.1,
        "observed_kl": data.draw(st.floats(-1, 9)),
        "kl_target": data.draw(st.floats(0.1, 9)),
        "num_completions": data.draw(st.integers(1, 999)),
    }
    agrees(
        lambda **a: torch.tensor(adapt_beta(**a), dtype=torch.float64),
        data.draw(spoilt(arguments)),
        slow_adapt_beta,
    )


def slow_combine(scores, weights=None):
    need(scores.dim() == 2 and floats(scores) and not scores.isinf().any())
    weights = [1.0] * scores.shape[1] if weights is None else weights
    need(len(weights) == scores.shape[1] and all(math.isfinite(w) for w in weights))
    judged = [
        [(w, x) for w, x in zip(weights, row) if not math.isnan(x)]
        for row in scores.tolist()
    ]
    return [math.fsum(w * x for w, x in row) if row else math.nan for row in judged]


@fuzz(combine)
@given(st.data())
def test_combine(data):
    F = data.draw(st.integers(0, 3))
    scores = torch.tensor(
        data.draw(
            st.lists(
                st.lists(
                    st.sampled_from([0.0, 1.0, -0.5, math.nan]), min_size=F, max_size=F
                ),
                max_size=4,
            )
        ),
        dtype=torch.float64,
    ).view(-1, max(F, 1))
    weights = data.draw(
        st.none()
        | st.lists(st.sampled_from([1.0, 0.5, 0, -2, math.nan, math.inf]), max_size=3)
    )
    agrees(
        combine,
        data.draw(spoilt({"scores": scores})) | {"weights": weights},
        slow_combine,
    )


def slow_bradley_terry(chosen, rejected):
    need(chosen.dim() == 1 and chosen.shape == rejected.shape and len(chosen) > 0)
    gaps = [y - x for x, y in zip(chosen.tolist(), rejected.tolist())]
    softplus = [math.log1p(math.exp(gap)) if gap < 700 else gap for gap in gaps]
    return sum(softplus) / len(chosen)


@fuzz(bradley_terry_loss)
@given(st.data())
def test_bradley_terry_loss(data):
    K = data.draw(st.integers(0, 4))
    agrees(
        lambda chosen, rejected: bradley_terry_loss(chosen * 1.0, rejected),
        data.draw(
            spoilt({"chosen": data.draw(numbers(K)), "rejected": data.draw(numbers(K))})
        ),
        slow_bradley_terry,
    )


# Rollouts -----------------------------------------------------------------------------


@st.composite
def rollout_fields(draw, T_min=0):
    """Every field of a rollout, filled: queries and completions of all lengths,
    completions without a token among them."""
    B, G, P, T = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
        draw(st.integers(T_min, 4)),
    )
    N, generator = B * G, torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    prompt = (
        torch.arange(P)
        >= P
        - torch.tensor(draw(st.lists(st.integers(1, P), min_size=B, max_size=B)))[
            :, None
        ]
    )
    mask = (
        torch.arange(T)
        < torch.tensor(draw(st.lists(st.integers(0, T), min_size=N, max_size=N)))[
            :, None
        ]
    )

    def ids(mask):
        return torch.randint(
            3, len(VOCABULARY), mask.shape, generator=generator
        )  # also where padding is

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "queries": [Query(f"{i}=", {"answer": str(i)}) for i in range(B)],
        "prompt_ids": ids(prompt),
        "prompt_mask": prompt,
        "completion_ids": ids(mask),
        "completion_mask": mask,
        "completions": ["?"] * N,
        "truncated": torch.rand(N, generator=generator) < 0.3,
        "num_generations": G,
        "logprobs": -noise(N, T).abs(),
        "ref_logprobs": -noise(N, T).abs(),
        "rewards": noise(N),
        "scored": torch.rand(N, generator=generator) < 0.8,
        "step_rewards": None,
        "values": noise(N, T),
        "advantages": noise(N),
        "returns": noise(N, T),
    }


rollouts = rollout_fields().map(lambda x: Rollout(**x))


def is_rollout(f):
    "The rules of chapter 2, read aloud."
    tensors = [name for name, x in f.items() if isinstance(x, torch.Tensor)]
    B, G = len(f["queries"]), f["num_generations"]
    if not (isinstance(G, int) and G >= 1 and B >= 1):
        return False
    if f["prompt_ids"].dim() != 2 or f["completion_ids"].dim() != 2:
        return False
    N, T, P = B * G, f["completion_ids"].shape[1], f["prompt_ids"].shape[1]
    shapes = {
        "prompt_ids": [(B, P)],
        "prompt_mask": [(B, P)],
        "completion_ids": [(N, T)],
        "completion_mask": [(N, T)],
        "truncated": [(N,)],
        "scored": [(N,)],
        "rewards": [(N,)],
        "advantages": [(N,), (N, T)],
    } | dict.fromkeys(("logprobs", "ref_logprobs", "values", "returns"), [(N, T)])
    for name in tensors:
        x = f[name]
        if tuple(x.shape) not in shapes[name]:
            return False
        if name.endswith("_ids"):
            right = not x.is_floating_point() and x.dtype != torch.bool
        else:
            right = (
                x.dtype == torch.bool
                if name in ("prompt_mask", "completion_mask", "truncated", "scored")
                else x.is_floating_point()
            )
        if not right:
            return False
    if len(f["completions"]) != N or f["step_rewards"] is not None:
        return False  # a list is no tensor
    return all(
        any(row) and row == sorted(row) for row in f["prompt_mask"].tolist()
    ) and all(row == sorted(row, reverse=True) for row in f["completion_mask"].tolist())


@st.composite
def broken(draw):
    f = draw(rollout_fields())
    for name in draw(
        st.lists(st.sampled_from(sorted(f)), min_size=1, max_size=2, unique=True)
    ):
        if isinstance(f[name], torch.Tensor):
            f |= {
                name: draw(spoilt({name: f[name]}))[name]
                if draw(st.booleans())
                else f[name].flip(-1)
            }
        elif name == "num_generations":
            f[name] = draw(st.sampled_from(ODD))
        else:
            f[name] = draw(
                st.sampled_from([[], (f[name] or [[]])[:-1], [*(f[name] or []), []]])
            )
    return f


@fuzz(Rollout)
@given(broken())
def test_a_broken_rollout(f):
    "Refused when it is made; and when a field that was filled in later is used."
    made = outcome(Rollout, f)
    assert (made is not None) == is_rollout(f), (made, f)
    if made is not None or not is_rollout(
        good := {
            name: x
            for name, x in f.items()
            if name
            not in ("logprobs", "rewards", "scored", "advantages", "values", "returns")
        }
    ):
        return
    later = Rollout(**good)
    for name in f.keys() - good.keys():
        setattr(later, name, f[name])
    with pytest.raises(ValueError):
        later.select([0])


INDICES = st.lists(st.integers(-2, 4), max_size=4)


@fuzz(Rollout.select, Rollout.loss_mask)
@given(
    rollouts,
    INDICES
    | st.sampled_from(
        [[0.0], [True], [[0]], 0, torch.tensor([True]), torch.tensor([0.5])]
    ),
    st.booleans(),
)
def test_selecting(rollout, groups, filtering):
    """Row for row what was asked for, in every field, in this order; and whole again
    when the groups are joined."""
    found = outcome(rollout.select, {"groups": groups})
    G = rollout.num_generations
    assert (found is not None) == (
        isinstance(groups, list)
        and len(groups) > 0
        and all(type(g) is int and 0 <= g < len(rollout.queries) for g in groups)
    )
    each = Rollout.join([rollout.select([g]) for g in range(len(rollout.queries))])
    if found is not None:
        rows = [g * G + j for g in groups for j in range(G)]
        assert found.queries == [rollout.queries[g] for g in groups]
        for a, b in ((found, rollout), (each, rollout)):
            picked = rows if a is found else range(len(rollout))
            for name in ("completion_ids", "logprobs", "values"):
                assert real(getattr(a, name), a.completion_mask) == [
                    real(getattr(b, name), b.completion_mask)[i] for i in picked
                ]
            assert a.rewards.tolist() == [b.rewards[i].item() for i in picked]
    expected = [
        [m and s and not (filtering and cut) for m in row]
        for row, s, cut in zip(
            rollout.completion_mask.tolist(),
            rollout.scored.tolist(),
            rollout.truncated.tolist(),
        )
    ]
    assert rollout.loss_mask(filtering).tolist() == expected


@fuzz(Rollout.join)
@given(st.lists(rollouts, max_size=3), st.booleans())
def test_joining(parts, per_token):
    for part in parts[:per_token]:
        part.advantages = part.advantages[:, None] * part.completion_mask
    whole = outcome(Rollout.join, {"rollouts": parts}) if parts or per_token else None
    dims = {part.advantages.dim() for part in parts}
    if whole is None:
        assert len({part.num_generations for part in parts}) != 1 or len(dims) > 1
    else:
        assert real(whole.completion_ids, whole.completion_mask) == [
            row
            for part in parts
            for row in real(part.completion_ids, part.completion_mask)
        ]


LLAMA = random_model()
VALUE = ValueModel(LLAMA)
torch.nn.init.normal_(VALUE.head.weight)


def one_by_one(rollout, temperature):
    """Log-probs of each completion alone, without padding; the value before each
    token, too."""
    logprobs, values = [], []
    with torch.no_grad():
        for i, ids in enumerate(real(rollout.completion_ids, rollout.completion_mask)):
            prompt = rollout.prompt_ids[i // rollout.num_generations][
                rollout.prompt_mask[i // rollout.num_generations]
            ]
            row = torch.cat([prompt, torch.tensor(ids, dtype=torch.long)])[None]
            distribution = (
                LLAMA.eval()(row).logits[0, len(prompt) - 1 : -1] / temperature
            ).log_softmax(-1)
            logprobs.append([distribution[t, x].item() for t, x in enumerate(ids)])
            values.append(
                VALUE.head(
                    VALUE.trunk.eval()(row).last_hidden_state[0, len(prompt) - 1 : -1]
                )[:, 0].tolist()
            )
    return filled(logprobs, rollout.completion_mask), filled(
        values, rollout.completion_mask
    )


@fuzz(
    token_logprobs,
    packing.token_logprobs,
    packing.values,
    packing.on_host,
    packing.to_host,
    reference_logprobs,
    adapters.reference_logprobs,
    predict_values,
    EngineModels,
    in_micro_batches,
    in_order,
    model_inputs,
    position_ids,
    shared_rows,
    rows_alone,
    first_of_equal,
    shares_prompt,
    takes_padding,
    passes_trial,
    sharing_width,
    micro_batches,
    ValueModel,
    times=1,
)
@given(
    rollouts,
    st.sampled_from([1.0, 0.5, 3, *ODD]),
    st.sampled_from([None, 1, 7, 10**6, 0, -3, math.nan, "9"]),
)
def test_models_on_rollouts(rollout, temperature, max_tokens):
    """Whatever the masks: what the models say of each token is what they say of the
    completion alone."""
    right = isinstance(temperature, (int, float)) and temperature > 0
    how = {"model": LLAMA, "rollout": rollout, "temperature": temperature}
    found = outcome(token_logprobs, how)
    packed = outcome(packing.token_logprobs, how)
    assert (found is not None) == (packed is not None) == right
    in_rows = packing.values(VALUE, rollout)
    allowed = max_tokens is None or isinstance(max_tokens, int) and max_tokens >= 1
    pieces = outcome(micro_batches, {"rollout": rollout, "max_tokens": max_tokens})
    assert (pieces is not None) == allowed and (
        pieces is None or sorted(sum(pieces, [])) == list(range(len(rollout.queries)))
    )
    of_reference = {"reference": LLAMA, "rollout": rollout, "temperature": temperature}
    again = outcome(reference_logprobs, of_reference)
    assert (again is not None) == right
    limited = of_reference | {"max_tokens": max_tokens, "with_adapters": right}
    cut = outcome(adapters.reference_logprobs, limited)
    assert (cut is not None) == (right and allowed)
    assert adapters.reference_logprobs(None, rollout) is None
    values = predict_values(VALUE, rollout)
    models = EngineModels(LLAMA, None, value=VALUE)
    config = short_config(max_completion_length=4)
    config.max_tokens_per_micro_batch = max_tokens
    cut_values = refused(lambda: models.predict_values(rollout, config), "max_tokens")
    batches = refused(lambda: models.micro_batches(rollout, config), "max_tokens")
    assert (cut_values is not None) == (batches is not None) == allowed
    assert not allowed or sum(map(len, batches)) == len(rollout)
    device = torch.device("cpu")
    assert rows_alone(rollout, device=device)[1].device == device
    assert shared_rows(rollout, 16, device=device)[1].device == device
    assert packing.on_host(rollout, only_tokens=True) is rollout
    here = packing.to_host(tensors=[rollout.completion_mask])
    assert here[0] is rollout.completion_mask
    expected = one_by_one(rollout, temperature if right else 1.0)
    for x, y in (
        (found, expected[0]),
        (packed, expected[0]),
        (again, expected[0]),
        (cut, expected[0]),
        (values, expected[1]),
        (in_rows, expected[1]),
        (cut_values, expected[1]),
    ):
        if x is not None:
            torch.testing.assert_close(x.detach(), y, rtol=0, atol=1e-9)


@fuzz(importance_weights)
@given(rollout_fields(), st.sampled_from([0.5, 1.0, 2, 1e30, math.inf]), st.data())
def test_importance_weights(f, limit, data):
    "pi / pi_sampler of each real token, cut off above; what padding gets is unused."
    mask = f["completion_mask"]
    distances = data.draw(numbers(*mask.shape)) * 3
    rollout = Rollout(**f, sampling_logprobs=f["logprobs"] - distances)
    found = importance_weights(rollout, limit)
    expected = [[min(math.exp(x), limit) for x in row] for row in real(distances, mask)]
    torch.testing.assert_close(
        filled(real(found, mask), mask), filled(expected, mask), rtol=1e-9, atol=1e-9
    )


@fuzz(
    gae_stage.advantages,
    group_stage.advantages,
    informative,
    dynamic_sampling,
    token_rewards,
    next_beta,
    rollout_metrics,
    table,
    StepGroups,
    groups_from_rows,
    token_numbers,
    preference_pairs,
)
@given(rollout_fields(), st.data())
def test_stages(f, data):
    """Each stage on any rollout: the rows that carry no loss have no advantage,
    padding has none, and what is there is finite."""
    f["rewards"] = f["rewards"].masked_fill(~f["scored"], math.nan)
    T = f["completion_mask"].shape[1]
    if steps := T > 0 and data.draw(st.booleans()):
        ends = [
            data.draw(st.sets(st.integers(0, n - 1))) if n else set()
            for n in f["completion_mask"].sum(1).tolist()
        ]
        f["step_rewards"] = dense_steps(
            [[(end, float(end)) for end in row] for row in ends], T
        )
    rollout, G = Rollout(**f), f["num_generations"]
    beta = data.draw(st.sampled_from([0.0, 0.1, math.nan]))
    rewards = token_rewards(rollout, beta)
    given = (
        f["step_rewards"].nansum(1).tolist()
        if steps
        else rollout.rewards.nan_to_num().tolist()
    )
    if not math.isnan(beta):
        for i, (row, new, old) in enumerate(
            zip(
                *(
                    real(x, rollout.completion_mask)
                    for x in (rewards, rollout.logprobs, rollout.ref_logprobs)
                )
            )
        ):
            assert math.isclose(
                sum(row),
                (given[i] if row else 0.0) - beta * (sum(new) - sum(old)),
                abs_tol=1e-9,
            )
        for options in ({"whiten_advantages": False}, {"whiten_rewards": True}):
            advantages, returns = gae_stage.advantages(
                rollout, rewards, short_config(algorithm="ppo", **options)
            )
            for x in (advantages, returns):
                assert (
                    x.shape == rewards.shape
                    and x.isfinite().all()
                    and (x[~rollout.completion_mask] == 0).all()
                )
    metrics, rows = rollout_metrics(rollout), table(rollout, 3)
    assert (
        all(x is None or math.isfinite(x) for x in metrics.values())
        and [row["tokens"] for row in rows] == rollout.completion_mask.sum(1).tolist()
    )
    groups = StepGroups(3, rollout, rollout.values)
    rows = pd.DataFrame(table(rollout, 3, groups))
    again = groups_from_rows(rows, G, tokenizer=None)
    names = token_numbers(rollout, new_logprobs=None, entropy=rollout.values)
    assert again.frame().columns.equals(groups.frame().columns)
    assert names.keys() == groups.numbers.keys() == again.numbers.keys()
    assert len(again.frame()) == rollout.completion_mask.sum()
    target = data.draw(st.sampled_from([None, 1.0, *ODD]))
    moved = outcome(next_beta, {"beta": 0.1, "rollout": rollout, "kl_target": target})
    assert (moved is None) == (
        target is not None and not (isinstance(target, (int, float)) and target > 0)
    )
    pairs = preference_pairs(
        replace(rollout, completions=[str(i % 2) for i in range(len(rollout))]),
        lambda answer, query: answer == "1",
    )
    assert all((good, bad) == ("1", "0") for _, good, bad in pairs) and len(pairs) == (
        len(rollout.queries) if G > 1 else 0
    )
    found = outcome(
        group_stage.advantages, {"rollout": rollout, "config": short_config()}
    )
    assert (found is None) == (G < 2)
    if G > 1:
        assert (
            found.shape
            == (rollout.completion_mask.shape if steps else rollout.rewards.shape)
            and found.isfinite().all()
        )
        scored = rollout.completion_mask if steps else rollout.scored
        assert (found[~scored] == 0).all()
        moves = found.view(len(rollout.queries), -1).abs().sum(1) > 0
        assert (
            not steps
            and moves.equal(informative(rollout))
            or steps
            and (informative(rollout) | ~moves).all()
        )
    kept, _ = dynamic_sampling(
        lambda queries: rollout, lambda _: {}, rollout.queries, short_config()
    )
    assert kept is rollout


@fuzz(update, batch_loss, times=1)
@given(rollout_fields(T_min=1), st.sampled_from([0.0, 0.1, -0.1, math.nan]), st.data())
def test_update(f, beta, data):
    "One step on any rollout: finite weights afterwards, or a refusal before."
    empty = data.draw(st.sampled_from([None, "advantages", "ref_logprobs", "logprobs"]))
    rollout, model = (
        Rollout(**f | ({empty: None} if empty else {})),
        copy.deepcopy(LLAMA),
    )
    config = short_config(
        loss_type=data.draw(st.sampled_from(["grpo", "dapo", "dr_grpo"])),
        max_tokens_per_micro_batch=data.draw(st.sampled_from([1, 20, 8192])),
    )
    found = outcome(
        update,
        {
            "models": EngineModels(
                model, None, torch.optim.SGD(model.parameters(), 0.1)
            ),
            "rollout": rollout,
            "config": config,
            "beta": beta,
        },
    )
    refused = (
        empty in ("advantages", "logprobs") or beta != 0 and empty == "ref_logprobs"
    )
    assert (found is None) == refused
    assert all(p.isfinite().all() for p in model.parameters())
    if refused or math.isnan(beta):
        assert all(p.equal(q) for p, q in zip(model.parameters(), LLAMA.parameters()))


# Text ---------------------------------------------------------------------------------


def walked(text):
    """The value of an expression by Python's own parser: its tree is walked, and may
    hold sums, differences, products and numbers only."""
    if not text or len(text) > 64 or set(text) - set("0123456789+-*()"):
        return None
    try:
        tree = ast.parse(
            re.sub(r"[0-9]+", lambda number: str(int(number[0])), text), mode="eval"
        )  # 007 is 7 here, and an error in Python
    except SyntaxError:
        return None

    def value(node):
        if isinstance(node, ast.Expression):
            return value(node.body)
        if isinstance(node, ast.Constant):
            return node.value
        need(
            isinstance(node, ast.BinOp)
            and isinstance(node.op, (ast.Add, ast.Sub, ast.Mult))
        )
        return {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}[
            type(node.op)
        ](value(node.left), value(node.right))

    try:
        return value(tree)
    except Outside:
        return None


@st.composite
def expressions(draw):
    """An expression as the grammar makes it, and its value; with zeros in front of
    numbers, and parentheses where none are needed."""

    @st.composite
    def number(draw):
        n = draw(st.integers(0, 999))
        return "0" * draw(st.integers(0, 2)) + str(n), n, 3

    def grown(inner):
        @st.composite
        def operation(draw):
            (a, x, high), (b, y, low), sign = (
                draw(inner),
                draw(inner),
                draw(st.sampled_from("+-*")),
            )
            strength = 2 if sign == "*" else 1
            a, b = (
                (f"({a})" if high < strength else a),
                (f"({b})" if low <= strength else b),
            )
            return a + sign + b, {"+": x + y, "-": x - y, "*": x * y}[sign], strength

        @st.composite
        def wrapped(draw):
            text, x, _ = draw(inner)
            n = draw(st.sampled_from([1, 1, 2, 29]))
            return "(" * n + text + ")" * n, x, 3

        return operation() | wrapped()

    text, x, _ = draw(st.recursive(number(), grown, max_leaves=12))
    return text, x


@fuzz(evaluate_expression)
@given(expressions(), st.data())
def test_expressions(expression, data):
    """Its value, or None if it is too long; and with a character put in, taken out
    or changed, what Python's parser says."""
    text, x = expression
    assert evaluate_expression(text) == (x if len(text) <= 64 else None) == walked(text)
    at, character = (
        data.draw(st.integers(0, len(text))),
        data.draw(st.sampled_from("0123456789+-*()/. _x١²\n")),
    )
    for changed in (
        text[:at] + character + text[at:],
        text[:at] + text[at + 1 :],
        text[:at] + character + text[at + 1 :],
        text[:at],
    ):
        assert evaluate_expression(changed) == walked(changed)


@fuzz(evaluate_expression)
@given(
    st.text("0123456789+-*()", max_size=66)
    | st.text(max_size=8)
    | st.integers(0, 70).map(lambda n: "(" * n + "1" + ")" * (n // 2))
)
def test_any_text(text):
    assert evaluate_expression(text) == walked(text)


# Tasks, rewards, samples --------------------------------------------------------------

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 10**6)
    | st.floats()
    | st.text(max_size=5),
    lambda x: (
        st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=2)
    ),
    max_leaves=4,
)
NAMES = st.sampled_from([*TASKS])


@fuzz(load_task, add, sums, target, add_chat, Task, Query)
@given(
    NAMES | ANYTHING,
    st.integers(1, 3) | ANYTHING,
    st.sampled_from(["train", "heldout", "test", "", None]),
    st.sampled_from([1, 3, 20, 0, -1, None, "2", 2.5, math.nan]),
    st.text(max_size=12),
)
def test_tasks(name, digits, split, n, text):
    "A task by name, its queries, and any text as a question or an answer to it."
    task = outcome(load_task, {"name": name, "digits": digits}, "task")
    if task is None:
        assert (
            name not in [*TASKS]
            or type(digits) not in (int, bool)
            or digits not in (1, 2, 3)
        )
        return
    asked = task.parse(text)
    assert (
        asked is None
        or isinstance(asked, Query)
        and task.is_right(task.solve(asked, random.Random(0)), asked)
    )
    queries = outcome(task.queries, {"split": split, "n": n})
    assert (queries is not None) == (
        split in ("train", "heldout") and type(n) is int and n > 0
    )
    for query in queries or []:
        assert (
            task.is_right(text, query) in (True, False)
            and query.is_heldout == (split == "heldout")
            and query.text
        )


@fuzz(add, sums, target, add_chat)
@given(st.sampled_from([add, sums, target, add_chat]), ANYTHING)
def test_digits(make, digits):
    assert (outcome(make, {"digits": digits}) is None) == (
        not isinstance(digits, int) or digits not in (1, 2, 3)
    )


TOKENIZER = character_tokenizer()
ADD = load_task("add")


@fuzz(
    accuracy_reward,
    brevity_reward,
    format_reward,
    overlong_reward,
    process_reward,
    name_of,
    names_of,
    load_rewards,
)
@given(
    st.lists(
        st.text(max_size=6) | st.text("0123456789+=", max_size=6),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from([16, *ODD]),
    st.sampled_from([None, 4, *ODD]),
    st.booleans(),
    st.sampled_from(["accuracy", "format", "process", "beauty", "learned", ""]),
    st.sampled_from([None, "[0-9]+"]),
)
def test_rules(texts, limit, cache, chat, name, format_pattern):
    "Rules judge any text: a finite number for each, in their range."
    ids = [
        TOKENIZER(text, add_special_tokens=False)["input_ids"] + [EOS] for text in texts
    ]
    texts = TOKENIZER.batch_decode(ids, skip_special_tokens=True)
    completions = (
        [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
    )
    given = {
        "prompts": ["1+2="] * len(texts),
        "completions": completions,
        "completion_ids": ids,
        "answer": ["3"] * len(texts),
    }
    brief, long = (
        outcome(brevity_reward, {"limit": limit}),
        outcome(overlong_reward, {"max_completion_length": limit, "cache": cache}),
    )
    assert (brief is None) == (not isinstance(limit, (int, float)) or not limit >= 1)
    for f, low, high in [
        (accuracy_reward(ADD), 0, 1),
        (brief, 0, 1),
        (format_reward("[0-9]+"), 0, 1),
        (long, -1, 0),
    ]:
        scores = f(**given) if f else []
        assert all(isinstance(x, float) and low <= x <= high for x in scores) and (
            not f or len(scores) == len(texts) and isinstance(name_of(f), str)
        )
        assert not f or names_of([f, f]) == [name_of(f), f"{name_of(f)}_2"]
    assert (
        accuracy_reward(ADD)(**given)
        == [float(text == "3") for text in texts]
        == [float(text_of(c) == "3") for c in completions]
    )
    for steps, row in zip(process_reward(ADD, TOKENIZER)(**given), ids):
        assert (
            all(0 <= end < len(row) for end, _ in steps)
            and steps[-1][0] == len(row) - 1
        )
    rewards = outcome(
        load_rewards,
        {
            "names": [name],
            "task": ADD,
            "device": "cpu",
            "format_pattern": format_pattern,
        },
        "reward_funcs",
    )
    is_plain = name == "accuracy" and format_pattern is None
    assert (rewards is not None) == (is_plain or name == "format")


@fuzz(judge, score, plain_score, times=1)
@given(rollouts, st.data())
def test_scores(rollout, data):
    """Whatever a reward function returns: refused by name, or one finite number, or
    NaN where it did not judge."""
    N = len(rollout)
    sensible = st.lists(
        st.none() | st.integers(-2, 2) | st.floats(-9, 9), min_size=N, max_size=N
    )
    returned = data.draw(
        sensible
        | st.lists(ANYTHING, min_size=N, max_size=N)
        | ANYTHING
        | st.sampled_from(
            [
                torch.ones(N),
                torch.ones(N, 2),
                torch.ones(N) * math.nan,
                torch.tensor(1.0),
                [[(0, 1.0)]] * N,
                [[(-1, 1.0)]] * N,
            ]
        )
    )
    weights, on_error = (
        data.draw(
            st.sampled_from([None, [1.0], [0.5], [2], [], [1.0, 1.0], [math.nan]])
        ),
        data.draw(st.sampled_from(["stop", "drop", "x", None])),
    )

    timeout = data.draw(st.sampled_from([None, None, 60.0]))

    def odd(**_):
        return returned

    fresh = replace(rollout, rewards=None, scored=None)
    try:
        metrics = score(fresh, [odd], weights, on_error, timeout=timeout)
    except (TypeError, ValueError) as error:
        assert re.search("reward function 'odd'|reward_weights|on_error", str(error))
        return
    assert (
        on_error in ("stop", "drop")
        and weights in (None, [1.0], [0.5], [2])
        and metrics.keys() == {"rewards/odd/mean"}
    )
    assert (
        fresh.rewards.shape == (N,)
        and fresh.scored.equal(fresh.rewards.isfinite())
        and fresh.scored.equal(~fresh.rewards.isnan())
    )
    if (
        (on_error == "stop" or len(rollout.queries) == 1)
        and isinstance(returned, list)
        and len(returned) == N
        and all(type(x) in (int, float) and math.isfinite(x) for x in returned)
    ):
        torch.testing.assert_close(
            fresh.rewards,
            torch.tensor(
                [(weights or [1.0])[0] * x for x in returned], dtype=torch.float64
            ),
        )
        plain = replace(rollout, rewards=None, scored=None)
        assert plain_score(plain, [odd], weights) == metrics
        assert plain.rewards.equal(fresh.rewards) and plain.scored.all()
    if fresh.step_rewards is not None:
        assert fresh.step_rewards[~fresh.completion_mask].isnan().all()


@fuzz(
    sample,
    simple_sample,
    keep_likely,
    decode_completions,
    prepare_prompts,
    check_numbers,
    check_context,
    check_tokens,
    lacks_memory,
    encode_prompts,
    as_rollout,
    padding_id,
    eos_token_ids,
    times=1,
)
@given(
    st.lists(
        st.text(CHARACTERS, max_size=70).map(Query)
        | st.text(max_size=3).map(Query)
        | st.just(Query([{"role": "user", "content": "1"}])),
        max_size=3,
    ),
    st.data(),
)
def test_sampling(queries, data):
    """Samples within the limits, of which the model itself says what was recorded;
    or a refusal."""
    arguments = {
        "num_generations": 2,
        "max_completion_length": 3,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
    }
    for name in data.draw(st.lists(st.sampled_from(sorted(arguments)), max_size=1)):
        arguments[name] = data.draw(
            st.sampled_from([2, 0.5, *[x for x in ODD if x != 10**15]])
        )
    rollout = outcome(
        data.draw(st.sampled_from([sample, simple_sample])),
        {
            "model": LLAMA,
            "tokenizer": TOKENIZER,
            "queries": queries,
            "skip_special_tokens": data.draw(st.booleans()),
        }
        | arguments,
        "query",
    )
    readable = bool(queries) and all(
        isinstance(q.prompt, str) and 0 < len(q.prompt) <= 61 for q in queries
    )
    assert rollout is None or readable
    if rollout is None:
        return
    assert (
        is_rollout(
            {field.name: getattr(rollout, field.name) for field in fields(rollout)}
        )
        and rollout.completion_mask.any(1).all()
    )
    torch.testing.assert_close(
        rollout.logprobs,
        token_logprobs(LLAMA, rollout, arguments["temperature"]).detach(),
        rtol=0,
        atol=1e-8,
    )
    drawn, real = rollout.completion_ids, rollout.completion_mask
    eos = [] if len(queries) % 2 else [EOS]
    for text in decode_completions(TOKENIZER, drawn, real, False, eos=eos):
        assert not text.endswith(("<eos>", "<pad>"))
    again = outcome(
        as_rollout,
        {
            "tokenizer": TOKENIZER,
            "queries": queries,
            "completions": rollout.completions[data.draw(st.integers(0, 2)) :],
        },
    )
    assert again is None or len(again) % len(queries) == 0
    assert len(
        EngineModels(LLAMA, TOKENIZER).sample(
            queries, 1, short_config(max_completion_length=2)
        )
    ) == len(queries)


# Settings -----------------------------------------------------------------------------

FIELDS = sorted(
    {field.name for config in CONFIGS.values() for field in fields(config)} - {"device"}
)
VALUES = ANYTHING | st.sampled_from(
    [
        "grpo",
        "ppo",
        "dapo",
        "add",
        "target",
        "cosine",
        "token",
        "group",
        "none",
        "bfloat16",
        "True",
        "1e-4",
        "auto",
        1,
        2,
        16,
        0.5,
        2**63,
        ["accuracy"],
        ["learned", "learned"],
        "../x",
        math.inf,
    ]
)


def checked(make):
    """The config, every field of which is of its type, and which comes back from
    JSON as it was; None if it is refused by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of top-p and top-k
        try:
            config = make()
        except ValueError as error:
            general = ["is not a parameter", "stands behind no option"]
            assert any(name in str(error) for name in [*FIELDS, *general]), error
            return
        assert make_config(**json.loads(json.dumps(asdict(config)))) == config
        assert not [
            x
            for x in asdict(config).values()
            if isinstance(x, float) and not math.isfinite(x)
        ]
        torch.Generator().manual_seed(config.seed)
        return config


@fuzz(make_config, Config, GRPOConfig, PPOConfig, step_of, rounds_of)
@given(
    st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=4), VALUES, max_size=3)
)
def test_configs(parameters):
    """Parameter sets of any kind, as papermill hands them over: a config, or an
    error that names a field."""
    config = checked(lambda: make_config(**parameters))
    if config:
        refills = config.dynamic_sampling if config.algorithm == "grpo" else 0
        usual = f"{config.algorithm}_step"
        assert rounds_of(config) == 1 + refills
        assert step_of(config).__name__ == ("dynamic_grpo_step" if refills else usual)
    if config and "recipe" not in parameters:
        for name, x in parameters.items():
            assert (
                x is None
                or getattr(config, name) in (x, [x])
                or str(x) == str(getattr(config, name))
                or float(x) == getattr(config, name)
            )


TRAIN = [
    cell.source
    for cell in nbformat.read(ROOT / "nbs/experiments/train.ipynb", 4).cells
    if cell.cell_type == "code"
][:5]  # imports, what is there before, the parameters in two cells, the config


@fuzz(make_config, times=1)
@given(
    st.dictionaries(
        st.sampled_from(FIELDS)
        | st.text(string.ascii_lowercase, min_size=5, max_size=9).filter(
            str.isidentifier
        ),
        VALUES,
        max_size=2,
    )
)
def test_parameters_of_the_notebook(parameters):
    """The first cells of the train notebook, with another parameters cell behind its
    own, are `make_config` of these parameters."""

    def notebook():
        names = {}
        for source in TRAIN[:4]:
            exec(source, names)
        names |= parameters
        for source in TRAIN[4:]:
            exec(source, names)
        return names["config"]

    found, direct = checked(notebook), checked(lambda: make_config(**parameters))
    assert found == direct


WORDS = (
    st.sampled_from([f"--{name}" for name in FIELDS])
    | st.sampled_from(
        [
            "--help",
            "-h",
            "--",
            "-",
            "--algorithm",
            "ppo",
            "grpo",
            "--recipe",
            "dapo",
            "--nonsense",
            "--num_prompts=3",
        ]
    )
    | st.text(max_size=5)
    | VALUES.map(str)
)


@fuzz(parse_arguments, main, resume_arguments, times=1)
@given(st.lists(WORDS, max_size=5))
def test_command_lines(words):
    """A config; an error with a name in it; or the usage, with the exit code that a
    shell expects."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as said,
    ):
        try:
            config = checked(lambda: parse_arguments(words))
        except SystemExit as end:
            assert end.code in (0, 2) and (end.code == 0 or "error:" in said.getvalue())
            return
        if config is None:
            with pytest.raises(SystemExit) as end:
                main(["train", *words])
            assert str(end.value.code).startswith("error: ")
    with pytest.raises(ValueError, match="usage: |is not a run"):
        resume_arguments(words)


@fuzz(
    resolve_device,
    resolve_dtype,
    fetch_smollm2,
    load_policy,
    check_weights,
    check_causal,
    times=1,
)
@given(ANYTHING.filter(lambda x: x is not None))
def test_names(x):
    "Devices, dtypes, sources and models that do not exist."
    for f, name, known in (
        (resolve_device, "device", ("auto", "cpu")),
        (resolve_dtype, "dtype", ("float32", "bfloat16", "float64")),
        (fetch_smollm2, "source", ("package", "hub")),
    ):
        if isinstance(x, str) and x not in known or not isinstance(x, (str, int)):
            assert outcome(f, {name: x}) is None
    if isinstance(x, str) and x and x.isidentifier() and x not in ("tiny", "smollm2"):
        assert outcome(load_policy, {"name": x, "device": "cpu"}, "model") is None


# Files --------------------------------------------------------------------------------

JUNK = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"[1]",
    b'{"step": 1}',
    b'"x"',
    b"NaN",
    b"\xff\xfe",
    b"{" * 2000,
]


@st.composite
def damages(draw):
    """A function of a file's content: something else, cut off, a bit turned, a piece
    out of the middle, or gone."""
    how, x = (
        draw(st.sampled_from(["junk", "cut", "bit", "piece", "gone"])),
        draw(st.floats(0, 1, exclude_max=True)),
    )
    junk = draw(st.sampled_from(JUNK))

    def damage(content):
        at = int(x * len(content))
        return {
            "junk": junk,
            "cut": content[:at],
            "bit": content[:at]
            + bytes([content[at] ^ (1 << at % 8)])
            + content[at + 1 :],
            "piece": content[:at] + content[at + 9 :],
            "gone": None,
        }[how]

    return damage


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A run of three steps with two checkpoints."
    directory = tmp_path_factory.mktemp("run") / "run"
    config = short_config(
        output_dir=str(directory),
        max_steps=3,
        save_steps=1,
        num_prompts=2,
        num_generations=2,
        eval_size=2,
        max_completion_length=3,
        lr_scheduler_type="cosine",
    )
    return train(config, progress=False), config


def copied(directory, to, damage, name):
    "A copy with one file damaged; True if the content is another now."
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(directory, to)
    before = (to / name).read_bytes()
    after = damage(before)
    if after is None:
        (to / name).unlink()
    else:
        (to / name).write_bytes(after)
    return after != before


@fuzz(open_run, read_json, Run, times=1)
@given(
    damages(),
    st.sampled_from(
        [
            "config.json",
            "metrics.jsonl",
            "model/config.json",
            "model/model.safetensors",
            "model/tokenizer.json",
        ]
    ),
    st.sampled_from([None, None, 1, 3, 7]),
)
def test_a_damaged_run(finished, tmp_path_factory, damage, name, step):
    "Opened, or refused with the name of what is wrong."
    directory = tmp_path_factory.getbasetemp() / "damaged"
    copied(finished[0].directory, directory, damage, name)
    try:
        found = open_run(directory, step=step)
    except (OSError, ValueError) as error:
        assert any(word in str(error) for word in [str(directory), *FIELDS]), error
    else:
        assert len(found.metrics) <= 3 and isinstance(found.config, Config)


@fuzz(
    train,
    is_whole,
    checkpoints,
    load_checkpoint,
    save_checkpoint,
    RunState,
    Trainer,
    resume,
    build_models,
    build_schedulers,
    prepare_directory,
    read_completions,
    times=1,
)
@given(
    damages(),
    st.sampled_from(
        [
            (step, name)
            for step in (2, 3)
            for name in ("trainer.json", "state.safetensors")
        ]
    ),
)
def test_a_damaged_checkpoint(finished, tmp_path_factory, damage, which):
    """Whatever happened to it: it is noticed, and the one before is used, with the
    state of its step bit for bit."""
    (run, config), (step, name) = finished, which
    directory = tmp_path_factory.getbasetemp() / "damaged"
    other = copied(run.directory, directory, damage, f"checkpoint-{step}/{name}")
    found = {step: is_whole(path) for step, path in checkpoints(directory)}
    assert found.pop(5 - step) and found.get(step, False) == (not other)
    newest = 3 if step == 2 or not other else 2
    models = build_models(config, task := load_task("add"))
    schedulers = build_schedulers(config, models)
    state = RunState(config, task, models, schedulers, directory, Trainer())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lines = resume(state)
    steps = read_completions(directory)["step"]
    assert (
        state.step == newest
        and len(lines) == newest
        and set(range(1, newest + 1)) <= set(steps)
    )
    saved = load_file(run.directory / f"checkpoint-{newest}/state.safetensors")
    assert all(
        p.equal(saved[f"policy.weights.{k}"])
        for k, p in models.policy.named_parameters()
    ) and state.generator.get_state().equal(saved["generator"])


@fuzz(train, times=1)
@given(
    damages(), st.sampled_from(["config.json", "metrics.jsonl", "completions.parquet"])
)
def test_resuming_beside_damaged_files(finished, tmp_path_factory, damage, name):
    """Gone on with, or refused with the name of the file; nothing is written by a
    refusal."""
    run, config = finished
    directory = tmp_path_factory.getbasetemp() / "damaged"
    copied(run.directory, directory, damage, name)
    shutil.rmtree(directory / "model")
    config = replace(config, output_dir=str(directory), resume=True)
    before = {
        path: path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }
    try:
        found = train(config, progress=False)
    except (OSError, ValueError) as error:
        assert str(directory) in str(error), error
        assert {
            path: path.read_bytes() for path in directory.rglob("*") if path.is_file()
        } == before
    else:
        assert list(found.metrics.index) == [1, 2, 3] and set(
            found.completions["step"]
        ) == {1, 2, 3}


# Costs, grids, evidence, the figure ---------------------------------------------------

COUNTS = st.sampled_from([0, 1, 7, 2.5, *ODD])
SIZE = parameters(LLAMA.config)


@fuzz(
    Size,
    training_bytes,
    forward_flops,
    flops,
    cost_table,
    parameters,
    completions_per_row,
    measure_flops,
    times=1,
)
@given(COUNTS, COUNTS, COUNTS)
def test_costs(a, b, c):
    "Not negative, and finite where what is counted is; or refused."

    def fits(*numbers, least=0):
        return all(isinstance(x, (int, float)) and x >= least for x in numbers)

    config, bytes_ = (
        short_config(),
        outcome(training_bytes, {"num_parameters": a, "bytes_per_number": b}),
    )
    assert (bytes_ is not None) == (
        fits(a, b) and b > 0 and math.inf not in (a, b)
    ) and (bytes_ is None or bytes_["moments"] == 2 * bytes_["weights"] == 2 * a * b)
    one = outcome(
        forward_flops,
        {"size": SIZE, "rows": a, "tokens": b, "context": c, "outputs": 1},
    )
    assert (one is not None) == (fits(a, b, c) and math.inf not in (a, b, c)) and (
        one is None or one >= 0
    )
    step = outcome(
        flops,
        {"config": config, "size": SIZE, "prompt_length": a, "completion_length": b},
    )
    assert (step is not None) == (
        fits(a, b, least=1) and math.inf not in (a, b)
    ) and all(x >= 0 for x in (step or {}).values())
    if step:
        assert cost_table(config, LLAMA.config, a, b)["FLOPs"].tolist() == list(
            step.values()
        )
    if fits(b, c, least=1) and math.inf not in (b, c):
        assert 12 % completions_per_row(12, b, c, 16) == 0
    assert measure_flops(lambda: a)[0] is a


@fuzz(iqm, interval, difference, paired_difference, pass_at_k, times=1)
@given(
    st.lists(st.floats(-9, 9), max_size=6),
    st.lists(st.floats(-9, 9), max_size=6),
    st.sampled_from([0.5, 0.95, *ODD]),
    COUNTS,
    COUNTS,
    COUNTS,
)
def test_statistics(x, y, level, n, c, k):
    middle = outcome(iqm, {"x": x}) if x else math.nan
    assert not x or min(x) - 1e-9 <= middle <= max(x) + 1e-9
    ends = refused(lambda: interval(x, level=level), "level", "samples")
    assert (ends is None) == (not isinstance(level, (int, float)) or not 0 < level < 1)
    if ends and len(x) > 1:
        assert min(x) - 1e-9 <= ends[0] <= ends[1] <= max(x) + 1e-9
    if x and y:
        assert math.isclose(difference(a=x, b=y)[0], middle - iqm(y), abs_tol=1e-12)
    both = {"first": x, "second": y, "level": level}
    pairs = outcome(paired_difference, both)
    assert (pairs is None) == (ends is None or len(x) != len(y) or not x)
    if pairs and len(x) > 1:
        gaps = [one - other for one, other in zip(x, y)]
        assert pairs.low - 1e-9 <= pairs.effect <= pairs.high + 1e-9
        assert min(gaps) - 1e-9 <= pairs.boot_low <= pairs.boot_high <= max(gaps) + 1e-9
        allowed = isinstance(c, (int, float)) and 0 <= c < math.inf
        assert (outcome(pairs.decide, {"margin": c}) is not None) == allowed
    found = outcome(pass_at_k, {"n": n, "c": c, "k": k})
    whole = all(type(v) in (int, bool) for v in (n, c, k))
    assert (found is not None) == (whole and 0 <= c <= n and 1 <= k <= n)
    if found is not None and n < 9:
        assert math.isclose(
            found,
            sum(any(i < c for i in s) for s in itertools.combinations(range(n), k))
            / math.comb(n, k),
        )


@fuzz(difference_of_shares, times=1)
@given(COUNTS, COUNTS, COUNTS, COUNTS, st.sampled_from([0.5, 0.95, *ODD]))
def test_shares(first, of_first, second, of_second, level):
    counts = (first, of_first, second, of_second)
    names = ("first", "of_first", "second", "of_second")
    found = outcome(difference_of_shares, dict(zip(names, counts)) | {"level": level})
    whole = all(isinstance(x, int) for x in counts)
    fits = whole and 0 <= first <= of_first and 0 <= second <= of_second
    fits = fits and min(of_first, of_second) >= 1
    shown = isinstance(level, (int, float)) and 0 < level < 1
    assert (found is not None) == bool(fits and shown)
    if found is not None:
        gap, low, high = found
        assert math.isclose(gap, first / of_first - second / of_second)
        assert -1 - 1e-9 <= low <= gap + 1e-9 and gap - 1e-9 <= high <= 1 + 1e-9


def ask(*_):
    raise AssertionError("nothing was to be run")


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9)
    | st.sampled_from(["../..", "/etc/passwd", "a/b", "..", "x" * 300, "a\0b", "\n"])
)


@fuzz(grid, cell_name, sweep, times=1)
@given(
    st.dictionaries(
        st.sampled_from(["task", "seed", "model", "beta"]),
        PLAIN | st.lists(PLAIN, max_size=3),
        max_size=3,
    ),
    st.sampled_from([1, *ODD]),
    ANYTHING,
)
def test_grids(axes, jobs, value):
    """A folder for each cell: inside of the directory, with a name that the system
    allows, and another for another cell. Nothing is run that cannot be."""
    cells = refused(lambda: grid(**axes), *axes)
    assert (cells is None) == any(x == [] for x in axes.values())
    names = [cell_name(cell) for cell in cells or []]
    for name in names:
        assert (
            Path("runs", name).resolve().parent == Path("runs").resolve()
            and name not in (".", "..")
            and len(name.encode()) <= 255
            and "\0" not in name
        )
    assert all(
        (a == b) == (repr(x) == repr(y))
        for a, x in zip(names, cells or [])
        for b, y in zip(names, cells or [])
    )
    for cells, jobs in (
        ([{"nonsense": 1}], 1),
        ([{"output_dir": "/etc"}], 1),
        ([{"seed": 1}] * 2, 1),
        ([{"seed": {1, 2}}], 1),
        ([{"beta": math.nan}], 1),
        ([], jobs),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sweeping, "_run_cell", ask)
            found = refused(
                lambda: sweep(
                    ROOT / "nbs/experiments/train.ipynb",
                    cells,
                    Path(tempfile.gettempdir()) / "no-such-sweep",
                    jobs,
                    progress=False,
                ),
                "parameter",
                "twice",
                "handed",
                "jobs",
            )
            assert (found is None) == (
                cells != [] or not (type(jobs) in (int, bool) and jobs >= 1)
            )


@fuzz(verdicts, Claim, read_json)
@given(
    damages(),
    st.text(max_size=9) | st.sampled_from(["01_kl", "../x", "a/b", ".."]),
    st.text(max_size=9) | st.sampled_from(["*", "**", "[", "0?_kl", "../*", "/*"]),
)
def test_claims(tmp_path_factory, damage, name, names):
    """A claim's file that is damaged is named; a claim is called by a name that is
    no path."""
    path = tmp_path_factory.getbasetemp() / "claims" / "01_kl.json"
    path.parent.mkdir(exist_ok=True)
    content = damage((ROOT / "benchmarks/claims/01_kl.json").read_bytes())
    path.write_bytes(content or b"")
    found = refused(lambda: verdicts(path.parent), str(path))
    assert found is None or list(found.index) == ["01_kl"]
    some = refused(lambda: verdicts(path.parent, names=names), str(path))
    chosen = ["01_kl"] if fnmatch.fnmatchcase("01_kl", names) else []
    assert (some is None) == (found is None and bool(chosen))
    assert some is None or list(some.index) == chosen
    claim = outcome(Claim, {"name": name, "statement": ""})
    assert (claim is not None) == bool(re.fullmatch(r"\w+", name)) and (
        claim is None or claim.directory.parent == ROOT / "runs/claims"
    )


@fuzz(boxes, draw_figure)
@given(
    st.sampled_from(["ppo", "grpo", None, "dpo", "", 1]),
    st.none() | st.sampled_from(["kl", "gae", "trained", "task"]) | st.text(max_size=5),
    st.dictionaries(
        st.sampled_from(["q", "r", "kl"]) | st.text(max_size=4),
        st.text(max_size=5) | st.lists(st.text(max_size=4) | st.just(1), max_size=3),
        max_size=2,
    ),
)
def test_figures(algorithm, highlight, text):
    "Well-formed SVG, whatever is written into it; or a refusal."
    figure = outcome(
        draw_figure, {"algorithm": algorithm, "highlight": highlight, "text": text}
    )
    assert (
        figure is not None
        or algorithm not in ("ppo", "grpo", None)
        or highlight is not None
        or text
    )
    if figure:
        ElementTree.fromstring(
            re.sub(
                r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", str(figure)
            )
        )
    assert (outcome(boxes, {"algorithm": algorithm}) is None) == (
        algorithm not in ("ppo", "grpo")
    )


# All of them --------------------------------------------------------------------------

EXCEPTIONS = (
    {
        "figure.Box": "made by `boxes`",
        "figure.Figure": "made by `draw_figure`",
        "figure.Chart": "made by `draw_chart`",
        "figure.draw_chart": "takes what vl-convert checks; test_pictures.py",
        "engine.precision.precision": "takes a checked config and such a device",
        "engine.precision.autocast_as_it_is": "takes a device that `resolve_device` "
        "made",
        "loading.cache_directory": "takes nothing",
        "sampling.draw": "the inner loop of `sample`, which checks its arguments once",
        "engine.decoding.draw_by_blocks": "the same",
        "run.build.checkpoint_layers": "takes a model; test_training.py",
        "engine.adapters.add_adapters": "takes a model and a checked config; "
        "test_models.py",
        "run.build.load_value_model": "wrong models in test_models.py",
        "run.build.token_classifier": "takes a value model; test_models.py",
        "reward.RewardModel": "takes models; test_reward_models.py",
        "engine.judging.timed_score": "in `score`",
        "engine.judging.RewardModel": "takes models; wrong ones in test_bad_input.py",
        "engine.micro_batch.logprobs_in_micro_batches": "in `reference_logprobs`",
        "names.within_reach": "asks the hub; test_bad_input.py",
        "names.near": "names that are nowhere in test_bad_input.py",
        "names.how_to_install": "extras in test_tools.py",
        "checks.has_float64": "takes a device; test_accelerator.py",
        "names.check_name": "names that are nowhere in test_bad_input.py",
        "names.hub_options": "names that are nowhere in test_bad_input.py",
        "engine.files.Rows": "every format in test_files.py",
        "engine.files.choose_sides": "names of splits in test_files.py",
        "engine.files.check_source": "names of any kind in test_bad_input.py",
        "engine.files.read_rows": "test_data.py and test_files.py damage files",
        "engine.files.rows_of": "rows in memory in test_data.py",
        "engine.files.sides_of": "splits in test_files.py",
        "engine.files.is_gap": "missing answers in test_data.py",
        "engine.shapes.is_text": "every prompt in test_data.py",
        "engine.shapes.accepted_answers": "any answer in test_data.py",
        "engine.shapes.Shape": "made in `SHAPES`",
        "engine.shapes.Reader": "made by `recognise`",
        "engine.data.Seen": "made by `look_through`",
        "engine.data.TableTask": "made by `task_from_rows`",
        "engine.shapes.recognise": "columns of any kind in test_shapes.py",
        "engine.shapes.marked_answer": "solutions in test_shapes.py",
        "engine.shapes.makes_target": "hostile expressions in test_shapes.py",
        "engine.data.look_through": "test_prompts.py",
        "engine.prompts.check_readable": "test_data.py",
        "engine.prompts.fit_prompts": "test_prompts.py",
        "engine.word_problems.is_gold": "gold answers in test_data.py",
        "engine.word_problems.braced": "`marked_answer` in test_shapes.py",
        "engine.answers.WrittenAnswer": "made by `read_answer`",
        "engine.answers.read_answer": "any text in test_answers.py",
        "engine.answers.same_written": "any text in test_answers.py",
        "engine.answers.is_right_math": "hostile texts in test_answers.py",
        "engine.answers.math_reward": "any text in test_answers.py",
        "engine.answers.read_choice": "any text in test_answers.py",
        "engine.answers.is_right_choice": "hostile texts in test_answers.py",
        "engine.answers.choice_reward": "answers that are no letters in "
        "test_answers.py",
        "engine.answers.with_answer_rule": "test_answers.py",
        "engine.rewards.is_file_function": "files in test_rewards_brought.py",
        "engine.rewards.as_reward_function": "wrong ones in test_rewards_brought.py",
        "engine.rewards.load_reward_function": "files in test_rewards_brought.py",
        "engine.rewards.bring_rewards": "in `train`",
        "engine.rewards.brought_functions": "in `make_record`",
        "engine.rewards.named_files": "in `open_run`",
        "engine.rewards.BroughtReward": "made by `load_reward_function`",
        "run.command_line.ask_for_files": "test_rewards_brought.py",
        "engine.data.task_from_rows": "test_data.py",
        "engine.data.as_task": "rows in memory in test_data.py",
        "engine.shapes.is_same_answer": "any answer in test_data.py",
        "engine.word_problems.extract_answer": "hostile texts in test_data.py",
        "engine.data.gsm8k": "test_data.py",
        "engine.data.gym": "test_data.py",
        "engine.data.check_task": "names of any kind in test_bad_input.py",
        "engine.data.load_task": "names of any kind in test_bad_input.py",
        "run.options.own_functions": "takes functions and a config; test_options.py",
        "run.options.other_functions": "reads `own_functions`; test_options.py",
        "run.options.StartOptions": "a part of the configs",
        "run.options.RunOptions": "a part of the configs",
        "sampling.SamplingOptions": "a part of the configs",
        "reward.RewardOptions": "a part of the configs",
        "reference.ReferenceOptions": "a part of the configs",
        "value.ValueOptions": "a part of the configs",
        "gae.GAEOptions": "a part of the configs",
        "group.GroupOptions": "a part of the configs",
        "objective.ObjectiveOptions": "a part of the configs",
        "update.UpdateOptions": "a part of the configs",
        "run.diagnostics.explained_variance": "test_diagnostics.py",
        "run.diagnostics.update_metrics": "of what a run recorded; test_diagnostics.py",
        "run.diagnostics.Halves": "made by `ObservedModels`",
        "engine.models.micro_batch_of": "in `EngineModels.micro_batches`",
        "run.diagnostics.signal_and_noise": "takes gradients; test_diagnostics.py",
        "run.diagnostics.noise_scale": "two means; test_diagnostics.py",
        "run.diagnostics.ObservedModels": "holds models; test_diagnostics.py",
        "run.diagnostics.recorded_groups": "`Rollout.select`",
        "run.options.free_directory": "a path of the disk; test_brought_models.py",
        "run.command_line.copy_notebooks": "copies files; test_package.py",
        "run.options.resting_steps": "takes a checked config; test_value_warmup.py",
        "run.options.expand_path": "any text is a path; test_run_directory.py",
        "run.run_directory.make_directory": "makes what `prepare_directory` chose",
        "models.Models": "holds models",
        "algorithm.ppo_step": "the stages above, in order",
        "algorithm.grpo_step": "the stages above, in order",
        "update.check_filled": "the beginning of `update`",
        "update.gradient_step": "in `update`, with what `batch_loss` gets, too",
        "run.dynamic_sampling.dynamic_grpo_step": "the stages above, in order",
        "engine.attention.merge": "within `attend_in_parts`",
        "engine.attention.Parts": "made by `find_parts`",
        "engine.attention.find_parts": "all shapes, in test_attention.py",
        "engine.attention.attend_in_parts": "all shapes, in test_attention.py",
        "engine.attention.RowMask": "made by `row_mask`",
        "engine.attention.pays_in_parts": "through `row_mask`, in test_attention.py",
        "engine.attention.row_mask": "in `shared_rows`",
        "engine.adapters.without_adapters": "takes a model; test_models.py",
        "engine.adapters.Adapter": "made by `find_adapter`",
        "engine.adapters.find_adapter": "damaged ones in test_brought_models.py",
        "engine.adapters.load_model": "damaged ones in test_brought_models.py",
        "engine.adapters.load_base": "in `load_model`",
        "engine.adapters.merge_adapter": "in `load_model`",
        "engine.adapters.can_continue": "takes models; test_brought_models.py",
        "engine.adapters.continue_adapter": "takes models; test_brought_models.py",
        "run.build.load_rewards_of": "`load_rewards` with a checked config",
        "run.build.load_start": "takes a checked config; test_brought_models.py",
        "run.build.put_adapters": "takes models; test_brought_models.py",
        "run.checkpoint.load_weights": "in `open_policy`; test_brought_models.py",
        "run.checkpoint.save_model": "in `train`; test_faults.py",
        "run.training.open_policy": "in `open_run`",
        "run.training.export": "takes a run; test_brought_models.py",
        "run.training.evaluate": "`sample` and a task",
        "run.training.peak_memory": "takes a device; test_accelerator.py",
        "run.run_directory.write_atomically": "test_security.py",
        "run.run_directory.read_lines": "in `resume`; test_faults.py damages files",
        "run.run_directory.remove_path": "takes a path of the library's own",
        "run.run_directory.replace_directory": "killed in test_faults.py",
        "run.run_directory.find_directory": "in `train`; test_run_directory.py",
        "run.run_directory.claim_directory": "in `train`; test_run_directory.py",
        "run.run_directory.Completions": "test_run_directory.py",
        "run.run_directory.make_record": "in `train`",
        "run.run_directory.check_passed": "in `open_run`",
        "run.run_directory.saved_config": "in `open_run`",
        "run.checkpoint.save": "in `train`; test_faults.py",
        "run.checkpoint.save_models": "in `train`; test_faults.py",
        "run.checkpoint.noted_on": "test_faults.py",
        "run.trackers.check_trackers": "in `train`; test_watching.py",
        "run.trackers.open_trackers": "test_watching.py",
        "run.build.open_task": "`load_task` and `as_task`",
        "run.build.check_rules": "in `load_rewards`",
        "run.build.renewed_models": "takes models",
        "run.build.sampling_generator": "takes a checked config",
        "engine.adapters.require_peft": "takes no value of a user's",
        "run.iterative.train_reward_model": "`RewardModel.scores` and "
        "`bradley_terry_loss`",
        "run.iterative.outer_iteration": "part of `train`",
        "run.training.step_queries": "`Task.queries`",
        "run.command_line.chat": "any line of text is a question: `Task.parse`",
        "evidence.statistics.Comparison": "made by `paired_difference`",
        "evidence.statistics.Finding": "drawn in test_evidence.py",
        "evidence.statistics.decide": "drawn in test_evidence.py",
        "evidence.statistics.summarise": "pandas",
        "evidence.designs.exact_values": "takes models",
        "evidence.designs.judge": "takes models and a checked config",
        "evidence.designs.baseline_step": "takes models and a checked config",
        "evidence.designs.baseline_run": "takes models and a checked config",
        "evidence.designs.mean_of_steps": "pandas",
        "evidence.designs.Pieces": "test_designs.py",
        "evidence.statistics.probe": "`sample` and a task",
        "evidence.statistics.read_metrics": "of runs that `sweep` made",
    }
    | dict.fromkeys(
        [f"evidence.plots.{name}" for name in plots.__all__]
        + ["evidence.statistics.plot_summary", "evidence.statistics.plot_pairs"],
        "draws what a run holds",
    )
    | dict.fromkeys(
        [f"evidence.ledger.{name}" for name in ledger.__all__]
        + [f"evidence.oracles.{name}" for name in oracles.__all__]
        + [f"evidence.trl_oracles.{name}" for name in trl_oracles.__all__],
        "the instruments of the tests",
    )
    | dict.fromkeys(
        [f"engine.distributed.{name}" for name in distributed.__all__],
        "alone the identity, together in test_processes.py",
    )
    | dict.fromkeys(
        [f"engine.vllm_sampler.{name}" for name in vllm_sampler.__all__],
        "needs vLLM: test_vllm.py",
    )
)


def test_every_public_function_is_here():
    "Fuzzed above, or excepted for a reason; no exception is older than its function."
    modules = [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(grpo_nb.__path__, "grpo_nb.")
        if not module.ispkg and not module.name.endswith("._modidx")
    ]
    named = {
        f"{module.__name__.removeprefix('grpo_nb.')}.{name}"
        for module in modules
        for name in module.__all__
    }
    public = {
        f"{module.__name__.removeprefix('grpo_nb.')}.{name}"
        for module in modules
        for name in module.__all__
        if inspect.isfunction(getattr(module, name))
        or inspect.isclass(getattr(module, name))
    }
    covered = {name.removeprefix("grpo_nb.") for name in COVERED}
    assert public - covered == public & EXCEPTIONS.keys() - covered, sorted(
        public - covered - EXCEPTIONS.keys()
    )
    assert not covered & EXCEPTIONS.keys()
    assert EXCEPTIONS.keys() <= named, EXCEPTIONS.keys() - named
