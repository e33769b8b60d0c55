"""What test_processes.py starts as two processes: the same step alone and together,
and runs in which one process fails.

Alone is the truth: before the processes have met, each computes the step for itself,
on one process's path."""

import copy
import os
import signal
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import nn

from grpo_nb.engine.models import EngineModels
from grpo_nb import algorithm, gae
from grpo_nb.engine import distributed
from grpo_nb.run import training
from grpo_nb.run.options import make_config
from grpo_nb.engine.micro_batch import micro_batches
from grpo_nb.engine.distributed import full_tensor, get_rank, shard
from grpo_nb.reward import accuracy_reward
from grpo_nb.engine.data import load_task
from grpo_nb.update import update
from grpo_nb.value import ValueModel
from helpers import character_tokenizer, random_model, random_rollout

BASE = dict(
    num_prompts=6,
    max_completion_length=6,
    device="cpu",
    max_grad_norm=1e9,
    entropy_coef=0.01,
)
WAYS = [
    dict(loss_type="grpo"),
    dict(loss_type="bnpo", num_iterations=2),
    dict(loss_type="dapo", mask_truncated_completions=True),
    dict(loss_type="dr_grpo", importance_sampling_level="sequence"),
    dict(objective="cispo", max_tokens_per_micro_batch=1),
    dict(objective="sapo"),
]


def gradients(*models):
    "All gradients, put together where they are sharded."
    weights = [p for model in models for p in model.parameters()]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
    return torch.cat([full_tensor(grad).flatten() for grad in grads])


def inputs(prompts):
    """A policy, and a rollout of groups of very different lengths: every second one
    carries no loss, one completion is truncated."""
    tokenizer, policy = character_tokenizer(), random_model(dropout=0.0)
    rollout = random_rollout(policy, tokenizer, prompts=prompts, T=9)
    order = [
        g
        for piece in micro_batches(rollout, 1, policy.config.hidden_size)
        for g in piece
    ]  # alone: longest first
    rollout.scored = ~torch.isin(
        torch.arange(len(rollout)) // 3, torch.tensor(order[1::2])
    )  # the groups that the second process will get
    rollout.truncated[3 * order[0]] = True
    return tokenizer, policy, rollout


def one_update(policy, rollout, config, ppo=False, cut=False):
    """Gradients and metrics of one update; the optimiser moves by a little, so that
    a second iteration is another."""
    policy, rollout = copy.deepcopy(policy), copy.copy(rollout)
    value = ValueModel(policy) if ppo else None
    if ppo:
        nn.init.normal_(value.head.weight, generator=torch.Generator().manual_seed(1))
    for model in (policy, value):
        if cut and model is not None:
            shard(model)
    if ppo:
        rollout.values = (
            EngineModels(policy, None, value=value)
            .predict_values(rollout, SimpleNamespace(max_tokens_per_micro_batch=40))
            .detach()
        )
        rollout.advantages, rollout.returns = gae.advantages(
            rollout, 0.1 * rollout.ref_logprobs, config
        )
    optimizers = [
        torch.optim.SGD(model.parameters(), lr=1e-4)
        for model in (policy, value)
        if model is not None
    ]
    metrics = update(
        EngineModels(
            policy, None, optimizers[0], value=value, value_optimizer=optimizers[-1]
        ),
        rollout,
        config,
        beta=0.0 if ppo else 0.1,
    )
    return (
        gradients(*[model for model in (policy, value) if model is not None]),
        metrics,
        rollout.logprobs,
    )


def close(a, b, what):
    "Two results of `one_update` within 1e-6 (in float64 they are within 1e-9)."
    (gradient, metrics, logprobs), (g, m, p) = a, b
    assert gradient.abs().max() > 1e-3 and list(metrics) == list(m), (
        what,
        list(metrics),
        list(m),
    )
    apart = max(
        (gradient - g).abs().max().item() / gradient.abs().max().item(),
        (logprobs - p).abs().max().item(),
        *(abs(metrics[k] - m[k]) for k in m if not k.endswith("seconds")),
    )
    assert apart < 1e-9, (what, apart, metrics, m)
    return apart


def updates():
    """GRPO with each way of aggregating, and PPO with whitening: 4 groups, and 5,
    which leave one process without a group at the end."""
    cut = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    four, five = (
        inputs(("1+2=", "34+5=", "678+9=", "7+7=") + more)[1:]
        for more in ((), ("100+1=",))
    )  # (policy, rollout), made alone

    def compute(sharded):
        for policy, rollout in (four, five):
            for how in WAYS:
                yield one_update(
                    policy, rollout, make_config(**BASE | how), cut=sharded
                )
        for how in (
            dict(whiten_rewards=True),
            dict(loss_type="grpo", max_tokens_per_micro_batch=30),
        ):
            yield one_update(
                policy,
                rollout,
                make_config(algorithm="ppo", **BASE | how),
                ppo=True,
                cut=sharded,
            )
        yield one_update(
            policy,
            replace(rollout, scored=None),
            make_config(**BASE, max_tokens_per_micro_batch=40),
            cut=sharded,
        )

    step = given_step()
    alone, stepped = list(compute(False)), step()
    distributed.init_distributed()
    worst = [close(a, b, i) for i, (a, b) in enumerate(zip(alone, compute(cut)))]
    for x, y in zip(stepped[1:], (again := step())[1:]):
        assert x.equal(
            y
        )  # rewards and advantages: the same numbers, from the same rows
    worst.append(close(stepped[0], again[0], "grpo_step"))
    print(
        f"process {get_rank()}: {len(worst)} updates, apart by {max(worst):.0e}, "
        f"cut {cut}"
    )


def given_step():
    """A step of GRPO on a given rollout, judged in two processes: rewards,
    advantages over the batch, log-probs of the reference. A function, which computes
    it."""
    tokenizer, start, given = inputs(("1+2=", "34+5=", "678+9="))

    def step():
        policy, rollout = (
            copy.deepcopy(start),
            replace(
                given, scored=None, rewards=None, advantages=None, ref_logprobs=None
            ),
        )
        rollout.completions = ["3", "x", "39", "39", "39", "1", "687", "", "687"]
        judge = lambda completions, **_: [
            float(len(text)) + 0.1 for text in completions
        ]
        models = EngineModels(
            policy,
            tokenizer,
            torch.optim.SGD(policy.parameters(), lr=1e-4),
            [judge],
            copy.deepcopy(policy),
        )
        models.sample = lambda *_: rollout
        rollout, metrics = algorithm.grpo_step(
            models, rollout.queries, make_config(**BASE, scale_rewards="batch")
        )
        return (
            (gradients(policy), metrics, rollout.ref_logprobs),
            rollout.rewards,
            rollout.advantages,
        )

    return step


def gathering(directory):
    """A step of PPO, saved; it prints how many whole tensors, put together from parts,
    this process has had at once."""
    from torch.distributed.tensor import DTensor

    gather, made, most = DTensor.full_tensor, [], [0]

    def noted(self, **options):
        whole = gather(self, **options)
        made.append(weakref.ref(whole))
        most[0] = max(most[0], sum(ref() is not None for ref in made))
        return whole

    DTensor.full_tensor = noted
    options = dict(num_prompts=4, max_steps=1, eval_size=2, save_steps=1)
    config = make_config(
        algorithm="ppo",
        max_completion_length=6,
        device="cpu",
        output_dir=directory,
        **options,
    )
    training.train(config, progress=False)
    print(f"process {get_rank()}: {most[0]} whole at once", flush=True)


def run(directory, resume="false"):
    """A run in which the judge fails in the second process only (at its third call),
    or a signal reaches the second process only."""
    judge, calls, what = accuracy_reward(load_task("add")), [], os.environ.get("FAULT")

    def accuracy(prompts, completions, **columns):
        calls.append(1)
        if len(calls) == 3 and os.environ["RANK"] == "1":
            if what == "raise":
                raise OSError("the sandbox does not answer")
            if what == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            if what == "crash":
                os._exit(7)
        return judge(prompts, completions, **columns)

    options = dict(
        num_prompts=4,
        num_generations=4,
        max_steps=5,
        eval_steps=2,
        eval_size=5,
        save_steps=5,
        max_completion_length=6,
        device="cpu",
    )
    training.train(
        make_config(output_dir=directory, resume=resume == "true", **options),
        reward_funcs=[accuracy],
        progress=False,
    )


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
