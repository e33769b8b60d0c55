"""The value model's head start: the policy rests, and only the value model learns."""

import json

import pytest
import torch
from helpers import read_metrics, run, short_config
from safetensors.torch import load_file

from grpo_nb.policy import load_policy

STEPS, RESTING = 5, 3
OPTIONS = {"algorithm": "ppo", "num_prompts": 16, "learning_rate": 1e-3}
OPTIONS |= {"max_steps": STEPS, "save_steps": 1, "save_total_limit": 9}
OPTIONS |= {"beta": 0.1, "kl_target": 0.001}
OPTIONS |= {"lr_scheduler_type": "linear", "num_iterations": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A run with a head start, and the same without."
    folder = tmp_path_factory.mktemp("warmup")
    run(folder / "rests", **OPTIONS, value_warmup_steps=RESTING)
    run(folder / "plain", **OPTIONS)
    return folder


def weights(directory, step, box):
    "What a box has trained, after a step."
    saved = load_file(directory / f"checkpoint-{step}" / "state.safetensors")
    return {k: x for k, x in saved.items() if k.startswith(f"{box}.weights.")}


def same(a, b):
    assert a.keys() == b.keys() and a
    return all(a[k].equal(b[k]) for k in a)


def test_the_policy_rests_bit_for_bit(runs):
    "Its weights are those that it was loaded with, and its optimiser has no moments."
    start, _ = load_policy("tiny", "cpu")
    start = {f"policy.weights.{k}": p for k, p in start.named_parameters()}
    for step in range(1, RESTING + 1):
        found = weights(runs / "rests", step, "policy")
        assert same(found, {k: start[k] for k in found})
        state = load_file(runs / "rests" / f"checkpoint-{step}" / "state.safetensors")
        assert not any(k.startswith("policy.optimizer.") for k in state)
    later = [weights(runs / "rests", step, "policy") for step in (RESTING, RESTING + 1)]
    assert not same(*later)


def test_the_value_model_learns_what_it_would_have_learnt(runs):
    """Its first step needs nothing of the policy's: it is that of a run without a
    head start, to the last bit; then the answers of a resting policy teach it on."""
    first = [weights(runs / name, 1, "value") for name in ("rests", "plain")]
    assert same(*first)
    by_step = [weights(runs / "rests", step, "value") for step in range(1, STEPS + 1)]
    assert not any(same(a, b) for a, b in zip(by_step, by_step[1:]))


def test_what_a_resting_step_reports(runs):
    "The explained variance and the value loss; nothing of an update that was not made."
    lines = read_metrics(runs / "rests")
    for line in lines[:RESTING]:
        assert {"explained_variance", "value_loss", "value_grad_norm", "reward"} <= {
            *line
        }
        assert not {"loss", "grad_norm", "entropy", "kl", "ratio"} & {*line}
        assert line["update/kl"] == line["update/outside_clip"] == 0
    assert all({"loss", "grad_norm", "kl"} <= {*line} for line in lines[RESTING:])


def test_the_schedule_and_beta_wait_for_the_policy(runs):
    """The policy's rate falls over its own two steps, 1 and 1/2; beta, which would fall
    where the KL is 0, stays; the value model's rate falls over all five."""
    lines = read_metrics(runs / "rests")
    rates = [line["learning_rate"] / 1e-3 for line in lines]
    assert rates == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.5])
    assert [line["beta"] for line in lines[: RESTING + 1]] == [0.1] * (RESTING + 1)
    saved = (runs / "rests" / "checkpoint-4" / "trainer.json").read_text()
    _, value = json.loads(saved)["schedulers"]
    assert value["_last_lr"] == pytest.approx([1e-3 / 5])


@pytest.mark.parametrize("value_model", ["separate", "head"])
def test_with_a_head_on_the_trunk_the_trunk_rests_too(tmp_path, value_model):
    options = OPTIONS | {"max_steps": 2, "value_model": value_model}
    run(tmp_path / "run", **options, value_warmup_steps=1)
    start, _ = load_policy("tiny", "cpu")
    found = weights(tmp_path / "run", 1, "policy")
    parameters = dict(start.named_parameters())
    assert all(found[k].equal(parameters[k.split(".", 2)[2]]) for k in found)
    assert weights(tmp_path / "run", 1, "value")["value.weights.head.weight"].any()


def test_it_comes_to_explain_a_task_whose_prompts_differ(tmp_path):
    """Sums of one to three digits, of which the policy gets the last hardly ever
    right: 0 in the first step, above 0.3 within the head start."""
    found = run(
        tmp_path / "run",
        algorithm="ppo",
        task="sums",
        digits=3,
        num_prompts=96,
        max_steps=21,
        value_warmup_steps=20,
        save_steps=0,
        beta=0.0,
    )
    explained = found.metrics["explained_variance"]
    assert abs(explained.iloc[0]) < 0.01
    assert explained.iloc[-6:].mean() > 0.3


def test_what_is_refused():
    "A critic's option without a critic, and a head start that leaves nothing to do."
    with pytest.raises(ValueError, match="value_warmup_steps"):
        short_config(algorithm="grpo", value_warmup_steps=1)
    for steps in (5, 6):
        with pytest.raises(ValueError, match="leaves the policy no step: max_steps"):
            short_config(algorithm="ppo", max_steps=5, value_warmup_steps=steps)
    for wrong in (-1, 0.5, "two"):
        with pytest.raises(ValueError, match="value_warmup_steps"):
            short_config(algorithm="ppo", max_steps=5, value_warmup_steps=wrong)
    config = short_config(algorithm="ppo", max_steps=5, value_warmup_steps=4)
    assert config.value_warmup_steps == 4
    assert short_config(algorithm="ppo").value_warmup_steps == 0


def test_a_resting_policy_has_no_gradient(tiny):
    "The update does not even compute one: the value model's pass is all that is paid."
    from grpo_nb.models import Models
    from grpo_nb.update import gradient_step
    from grpo_nb.value import ValueModel

    policy, tokenizer = tiny
    for p in policy.parameters():
        p.grad = None
    optimizers = [torch.optim.AdamW(policy.parameters())]
    models = Models(policy, tokenizer, *optimizers, value=ValueModel(policy))
    models.value_optimizer = torch.optim.AdamW(models.value.parameters())
    models.policy_rests = True
    assert list(models.trained()) == ["policy", "value"]
    assert list(models.moved()) == ["value"]
    metrics = gradient_step(models, [], short_config(algorithm="ppo"), 0.0, {})
    assert set(metrics) == {"value_grad_norm", "skipped_updates"}
    assert all(p.grad is None for p in policy.parameters())
