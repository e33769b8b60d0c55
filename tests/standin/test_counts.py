"""How often the host waits for the device in a step: at most so often, and no more
often with more completions."""

import json

import pytest
import standin
import torch
from counting import count_steps, total
from grpo_nb.engine.packing import on_host, to_host
from helpers import ROOT

RECORDED = json.loads((ROOT / "benchmarks/results/launches.json").read_text())
CEILINGS = {"grpo": 60, "ppo": 75}  # of a step with the default settings
SMALL = {"grpo": {"num_prompts": 8, "num_generations": 8}, "ppo": {"num_prompts": 32}}


def beside_tokens(syncs):
    "What does not depend on how many tokens the longest completion has."
    return {place: n for place, n in syncs.items() if not place[1].endswith("_decode")}


@pytest.mark.parametrize("algorithm", CEILINGS)
def test_waits_are_few_and_do_not_grow(algorithm):
    stages, syncs, _ = count_steps(algorithm=algorithm)
    assert total(stages, "sync") <= CEILINGS[algorithm], syncs
    _, of_fewer, _ = count_steps(algorithm=algorithm, **SMALL[algorithm])
    assert beside_tokens(of_fewer) == beside_tokens(syncs)
    recorded = RECORDED[algorithm]["syncs"]
    now = {stage: n for (kind, stage), n in stages.items() if kind == "sync" and n}
    assert recorded | {"sampling": 0} == now | {"sampling": 0}  # make it anew if not


def test_micro_batches_cost_the_same_each():
    "Twice as many micro-batches, at most twice as many waits in the update."
    counts = []
    for max_tokens in (400, 200):
        limit = {"max_tokens_per_micro_batch": max_tokens}
        stages, _, _ = count_steps(num_prompts=8, num_generations=8, **limit)
        counts.append(stages)
    for stage in ("reference", "record", "reward"):
        assert counts[0]["sync", stage] == counts[1]["sync", stage] <= 4
    assert counts[1]["sync", "update"] < 2.5 * counts[0]["sync", "update"]


def test_tensors_come_in_one_transfer():
    "Of any dtype and shape, bit by bit."
    there = [
        torch.tensor([[1.5, float("nan")]], device="standin", dtype=torch.bfloat16),
        torch.tensor([True, False, True], device="standin"),
        torch.tensor(2**53 + 1, device="standin"),
        torch.zeros(0, 3, device="standin", requires_grad=True),
        torch.rand(3, 2, device="standin", dtype=torch.float64).T,
    ]
    expected = [x.detach().cpu() for x in there]
    standin.reset()
    here = to_host(there)
    assert standin.syncs() == 1
    for x, y in zip(here, expected):
        assert x.device.type == "cpu" and (x.dtype, x.shape) == (y.dtype, y.shape)
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


def test_a_rollout_comes_in_one_transfer(rollout):
    there = rollout_on_device(rollout)
    standin.reset()
    here = on_host(there)
    tokens = on_host(there, only_tokens=True)
    assert standin.syncs() == 2
    assert torch.equal(here.logprobs, rollout.logprobs) and tokens.logprobs is None
    for name in ("prompt_ids", "completion_ids", "completion_mask", "truncated"):
        assert torch.equal(getattr(here, name), getattr(rollout, name))
        assert torch.equal(getattr(tokens, name), getattr(rollout, name))
    assert on_host(rollout) is rollout


def rollout_on_device(rollout):
    "The same rollout, every tensor of it on the stand-in."
    moved = {
        name: x.to("standin")
        for name, x in vars(rollout).items()
        if isinstance(x, torch.Tensor)
    }
    return type(rollout)(**vars(rollout) | moved)
