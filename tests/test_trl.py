"""TRL as an oracle: values and gradients of the loss on random batches, advantages,
and steps of its trainer repeated.

What the two define differently is set alike: see the table in chapter 43. Rows
without a token that carries loss are left out, because TRL keeps them in N."""

import math
import tempfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("trl")

from grpo_nb.run.options import make_config
from grpo_nb.group import group_advantages
from grpo_nb.evidence.oracles import disagreement
from grpo_nb.evidence.trl_oracles import near_reward, silence, trl_advantages
from grpo_nb.evidence.trl_oracles import trl_loss, trl_steps, weights_apart
from grpo_nb.objective import aggregate, policy_loss
from grpo_nb.policy import load_policy
from grpo_nb.reference import kl
from grpo_nb.engine.data import load_task

LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo")
OBJECTIVES = {"cispo": ("cispo", "dapo"), "sapo": ("sapo", "grpo")}  # and loss_type
LEVELS = ("token", "sequence", "sequence_token")


@st.composite
def batches(draw):
    "Random [N, T] tensors; every row has a token, and its padding holds junk."
    N, T = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    lengths = torch.tensor(draw(st.lists(st.integers(1, T), min_size=N, max_size=N)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    old, scale = -normal(N, T).abs(), draw(st.sampled_from([0.0, 0.1, 0.5]))
    return {
        "mask": torch.arange(T) < lengths[:, None],
        "old": old,
        "logprobs": (old + normal(N, T, scale=scale)).requires_grad_(),
        "ref": old + normal(N, T, scale=0.5),
        "advantages": normal(N, T) if draw(st.booleans()) else normal(N),
    }


def with_delta(settings):
    "A dual clip stands above the upper bound."
    high = settings["epsilon_high"]
    bound = 1 + (settings["epsilon"] if high is None else high)
    above = settings["delta"]
    return settings | {"delta": None if above is None else bound + above}


settings_of_both = st.fixed_dictionaries(
    {
        "beta": st.sampled_from([0.0, 0.04, 1.0]),
        "use_bias_correction_kl": st.booleans(),
        "epsilon": st.sampled_from([3e-4, 0.1, 0.2]),
        "epsilon_high": st.sampled_from([None, 4e-4, 0.28, 4.0]),
        "delta": st.sampled_from([None, 0.0, 0.1, 3.0]),  # above 1 + epsilon_high
        # numbers that float32 holds, since TRL's are
        "sapo_temperature_pos": st.sampled_from([1.0, 0.5]),
        "sapo_temperature_neg": st.sampled_from([1.0, 1.25, 4.0]),
    }
).map(with_delta)


def our_loss(
    b,
    loss_type,
    level,
    beta,
    use_bias_correction_kl,
    max_completion_length,
    num_sequences=None,
    num_tokens=None,
    **bounds,
):
    """policy_loss + beta kl (times rho), aggregated, as `update` composes them; with
    the arguments of TRL, but for the cap of CISPO."""
    objective, aggregated = OBJECTIVES.get(loss_type, ("clip", loss_type))
    loss, statistics = policy_loss(
        b["logprobs"],
        b["old"],
        b["advantages"],
        b["mask"],
        **bounds,
        importance_sampling_level=level,
        objective=objective,
    )
    if beta:
        loss = loss + beta * kl(b["logprobs"], b["ref"], "k3") * (
            statistics["token_rho"] if use_bias_correction_kl else 1.0
        )
    return aggregate(
        loss,
        b["mask"],
        aggregated,
        max_completion_length,
        num_sequences,
        num_tokens,
    )


def their_loss(b, loss_type, level, epsilon, epsilon_high, **settings):
    """TRL's loss. It has no "sequence_token", which equals "sequence" where a
    completion has one advantage; and with a sequence ratio its corrected KL is
    another: the KL is then that of its loss with token ratios and without
    advantages."""
    if level != "token" and settings["beta"] and settings["use_bias_correction_kl"]:
        bounds = (epsilon, epsilon_high)
        without_kl = settings | {"beta": 0.0}
        return their_loss(b, loss_type, level, *bounds, **without_kl) + their_loss(
            b | {"advantages": torch.zeros_like(b["advantages"])},
            loss_type,
            "token",
            *bounds,
            **settings,
        )
    if loss_type == "cispo":
        epsilon_high = 1 + (
            epsilon if epsilon_high is None else epsilon_high
        )  # TRL's is the cap itself
    return trl_loss(
        b["logprobs"],
        b["old"],
        b["ref"] if settings["beta"] else None,
        b["advantages"],
        b["mask"],
        loss_type,
        level.removesuffix("_token"),
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        **settings,
    )


def same(ours, theirs, *leaves, tolerance=1e-10):
    value, gradient = disagreement(ours, theirs, leaves)
    assert value <= tolerance and gradient <= tolerance, (value, gradient)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@given(batches(), settings_of_both)
def test_loss(loss_type, level, b, settings):
    """Value and gradient, for every way to aggregate, all ratios, both KL gradients,
    all bounds, advantages per completion or (token ratio) per token."""
    if level != "token" and b["advantages"].dim() == 2:
        b["advantages"] = b["advantages"][:, 0]
    same(
        our_loss(b, loss_type, level, max_completion_length=7, **settings),
        their_loss(b, loss_type, level, max_completion_length=7, **settings),
        b["logprobs"],
    )


@pytest.mark.parametrize(
    "different",
    [
        {"beta": 0.05},
        {"use_bias_correction_kl": True},
        {"epsilon": 0.1},
        {"epsilon_high": 0.3},
        {"delta": 1.2},
        {"max_completion_length": 8},
    ],
    ids=str,
)
def test_the_oracle_is_no_echo(different):
    "What is set differently on the two sides shows: TRL really reads its settings."
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(6, 5, generator=generator, dtype=torch.float64)
    b = {
        "old": old,
        "logprobs": (
            old + torch.randn(6, 5, generator=generator).double() * 0.5
        ).requires_grad_(),
        "ref": old - 0.3,
        "mask": torch.arange(5) < torch.tensor([[5], [1], [3], [2], [4], [5]]),
        "advantages": torch.randn(6, generator=generator).double(),
    }
    alike = {
        "beta": 0.04,
        "use_bias_correction_kl": False,
        "epsilon": 0.2,
        "epsilon_high": None,
        "delta": None,
        "max_completion_length": 7,
    }
    ours = our_loss(b, "dr_grpo", "token", **alike)
    same(ours, their_loss(b, "dr_grpo", "token", **alike), b["logprobs"])
    assert (
        max(
            disagreement(
                ours,
                their_loss(b, "dr_grpo", "token", **alike | different),
                [b["logprobs"]],
            )
        )
        > 1e-4
    )


def rows(b, index):
    return {name: x[index] for name, x in b.items()}


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "cispo", "sapo"])
@given(batches(), settings_of_both)
def test_micro_batches(loss_type, b, settings):
    """Pieces of equal size add up to the step on both sides (TRL's bnpo is the mean
    of the pieces' token means: another quantity)."""
    N, n = len(b["mask"]), int(b["mask"].sum())
    theirs = sum(
        their_loss(
            rows(b, slice(i, i + 1)),
            loss_type,
            "token",
            max_completion_length=7,
            num_items=n,
            num_pieces=N,
            **settings,
        )
        for i in range(N)
    )
    ours = sum(
        our_loss(
            rows(b, slice(i, i + 1)),
            loss_type,
            "token",
            max_completion_length=7,
            num_sequences=N,
            num_tokens=n,
            **settings,
        )
        for i in range(N)
    )
    same(ours, theirs, b["logprobs"])


def test_bnpo_in_pieces_is_another_quantity():
    """Chapter 43, exercise 1: tokens (0, 0, 0) and (1) in two pieces are 1/2 in TRL,
    1/4 here."""
    x, mask = (
        torch.tensor([[0.0, 0, 0], [1, 0, 0]]).double(),
        torch.tensor([[True] * 3, [True, False, False]]),
    )
    pieces = [
        trl_loss(zero, zero, None, -x[i : i + 1], mask[i : i + 1], "bnpo", num_pieces=2)
        for i, zero in enumerate(torch.zeros(2, 1, 3).double())
    ]
    assert sum(pieces) == 0.5 and aggregate(x, mask, "bnpo") == 0.25


rewards_of_groups = st.lists(
    st.one_of(st.integers(-8, 8).map(lambda x: x / 4), st.just(math.nan)),
    min_size=8,
    max_size=8,
)


@pytest.mark.parametrize(
    "scale, tolerance", [("group", 1e-6), ("batch", 1e-6), ("none", 1e-10)]
)
@given(rewards_of_groups)
def test_advantages(scale, tolerance, rewards):
    """With ties and rows without a score. TRL computes n / (n - 1) of the variance
    in float32; the rest of it is float64 here."""
    rewards = torch.tensor(rewards, dtype=torch.float64)
    scored = [int((~rewards[i : i + 4].isnan()).sum()) for i in (0, 4)]
    ours, theirs = (
        group_advantages(rewards, 4, scale),
        trl_advantages(rewards, 4, scale),
    )
    for g in range(2):
        if scored[g] >= 2 or scale == "group":
            assert (
                disagreement(ours[4 * g : 4 * g + 4], theirs[4 * g : 4 * g + 4])[0]
                <= tolerance
            )


@pytest.mark.parametrize("steps, beta", [(1, 0.04), (3, 0.5)])
def test_the_weights_after_a_step(steps, beta):
    "From the same weights, TRL's trainer and `update` arrive at the same weights."
    sampling = {"num_generations": 8, "temperature": 1.5, "max_completion_length": 8}
    training = {"num_iterations": steps, "beta": beta, "learning_rate": 1e-5}
    config = make_config(device="cpu", **sampling, **training)
    apart, moved = weights_apart(config)
    assert apart <= 1e-6 < 9e-6 < moved


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "dapo"},
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
        {"scale_rewards": "batch", "epsilon_high": 0.28},
        {
            "importance_sampling_level": "sequence",
            "epsilon": 3e-4,
            "epsilon_high": 4e-4,
        },
        {"use_bias_correction_kl": True},
        {"delta": 1.5, "max_grad_norm": 0.1},
        {"temperature": 2.0},
        {"lr_scheduler_type": "constant", "max_completion_length": 3},
    ],
    ids=str,
)
def test_the_weights_after_steps_with_other_settings(options):
    """Two steps on one sampling. They moved, and by nine times what they differ or
    more: AdamW magnifies float32's rounding where a gradient is near 0."""
    config = make_config(
        **{
            "num_generations": 8,
            "num_iterations": 2,
            "beta": 0.5,
            "temperature": 1.5,
            "max_completion_length": 8,
            "learning_rate": 1e-5,
            "device": "cpu",
        }
        | options
    )
    apart, moved = weights_apart(config)
    assert apart <= 2e-6 and moved > 1.9e-5


def test_trl_sees_the_tokens_that_it_was_rewarded_for():
    """The rewards behind TRL's advantages are those of the decoded tokens, with one
    advantage a completion."""
    config = make_config(
        num_generations=4, temperature=1.5, max_completion_length=8, device="cpu"
    )
    with tempfile.TemporaryDirectory() as directory, silence():
        model, tokenizer = load_policy("tiny", "cpu")
        for part in (model, tokenizer):
            part.save_pretrained(directory)
        inputs, sample, _ = trl_steps(
            directory, load_task("add").queries("train", 2, seed=1), config
        )
    texts = [
        tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
        for ids, mask in zip(sample["completion_ids"], sample["completion_mask"])
    ]
    rewards = torch.tensor(near_reward([], texts, [row["answer"] for row in inputs]))
    torch.testing.assert_close(
        group_advantages(rewards, 4), sample["advantages"], rtol=0, atol=1e-5
    )
