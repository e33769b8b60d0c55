"""What must hold for every input: gradients against finite differences, and
properties over random shapes and masks.

Everything in float64. Hypothesis draws the same examples each time (see conftest)."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_nb.engine.models import EngineModels
from grpo_nb.gae import gae, whiten
from grpo_nb.group import advantages as group_box
from grpo_nb.group import SCALES, group_advantages, informative, process_advantages
from grpo_nb.objective import aggregate, policy_loss
from grpo_nb.engine.micro_batch import micro_batches
from grpo_nb.engine.packing import shared_rows
from grpo_nb.policy import model_inputs, token_logprobs
from grpo_nb.reference import kl, kl_in_reward, token_rewards
from grpo_nb.rollout import Rollout
from grpo_nb.update import update
from grpo_nb.value import value_loss
from helpers import (
    dense_steps,
    gradient,
    random_model,
    random_rollout,
    short_config,
)

LOSS_TYPES = [
    {"loss_type": "grpo"},
    {"loss_type": "bnpo"},
    {"loss_type": "dapo"},
    {"loss_type": "dr_grpo", "max_completion_length": 9},
]
OBJECTIVES = [
    {},
    {"epsilon_high": 0.5},
    {"delta": 1.3},
    {"importance_sampling_level": "sequence"},
    {"importance_sampling_level": "sequence_token"},
    {"objective": "cispo"},
    {
        "objective": "cispo",
        "importance_sampling_level": "sequence",
        "epsilon_high": 3.0,
    },
    {"objective": "sapo"},
    {"objective": "sapo", "sapo_temperature_pos": 0.3, "sapo_temperature_neg": 4.0},
]


def same(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@st.composite
def batches(draw, groups=3, G=2):
    """Random [N, T] tensors with a mask that is true up to each row's length:
    logprobs, old and reference logprobs, advantages, values."""
    N, T = groups * G, draw(st.integers(1, 5))
    lengths = torch.tensor(draw(st.lists(st.integers(0, T), min_size=N, max_size=N)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = -normal(N, T).abs()
    return {
        "mask": torch.arange(T) < lengths[:, None],
        "old": old,
        "logprobs": old + normal(N, T, scale=0.4),
        "ref": old + normal(N, T, scale=0.4),
        "advantages": normal(N),
        "values": normal(N, T),
        "rewards": normal(N, T),
        "returns": normal(N, T),
    }


# Finite differences -------------------------------------------------------------------


def far_from(x, *kinks, margin=1e-3):
    "Finite differences are wrong where a bound switches."
    return all((x - kink).abs().min() > margin for kink in kinks)


@pytest.mark.parametrize("how", LOSS_TYPES, ids=lambda how: how["loss_type"])
@pytest.mark.parametrize(
    "options, per_token",
    [
        (options, per_token)
        for options in (*OBJECTIVES[:4], *OBJECTIVES[-2:])
        for per_token in (False, True)
        if not (per_token and "importance_sampling_level" in options)
    ],
    ids=str,
)
def test_slope_of_the_policy_loss(options, per_token, how):
    generator = torch.Generator().manual_seed(3)
    old, x = (
        torch.randn(4, 5, generator=generator).double(),
        torch.randn(4, 5, generator=generator).double() * 0.4,
    )
    mask, advantages = (
        torch.arange(5) < torch.tensor([[5], [3], [1], [0]]),
        torch.randn(4, 5, generator=generator).double(),
    )
    advantages = advantages if per_token else advantages[:, 0]
    assert far_from(
        policy_loss(old + x, old, advantages, mask, **options)[1]["rho"][mask],
        0.8,
        1.2,
        1.3,
        1.5,
    )
    assert torch.autograd.gradcheck(
        lambda logprobs: aggregate(
            policy_loss(logprobs, old, advantages, mask, **options)[0], mask, **how
        ),
        (old + x).requires_grad_(),
    )


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
def test_slope_of_cispo(level):
    """CISPO's weight is cut off from the gradient: its slope is that of sum_t w_t
    log pi_t with the weights held fixed."""
    old, x = (
        torch.zeros(2, 3).double(),
        torch.tensor([[0.3, -0.4, 0.1], [0.9, 0.0, 0.7]]).double(),
    )
    mask, advantages = (
        torch.tensor([[True] * 3, [True, True, False]]),
        torch.tensor([1.5, -0.5]).double(),
    )
    mean = torch.stack([x[0].mean(), x[1, :2].mean()])[:, None].expand(2, 3)
    weight = (x if level == "token" else mean).exp().clamp(max=1.2)
    logprobs = x.clone().requires_grad_()
    policy_loss(
        logprobs,
        old,
        advantages,
        mask,
        objective="cispo",
        importance_sampling_level=level,
    )[0].sum().backward()
    same(logprobs.grad, torch.where(mask, -weight * advantages[:, None], 0.0))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_slope_of_the_kl(estimator):
    x = torch.randn(
        2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    assert torch.autograd.gradcheck(
        lambda a, b: kl(a, b, estimator),
        (x[0].clone().requires_grad_(), x[1].clone().requires_grad_()),
    )


def test_slope_of_the_value_loss():
    generator = torch.Generator().manual_seed(1)
    V, old, R = (torch.randn(4, 5, generator=generator).double() for _ in range(3))
    mask = torch.arange(5) < torch.tensor([[5], [3], [1], [0]])
    free, clipped = V - R, old + (V - old).clamp(-0.2, 0.2) - R
    outside = (V - old).abs() > 0.2
    assert (
        far_from((V - old).abs(), 0.2)
        and outside.any()
        and far_from(free[outside].abs() - clipped[outside].abs(), 0)
    )
    assert torch.autograd.gradcheck(
        lambda values: value_loss(values, old, R, mask), V.requires_grad_()
    )


def test_slope_of_the_log_probs(tokenizer):
    """Backpropagation through a whole model against a central difference along a
    random direction."""
    model = random_model("gpt2")
    rollout = random_rollout(model, tokenizer)
    generator = torch.Generator().manual_seed(0)
    direction = [
        torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for p in model.parameters()
    ]

    def total(h):
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction):
                p.add_(d, alpha=h)
        logprobs, entropy = token_logprobs(model, rollout, 0.8, return_entropy=True)
        return (logprobs * rollout.values).sum() + entropy.sum()

    total(0).backward()
    slope = sum((p.grad * d).sum() for p, d in zip(model.parameters(), direction))
    h = 1e-5
    with torch.no_grad():
        numeric = (total(h) - total(-2 * h)) / (2 * h)
    assert abs(slope - numeric) < 1e-5 * abs(slope)


# Properties ---------------------------------------------------------------------------


def wider(x):
    "Two more columns: junk, of each tensor another, or False in a mask."
    if x.dtype == torch.bool:
        return torch.cat([x, torch.zeros(len(x), 2, dtype=torch.bool)], 1)
    junk = 7 + x.detach().sum() % 3
    return torch.cat([x, junk.expand(len(x), 2)], 1)


@given(batches(), st.sampled_from(LOSS_TYPES), st.sampled_from(OBJECTIVES))
def test_padding_changes_no_loss_and_no_gradient(b, how, options):
    "Bug 14, for every loss and every estimator."
    results = []
    for f in (lambda x: x, wider):
        logprobs, mask = f(b["logprobs"]).requires_grad_(), f(b["mask"])
        loss, statistics = policy_loss(
            logprobs, f(b["old"]), b["advantages"], mask, **options
        )
        total = aggregate(loss + 0.1 * kl(logprobs, f(b["ref"])), mask, **how)
        (slope,) = torch.autograd.grad(total, logprobs)
        assert slope[~mask].abs().sum() == 0
        results.append(
            (
                total,
                slope[:, : b["mask"].shape[1]],
                statistics["clip_low"].sum(),
                statistics["clip_high"].sum(),
            )
        )
    for x, y in zip(*results):
        same(x, y)


@given(batches(), st.floats(0.5, 1), st.floats(0, 1))
def test_padding_changes_nothing_for_ppo(b, gamma, lam):
    "Bug 14: rewards, advantages, returns, whitening and value loss."
    T, results = b["mask"].shape[1], []
    for f in (lambda x: x, wider):
        mask = f(b["mask"])
        rewards = kl_in_reward(
            b["advantages"], f(b["logprobs"]), f(b["ref"]), mask, 0.1
        )
        advantages, returns = gae(rewards, f(b["values"]), mask, gamma, lam)
        results.append(
            [x[:, :T] for x in (rewards, advantages, returns, whiten(advantages, mask))]
            + [value_loss(f(b["values"]), f(b["old"]), returns, mask)]
        )
    for x, y in zip(*results):
        same(x, y)


@given(batches())
def test_kl_in_the_reward_adds_up(b):
    """Bug 18: the rewards of a completion sum to its score less beta times its k1;
    one without tokens gets nothing."""
    rewards = kl_in_reward(b["advantages"], b["logprobs"], b["ref"], b["mask"], 0.3)
    price = torch.where(b["mask"], b["logprobs"] - b["ref"], 0.0).sum(1)
    same(
        rewards.sum(1),
        torch.where(b["mask"].any(1), b["advantages"] - 0.3 * price, 0.0),
    )


@pytest.mark.parametrize(
    "mask", list(itertools.product([False, True], repeat=3)), ids=str
)
def test_gae_takes_the_masks_that_a_rollout_takes(mask):
    "Real tokens first, then padding, no gap; a completion may be empty."
    completion_mask = torch.tensor([mask, [True, True, False]])
    x = torch.ones(2, 3, dtype=torch.float64)
    refusals = 0
    for take in (
        lambda: gae(x, x, completion_mask),
        lambda: Rollout(
            [None],
            x[:1].long(),
            x[:1].bool(),
            x.long(),
            completion_mask,
            ["?"] * 2,
            completion_mask[:, 0],
            2,
        ),
    ):
        try:
            take()
        except ValueError as error:
            assert "mask" in str(error)
            refusals += 1
    assert refusals == (2 if list(mask) != sorted(mask, reverse=True) else 0)


@given(batches(), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_its_double_sum(b, gamma, lam):
    "Bug 19: A_t = sum_l (gamma lambda)^l delta_(t+l), by its definition."
    advantages, returns = gae(b["rewards"], b["values"], b["mask"], gamma, lam)
    for i, n in enumerate(b["mask"].sum(1).tolist()):
        r, V = b["rewards"][i].tolist(), [*b["values"][i, :n].tolist(), 0.0]
        delta = [r[t] + gamma * V[t + 1] - V[t] for t in range(n)]
        definition = torch.tensor(
            [
                sum((gamma * lam) ** (l - t) * delta[l] for l in range(t, n))
                for t in range(n)
            ],
            dtype=torch.float64,
        )
        same(advantages[i, :n], definition)
        same(returns[i, :n], definition + b["values"][i, :n])


@given(batches(), st.sampled_from(LOSS_TYPES), st.sampled_from(OBJECTIVES), st.data())
def test_any_cut_into_micro_batches_adds_up(b, how, options, data):
    """Bug 6: the loss is a sum over rows once the totals of the step are known; also
    for the value loss."""
    assignment = torch.tensor(
        data.draw(st.lists(st.integers(0, 2), min_size=6, max_size=6))
    )
    totals = {"num_sequences": b["mask"].any(1).sum(), "num_tokens": b["mask"].sum()}

    def losses(rows, **totals):
        x = {name: value[rows] for name, value in b.items()}
        loss = aggregate(
            policy_loss(x["logprobs"], x["old"], x["advantages"], x["mask"], **options)[
                0
            ],
            x["mask"],
            **how,
            **totals,
        )
        return torch.stack(
            [
                loss,
                value_loss(
                    x["values"],
                    x["old"],
                    x["returns"],
                    x["mask"],
                    num_tokens=totals.get("num_tokens"),
                ),
            ]
        )

    same(
        sum(losses(assignment == piece, **totals) for piece in range(3)),
        losses(slice(None)),
    )


@given(batches(), st.sampled_from(OBJECTIVES), st.sampled_from(LOSS_TYPES))
def test_no_advantage_no_policy_gradient(b, options, how):
    logprobs = b["logprobs"].requires_grad_()
    loss = aggregate(
        policy_loss(logprobs, b["old"], torch.zeros(6).double(), b["mask"], **options)[
            0
        ],
        b["mask"],
        **how,
    )
    assert loss == 0 and (torch.autograd.grad(loss, logprobs)[0] == 0).all()


@given(batches(), st.sampled_from(OBJECTIVES[:5]))
def test_the_clipped_objective_is_a_lower_bound(b, options):
    """Without a cap on rho it never promises more than the unclipped objective, and
    equals it at rho = 1."""
    loss, statistics = policy_loss(
        b["logprobs"], b["old"], b["advantages"], b["mask"], **options
    )
    unclipped = torch.where(
        b["mask"], statistics["rho"] * b["advantages"][:, None], 0.0
    )
    if "delta" not in options:
        assert (-loss <= unclipped + 1e-12).all()
    at_one, _ = policy_loss(b["old"], b["old"], b["advantages"], b["mask"], **options)
    same(-at_one, torch.where(b["mask"], b["advantages"][:, None], 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_results_have_the_dtype_of_the_input(dtype):
    x, mask = (
        torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(dtype),
        torch.ones(4, 3, dtype=torch.bool),
    )
    loss, statistics = policy_loss(x, x, x[:, 0], mask)
    results = [
        kl(x, x),
        kl_in_reward(x[:, 0], x, x, mask, 0.1),
        *gae(x, x, mask),
        whiten(x, mask),
        group_advantages(x[:, 0], 2),
        loss,
        statistics["rho"],
        value_loss(x, x, x, mask),
        *(aggregate(loss, mask, **how) for how in LOSS_TYPES),
    ]
    assert {result.dtype for result in results} == {dtype}


rewards_of_groups = st.lists(
    st.one_of(st.floats(-100, 100).map(lambda x: round(x, 3)), st.just(math.nan)),
    min_size=8,
    max_size=8,
).map(lambda r: torch.tensor(r, dtype=torch.float64))
GROUP_OPTIONS = [
    {"scale_rewards": s, "baseline": b}
    for s in SCALES
    for b in ("mean", "leave_one_out")
]


@given(rewards_of_groups, st.sampled_from(GROUP_OPTIONS), st.floats(-1000, 1000))
def test_a_bonus_for_all_changes_no_advantage(rewards, options, bonus):
    same(
        group_advantages(rewards + bonus, 4, **options),
        group_advantages(rewards, 4, **options),
        1e-6,
    )


@given(
    rewards_of_groups, st.sampled_from(GROUP_OPTIONS), st.randoms(use_true_random=False)
)
def test_order_does_not_matter(rewards, options, rng):
    "Groups may come in any order, and so may the members of a group."
    groups = [rng.sample(range(4 * g, 4 * g + 4), 4) for g in rng.sample(range(2), 2)]
    order = torch.tensor(sum(groups, []))
    same(
        group_advantages(rewards[order], 4, **options),
        group_advantages(rewards, 4, **options)[order],
        1e-9,
    )


@given(rewards_of_groups, st.sampled_from(list(SCALES)))
def test_advantages_of_a_group(rewards, scale):
    """They sum to 0 over each group; scaled by the group, with unit std; unscored
    rows get 0; leave-one-out is n/(n-1) times the mean baseline."""
    advantages = group_advantages(rewards, 4, scale, eps=0.0)
    others = group_advantages(rewards, 4, scale, baseline="leave_one_out", eps=0.0)
    assert (advantages[rewards.isnan()] == 0).all()
    for g in range(2):
        a, scored = advantages[4 * g : 4 * g + 4], ~rewards[4 * g : 4 * g + 4].isnan()
        n = int(scored.sum())
        if n < 2 or len(set(rewards[4 * g : 4 * g + 4][scored].tolist())) == 1:
            assert (a == 0).all()
            continue
        same(a.sum(), torch.tensor(0.0).double(), 1e-9)
        if scale == "group":
            same(a[scored].std(), torch.tensor(1.0).double(), 1e-9)
        same(others[4 * g : 4 * g + 4], a * n / (n - 1), 1e-9)


@given(
    st.lists(st.floats(-10, 10).map(lambda x: round(x, 2)), min_size=6, max_size=6),
    st.lists(st.integers(1, 5), min_size=6, max_size=6),
)
def test_one_step_at_the_end_is_outcome_supervision(rewards, lengths):
    """Process supervision with one step, at the last token, gives every token the
    advantage of the completion."""
    outcome = group_advantages(torch.tensor(rewards, dtype=torch.float64), 3)
    steps = [[(n - 1, r)] for n, r in zip(lengths, rewards)]
    process = process_advantages(dense_steps(steps, max(lengths)), 3)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    same(process.double(), torch.where(real, outcome[:, None], 0.0), 1e-5)


@pytest.mark.parametrize(
    "order",
    [
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
        [6, 7, 8, 0, 1, 2, 3, 4, 5],
        [1, 0, 2, 4, 5, 3, 8, 7, 6],
        [5, 3, 4, 8, 6, 7, 2, 0, 1],
    ],
    ids=["as it is", "groups", "members", "both"],
)
def test_order_changes_no_gradient(llama, rollout, order):
    """Groups in another order, members of a group in another order: the same
    gradient, loss and metrics."""

    def step(r):
        llama.zero_grad()
        metrics = update(
            EngineModels(llama, None, torch.optim.SGD(llama.parameters(), lr=0.0)),
            r,
            short_config(max_grad_norm=1e9),
            beta=0.1,
        )
        return gradient(llama).clone(), metrics

    rows = torch.tensor(order)
    groups = rows[::3] // 3
    moved = {
        name: x[rows] if torch.is_tensor(x) else [x[i] for i in order]
        for name, x in vars(rollout).items()
        if name not in ("queries", "prompt_ids", "prompt_mask", "num_generations")
        and x is not None
    }
    other = replace(
        rollout,
        queries=[rollout.queries[g] for g in groups],
        prompt_ids=rollout.prompt_ids[groups],
        prompt_mask=rollout.prompt_mask[groups],
        **moved,
    )
    (a, m), (b, n) = step(rollout), step(other)
    same(a, b)
    assert all(abs(m[name] - n[name]) < 1e-12 for name in m)


@given(
    st.lists(st.integers(1, 6), min_size=9, max_size=9),
    st.integers(1, 200),
    st.sampled_from([None, 1, 4, 10**6]),
)
def test_micro_batches_fit(lengths, budget, hidden):
    """Every group is in one piece, and a piece of several groups is within the
    budget, its padding counted, in either layout."""
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    prompts = torch.arange(4) >= torch.tensor([[0], [2], [3]])
    whole = Rollout(
        [None] * 3, prompts.long(), prompts, mask.long(), mask, ["?"] * 9, mask[:, 0], 3
    )
    pieces = micro_batches(whole, budget, hidden)
    assert sorted(sum(pieces, [])) == [0, 1, 2]
    for groups in pieces:
        inputs = (
            shared_rows(whole.select(groups), hidden)[0]
            if hidden
            else model_inputs(whole.select(groups))
        )
        assert len(groups) == 1 or inputs["input_ids"].numel() <= budget


@pytest.mark.parametrize("budget", range(5, 30))
@given(st.lists(st.integers(1, 6), min_size=5, max_size=5))
def test_micro_batches_of_two_processes_fit(budget, lengths):
    "As many pieces in each, every group in one of them, and each share in its budget."
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    prompts = torch.ones(5, 2, dtype=torch.bool)
    rollout = Rollout(
        [None] * 5, prompts.long(), prompts, mask.long(), mask, ["?"] * 5, mask[:, 0], 1
    )
    shares = []
    for rank in (0, 1):
        with pytest.MonkeyPatch.context() as patched:
            module = "grpo_nb.engine.micro_batch"
            patched.setattr(f"{module}.get_rank", lambda: rank)
            patched.setattr(f"{module}.get_world_size", lambda: 2)
            shares.append(micro_batches(rollout, budget))
    assert len(shares[0]) == len(shares[1])
    assert sorted(sum(shares[0] + shares[1], [])) == [0, 1, 2, 3, 4]
    for groups in shares[0] + shares[1]:
        padded = 2 + max((lengths[g] for g in groups), default=0)
        assert len(groups) <= 1 or len(groups) * padded <= budget


def test_select_cuts_whole_groups(rollout):
    """Every field of the chosen groups, in that order; nothing of the others;
    padding trimmed to what is left."""
    part = rollout.select([2, 0])
    assert [query.prompt for query in part.queries] == ["678+9=", "1+2="] and len(
        part
    ) == 6
    for i, j in enumerate([6, 7, 8, 0, 1, 2]):
        n = int(rollout.completion_mask[j].sum())
        assert part.completion_mask[i].sum() == n
        for name in ("completion_ids", "logprobs", "ref_logprobs", "values", "returns"):
            assert getattr(part, name)[i, :n].equal(getattr(rollout, name)[j, :n])
        for name in ("rewards", "advantages", "truncated"):
            assert getattr(part, name)[i] == getattr(rollout, name)[j]
    only = rollout.select([0])
    assert (
        only.prompt_ids.shape[1] == 4
        and only.prompt_mask.all()
        and only.completion_mask.any(0).all()
    )
    first = dense_steps([[(0, float(i))] for i in range(9)], len(rollout.logprobs[0]))
    steps = replace(rollout, step_rewards=first).select([1]).step_rewards
    assert steps[:, 0].tolist() == [3.0, 4.0, 5.0] and steps[:, 1:].isnan().all()
    assert steps.shape == rollout.select([1]).logprobs.shape


def test_steps_on_padding_count_for_nothing(rollout):
    "What stands where a completion has ended is no step: not in a group, not in PPO."
    rollout.rewards = rollout.completion_mask.sum(1).double()
    ends = (rollout.completion_mask.sum(1) - 1).tolist()
    steps = dense_steps(
        [[(end, float(i))] for i, end in enumerate(ends)],
        rollout.completion_mask.shape[1],
    )
    clean = replace(rollout, step_rewards=steps)
    junk = replace(rollout, step_rewards=steps.masked_fill(~rollout.completion_mask, 7))
    assert (~rollout.completion_mask).any()
    for stage in (
        lambda r: group_box(r, short_config()),
        lambda r: informative(r),
        lambda r: token_rewards(r, 0.1),
    ):
        assert stage(junk).equal(stage(clean)) and stage(clean).any()
