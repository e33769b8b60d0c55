"""Equations, and the bugs that real projects shipped: each test names the bug that
it catches.

The truth comes from outside the library: numbers worked by hand, enumeration of a
small vocabulary in float64, the definition as a double sum, a decoder that goes step
by step. Bugs 26 (resume) and 28 (every option runs) are in test_training.py."""

import copy
import itertools
import math
import threading
import warnings
from dataclasses import replace
from functools import partial
from statistics import fmean, stdev
from types import SimpleNamespace

import pytest
import torch
from pydantic.dataclasses import dataclass

from grpo_nb.engine.models import EngineModels, importance_weights
from grpo_nb.algorithm import STEPS
from grpo_nb.models import Models
from grpo_nb.gae import advantages as gae_advantages
from grpo_nb.gae import gae, whiten
from grpo_nb.group import advantages as group_box
from grpo_nb.group import group_advantages, process_advantages
from grpo_nb import objective
from grpo_nb.objective import aggregate, policy_loss
from grpo_nb.policy import as_rollout, eos_token_ids, token_logprobs
from grpo_nb.reference import (
    adapt_beta,
    kl,
    kl_in_reward,
    next_beta,
    reference_logprobs,
    token_rewards,
)
from grpo_nb.engine.judging import RewardModel, combine, judge, names_of, score
from grpo_nb.reward import bradley_terry_loss
from grpo_nb.engine.decoding import sample
from grpo_nb.sampling import draw
from grpo_nb.task import Query
from grpo_nb.run.options import PPOConfig, make_config
from grpo_nb.run.training import rollout_metrics, table
from grpo_nb.engine import packing
from grpo_nb.engine.micro_batch import micro_batches
from grpo_nb.update import batch_loss, update
from grpo_nb.value import ValueModel, value_loss
from helpers import (
    EOS,
    PAD,
    VOCABULARY,
    character_tokenizer,
    dense_steps,
    gradient,
    ids_of,
    padded,
    random_model,
    random_rollout,
    short_config,
    with_logits,
)

DOUBLE = torch.float64
KINDS = [Models, EngineModels]  # the plain verbs, and the engine's


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=DOUBLE),
        torch.as_tensor(b, dtype=DOUBLE),
        rtol=0,
        atol=tolerance,
    )


def step_of(model, rollout, optimizer=None, **options):
    "Metrics and gradient of one `update` that moves nothing."
    model = copy.deepcopy(model)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.0)
    beta = options.pop("in_loss", 0.1)
    metrics = update(
        EngineModels(model, None, optimizer),
        rollout,
        short_config(max_grad_norm=1e9, **options),
        beta=beta,
    )
    return metrics, gradient(model)


# The clipped objective ----------------------------------------------------------------


@pytest.mark.parametrize(
    "A, rho, options, objective, slope",
    [
        (-1, 0.5, {}, -0.8, 0),
        (-1, 1.5, {}, -1.5, -1),
        (1, 1.5, {}, 1.2, 0),
        (1, 0.5, {}, 0.5, 1),
        (-2, 1.0, {}, -2, -2),
        (1, 1.25, {"epsilon_high": 0.28}, 1.25, 1),
        (1, 1.5, {"epsilon_high": 0.28}, 1.28, 0),
        (-1, 0.5, {"epsilon_high": 0.28}, -0.8, 0),
        (-1, 5.0, {"delta": 3.0}, -3, 0),
        (-1, 2.0, {"delta": 3.0}, -2, -1),
        (1, 5.0, {"delta": 3.0}, 1.2, 0),
    ],
)
def test_clip_takes_the_minimum_for_both_signs(A, rho, options, objective, slope):
    """Bug 1: a clip that is inverted for negative advantages. Values and slopes by
    hand, with `epsilon_high` and `delta` too."""
    logprobs = torch.tensor([[math.log(rho)]], dtype=DOUBLE, requires_grad=True)
    loss, statistics = policy_loss(
        logprobs,
        torch.zeros(1, 1, dtype=DOUBLE),
        torch.tensor([float(A)]).double(),
        torch.ones(1, 1, dtype=torch.bool),
        **options,
    )
    loss.sum().backward()
    close(-loss.item(), objective)
    close(-logprobs.grad.item() / rho, slope)  # d objective / d rho
    assert bool(statistics["clip_low"] | statistics["clip_high"]) == (slope == 0)


@pytest.mark.parametrize(
    "A, rho, weight", [(1, 5.0, 1.2), (1, 0.1, 0.1), (-1, 5.0, 1.2), (-1, 1.0, 1.0)]
)
def test_cispo_caps_the_weight_and_keeps_the_gradient(A, rho, weight):
    """CISPO: the gradient is min(rho, 1 + eps) A grad log pi: capped, never gone,
    and the cap has no gradient itself."""
    logprobs = torch.tensor([[math.log(rho)]], dtype=DOUBLE, requires_grad=True)
    policy_loss(
        logprobs,
        torch.zeros(1, 1, dtype=DOUBLE),
        torch.tensor([A]).double(),
        torch.ones(1, 1, dtype=torch.bool),
        objective="cispo",
    )[0].sum().backward()
    close(logprobs.grad.item(), -weight * A)


SAPO = {  # x = tau (rho - 1): 2 (1 + tanh(x / 2)) and its slope, from a table of tanh
    0.0: (2.0, 1.0),
    0.5: (2 * (1 + 0.24491866240370913), 0.9400148488064311),
    1.0: (2 * (1 + 0.46211715726000976), 0.7864477329659274),
}


@pytest.mark.parametrize("A, pos, neg", [(3.0, 2.0, 7.0), (-3.0, 7.0, 1.6)])
@pytest.mark.parametrize("x", [-1.0, -0.5, 0.0, 0.5, 1.0])
def test_sapo_fades_on_both_sides(A, pos, neg, x):
    """The gain is 2 (1 + tanh(x / 2)) A / tau, x = tau (rho - 1), tau by the sign of
    A; its slope by rho is A (1 - tanh^2(x / 2)), at rho = 1 that of PPO. No token is
    ever clipped."""
    tau = pos if A > 0 else neg
    rho = 1 + x / tau
    logprobs = torch.tensor([[math.log(rho)]], dtype=DOUBLE, requires_grad=True)
    loss, statistics = policy_loss(
        logprobs,
        torch.zeros(1, 1, dtype=DOUBLE),
        torch.tensor([A], dtype=DOUBLE),
        torch.ones(1, 1, dtype=torch.bool),
        objective="sapo",
        sapo_temperature_pos=pos,
        sapo_temperature_neg=neg,
    )
    loss.sum().backward()
    gain, slope = SAPO[abs(x)]
    gain = gain if x >= 0 else 4 - gain
    close(-loss.item(), gain * A / tau)
    close(-logprobs.grad.item() / rho, slope * A)
    assert not (statistics["clip_low"] | statistics["clip_high"]).any()


def test_the_temperatures_of_sapo_are_those_of_the_paper():
    "1 where A > 0, 1.05 elsewhere, in the precision of the log-probs."
    logprobs = torch.zeros(2, 1, dtype=DOUBLE)
    loss, _ = policy_loss(
        logprobs,
        logprobs,
        torch.tensor([1.0, -1.0], dtype=DOUBLE),
        torch.ones(2, 1, dtype=torch.bool),
        objective="sapo",
    )
    close(loss, [[-2.0], [2 / 1.05]], 1e-15)


def test_the_update_hands_over_the_temperatures(llama, rollout):
    "Each moves the gradient: they are options of the run."
    gradients = [
        step_of(llama, rollout, objective="sapo", **temperature)[1]
        for temperature in (
            {},
            {"sapo_temperature_pos": 3.0},
            {"sapo_temperature_neg": 3.0},
        )
    ]
    for a, b in itertools.combinations(gradients, 2):
        assert (a - b).abs().max() > 1e-4


@pytest.mark.parametrize("A", [2.0, -2.0])
@pytest.mark.parametrize(
    "objective, delta, rho, counted",
    [
        ("cispo", None, 0.1, (False, False)),
        ("cispo", None, 1.2, (False, False)),
        ("cispo", None, 1.3, (False, True)),  # capped, whatever the sign of A
        ("cispo", 1.1, 1.15, (False, False)),  # delta belongs to "clip"
        ("sapo", None, 0.1, (False, False)),
        ("sapo", None, 5.0, (False, False)),
        ("clip", None, 1.3, (False, "A > 0")),
        ("clip", 1.5, 1.6, (False, True)),
        ("clip", 1.5, 1.4, (False, "A > 0")),
        ("clip", None, 0.7, ("A < 0", False)),
    ],
)
def test_clip_statistics(objective, delta, rho, counted, A):
    "A token is counted where a bound took its gradient away, or capped its weight."
    _, statistics = policy_loss(
        torch.tensor([[math.log(rho)]], dtype=DOUBLE),
        torch.zeros(1, 1, dtype=DOUBLE),
        torch.tensor([A], dtype=DOUBLE),
        torch.ones(1, 1, dtype=torch.bool),
        objective=objective,
        delta=delta,
    )
    cases = {"A > 0": A > 0, "A < 0": A < 0, True: True, False: False}
    assert tuple(bool(statistics[name]) for name in ("clip_low", "clip_high")) == tuple(
        cases[x] for x in counted
    )


def test_an_entry_of_ones_own(monkeypatch):
    "A function put into a table is used by its name, and named among what is allowed."

    def reinforce(rho, advantages, logprobs, **others):
        nothing = torch.zeros_like(rho, dtype=torch.bool)
        return -advantages * logprobs, nothing, nothing

    def summed(loss, mask, num_sequences, num_tokens, max_completion_length):
        return loss.sum()

    def square(log_rho, mask):
        return (2 * log_rho).exp()

    monkeypatch.setitem(objective.OBJECTIVES, "reinforce", reinforce)
    monkeypatch.setitem(objective.AGGREGATES, "sum", summed)
    monkeypatch.setitem(objective.LEVELS, "square", square)
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, torch.nan]], dtype=DOUBLE)
    mask = torch.tensor([[True, True], [True, False]])
    arguments = (logprobs, logprobs - 0.5, torch.tensor([1.0, -1.0]).double(), mask)
    loss, statistics = policy_loss(
        *arguments, importance_sampling_level="square", objective="reinforce"
    )
    assert loss.tolist() == [[1, 2], [-3, 0]]
    assert aggregate(loss, mask, "sum") == 0
    assert statistics["rho"][mask].tolist() == pytest.approx([math.e] * 3)
    with pytest.raises(ValueError, match='"sapo" or "reinforce", got .x.'):
        policy_loss(*arguments, objective="x")
    with pytest.raises(ValueError, match='be "grpo", .* or "sum", got .x.'):
        aggregate(loss, mask, "x")
    with pytest.raises(ValueError, match='"sequence_token" or "square", got'):
        policy_loss(*arguments, importance_sampling_level="x")


# Far away -----------------------------------------------------------------------------

FAR = [-3e38, -1e4, -100.0, -20.0, -1.0, 0.0, 1.0, 19.9, 20.0, 20.1, 89.0, 100.0, 1e4]


def far_loss(log_rho, A, dtype, **options):
    "Loss, gradient in log pi and ratio of one token."
    logprobs = torch.tensor([[log_rho]], dtype=dtype, requires_grad=True)
    loss, statistics = policy_loss(
        logprobs,
        torch.zeros(1, 1, dtype=dtype),
        torch.tensor([A], dtype=dtype),
        torch.ones(1, 1, dtype=torch.bool),
        **options,
    )
    loss.sum().backward()
    return loss.item(), logprobs.grad.item(), statistics["rho"].item()


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_gspo_on_fresh_samples_is_grpo(loss_type):
    """With one advantage an answer and rho = 1 the gradient of a sequence's ratio,
    clipped at 3e-4, is that of the tokens' ratios, by the log-probs of all tokens."""
    g = torch.Generator().manual_seed(0)
    old = torch.randn(6, 7, dtype=torch.float64, generator=g)
    A = torch.randn(6, dtype=torch.float64, generator=g)
    mask = torch.arange(7) < torch.tensor([[7], [1], [3], [5], [2], [6]])
    slopes = []
    for level, bounds in [("token", (0.2, 0.2)), ("sequence", (3e-4, 4e-4))]:
        logprobs = old.clone().requires_grad_()
        loss, _ = policy_loss(
            logprobs, old, A, mask, *bounds, importance_sampling_level=level
        )
        aggregate(loss, mask, loss_type, 9).backward()
        slopes.append(logprobs.grad)
    assert slopes[0].abs().max() > 0.01
    assert torch.allclose(*slopes, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, DOUBLE], ids=str)
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
@pytest.mark.parametrize("log_rho", FAR)
def test_the_clipped_loss_far_away(log_rho, level, dtype):
    """Exact, in value and gradient, for |log rho| <= 20, against Python's own floats;
    beyond, finite. An advantage of 0 is no loss at all."""
    rounding = 8 * torch.finfo(dtype).eps
    for A, delta in [(1.0, None), (-1.0, None), (-1.0, 3.0), (0.0, None), (0.0, 3.0)]:
        options = {"importance_sampling_level": level, "delta": delta}
        loss, slope, rho = far_loss(log_rho, A, dtype, **options)
        assert all(map(math.isfinite, (loss, slope, rho)))
        if A == 0:
            assert loss == slope == 0
        if abs(log_rho) > 20:
            continue
        exact = math.exp(torch.tensor(log_rho, dtype=dtype).item())
        bounded = min(exact, delta or math.inf)
        objective = min(bounded * A, min(max(exact, 0.8), 1.2) * A)
        free = A * exact if objective == bounded * A and bounded == exact else 0.0
        assert math.isclose(rho, exact, rel_tol=rounding)
        assert math.isclose(-loss, objective, rel_tol=rounding, abs_tol=rounding)
        assert math.isclose(-slope, free, rel_tol=rounding)


@pytest.mark.parametrize("log_rho", FAR)
def test_cispo_far_away(log_rho):
    "The weight is capped as ever, however far away; the gradient lives."
    for A in (1.0, -1.0, 0.0):
        loss, slope, _ = far_loss(log_rho, A, torch.float32, objective="cispo")
        weight = min(math.exp(min(log_rho, 1)), 1.2)
        close(-slope, weight * A, 1e-6)
        close(-loss, weight * A * log_rho, 1e-6 * max(1, abs(log_rho)))


@pytest.mark.parametrize("log_rho", FAR)
def test_sapo_far_away(log_rho):
    "Between 0 and 4 / tau, and without a gradient at the ends, however far away."
    for A, tau in ((1.0, 1.0), (-1.0, 1.05), (0.0, 1.05)):
        loss, slope, _ = far_loss(log_rho, A, torch.float32, objective="sapo")
        rho = math.exp(min(log_rho, 20))
        fading = math.exp(-abs(tau * (rho - 1)))  # sigma(1 - sigma) without overflow
        larger = 1 / (1 + fading)
        gate = larger if rho > 1 else 1 - larger
        close(-loss, 4 / tau * gate * A, 1e-6)
        close(-slope, 4 * larger * (1 - larger) * A * rho, 1e-5)


@pytest.mark.parametrize("d", FAR)
def test_k3_far_away(d):
    "The KL in the loss: exact for d <= 20, finite beyond; with rho, too."
    logprobs = torch.tensor([-d], requires_grad=True)
    k3 = kl(logprobs, torch.zeros(1), "k3")
    (slope,) = torch.autograd.grad(k3.sum(), logprobs)
    assert k3.isfinite().all() and slope.isfinite().all() and k3 >= 0
    assert d * slope <= 0  # towards the reference, or nowhere
    if d <= 20:
        exact = math.expm1(torch.tensor(d).item())
        assert math.isclose(k3.item(), exact - d, rel_tol=1e-6, abs_tol=1e-9)
        assert math.isclose(slope.item(), -exact, rel_tol=1e-6)


@pytest.mark.parametrize("scale", [1e18, 1e30, 1e38])
def test_rewards_near_the_limit_of_float32(scale):
    """Standardised rewards do not depend on their unit: GRPO's, those of steps, and
    whitening; GAE's results are in that unit."""
    small = torch.tensor([3.0, -3.0, 1.0, 0.0, 3.0, 3.0, 2.0, -1.0])
    for options in (
        {},
        {"scale_rewards": "batch"},
        {"scale_rewards": "batch_centred"},
        {"baseline": "leave_one_out"},
    ):
        a, b = (
            group_advantages(r, 4, **options, eps=0.0) for r in (small, scale * small)
        )
        assert a.abs().max() > 1 and b.isfinite().all()
        close(a, b, 1e-6)
    a, b = (
        process_advantages(steps[:, None], 4, eps=0.0)
        for steps in (small, scale * small)
    )
    close(a, b, 1e-6)
    table, mask = small.view(2, 4), torch.ones(2, 4, dtype=torch.bool)
    close(whiten(table, mask), whiten(scale * table, mask), 1e-5)
    ends = torch.tensor([[0.0, 0, 0, 3], [0.0, 0, 0, -3]])
    for x, y in zip(gae(ends, 0 * ends, mask), gae(scale * ends, 0 * ends, mask)):
        close(x, y / scale, 1e-6)


def test_a_large_return_has_its_gradient():
    "1e18 squared is still a float32; what is not is refused (test_bad_input.py)."
    values = torch.zeros(1, 2, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    value_loss(
        values, torch.zeros(1, 2), torch.tensor([[1e18, -1e18]]), mask
    ).backward()
    close(values.grad / 1e17, [[-5.0, 5.0]], 1e-6)


# The KL -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_policies():
    "Logits of pi (with gradient) and log pi_ref over a vocabulary of 7."
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=generator, dtype=DOUBLE).requires_grad_()
    return logits, torch.randn(7, generator=generator, dtype=DOUBLE).log_softmax(0)


def divergence(p, q):
    return (p.exp() * (p - q)).sum()


def test_kl_estimators_have_the_right_expectation(two_policies):
    """Bug 2: a reversed KL. Under pi, k1 and k3 average to KL(pi || ref); k2 does
    not (it is biased), k3 is never negative."""
    logits, ref = two_policies
    logprobs = logits.log_softmax(0).detach()
    for estimator in ("k1", "k3"):
        close(
            (logprobs.exp() * kl(logprobs, ref, estimator)).sum(),
            divergence(logprobs, ref),
        )
    assert (
        abs(
            (logprobs.exp() * kl(logprobs, ref, "k2")).sum() - divergence(logprobs, ref)
        )
        > 1e-2
    )
    assert (
        abs(divergence(logprobs, ref) - divergence(ref, logprobs)) > 1e-2
    )  # the direction matters here
    assert (
        kl(logprobs, ref, "k3").min() >= 0
        and kl(logprobs, logprobs, "k3").abs().max() == 0
    )
    close(
        kl(torch.tensor(math.log(0.2)), torch.tensor(math.log(0.4)), "k3"),
        2 - math.log(2) - 1,
        1e-6,
    )  # by hand: d = log 2


@pytest.mark.parametrize(
    "estimator, weighted, truth",
    [
        ("k1", False, "zero"),
        ("k2", False, "forward"),
        ("k3", False, "backward"),
        ("k3", True, "forward"),
    ],
)
def test_kl_gradients_differ(two_policies, estimator, weighted, truth):
    """Bug 3: E grad k1 = 0, E grad k2 = grad KL(pi || ref), E grad k3 = grad KL(ref
    || pi), E grad rho k3 = grad KL(pi || ref)."""
    logits, ref = two_policies
    logprobs = logits.log_softmax(0)
    rho = (logprobs - logprobs.detach()).exp() if weighted else 1.0
    expected = (logprobs.detach().exp() * rho * kl(logprobs, ref, estimator)).sum()
    target = {
        "zero": 0.0 * logits.sum(),
        "forward": divergence(logprobs, ref),
        "backward": divergence(ref, logprobs),
    }[truth]
    close(
        *(
            torch.autograd.grad(x, logits, retain_graph=True)[0]
            for x in (expected, target)
        )
    )


@pytest.mark.parametrize(
    "corrected, direction", [(False, "KL(ref || pi)"), (True, "KL(pi || ref)")]
)
def test_kl_in_the_loss_of_grpo(tokenizer, corrected, direction):
    """Bug 3, end to end: which divergence `update` descends, by enumerating every
    token that the model can say."""
    policy, reference, V = (
        random_model("gpt2"),
        random_model("gpt2", seed=1),
        len(VOCABULARY),
    )
    rollout = as_rollout(tokenizer, [Query("1+2=")], [""] * V)
    rollout = replace(
        rollout,
        completion_ids=torch.arange(V)[:, None],
        advantages=torch.zeros(V, dtype=DOUBLE),
    )
    rollout.logprobs, rollout.ref_logprobs = (
        token_logprobs(policy, rollout).detach(),
        reference_logprobs(reference, rollout),
    )
    config = short_config(use_bias_correction_kl=corrected)

    def terms(i):
        row = replace(
            rollout,
            num_generations=1,
            **{
                name: getattr(rollout, name)[i : i + 1]
                for name in (
                    "completion_ids",
                    "completion_mask",
                    "completions",
                    "truncated",
                    "logprobs",
                    "ref_logprobs",
                    "advantages",
                )
            },
        )
        return batch_loss(
            EngineModels(policy, None),
            row,
            config,
            0.1,
            {"num_sequences": torch.tensor(1), "num_tokens": torch.tensor(1)},
        )[0]

    expected = sum(
        rollout.logprobs[i].exp().detach().squeeze() * terms(i) for i in range(V)
    )
    logprobs, ref = (
        token_logprobs(policy, rollout).squeeze(1),
        rollout.ref_logprobs.squeeze(1),
    )
    target = 0.1 * (
        divergence(logprobs, ref) if corrected else divergence(ref, logprobs)
    )
    for a, b in zip(
        *(
            torch.autograd.grad(x, tuple(policy.parameters()), retain_graph=True)
            for x in (expected, target)
        )
    ):
        close(a, b, 1e-11)


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
def test_the_corrected_kl_takes_the_ratio_of_the_token(tokenizer, level):
    """E grad (rho k3) = grad KL(pi || ref) at each token, also where the policy loss
    has a sequence's ratio: every completion of two tokens, enumerated.

    The truth is the KL of the exact distributions after each prefix, whose
    probability is held fixed, as it is in a loss."""
    V, totals = 6, {"num_sequences": torch.tensor(1), "num_tokens": torch.tensor(2)}
    policy, reference = (
        random_model("gpt2", vocabulary=V, seed=seed) for seed in (0, 1)
    )
    rows = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    rollout = as_rollout(tokenizer, [Query("12")], ["1"] * V**2)
    rollout = replace(
        rollout,
        prompt_ids=rollout.prompt_ids.clamp(max=V - 1),
        completion_ids=rows,
        completion_mask=torch.ones(V**2, 2, dtype=torch.bool),
        advantages=torch.zeros(V**2, dtype=DOUBLE),
    )
    rollout.logprobs = token_logprobs(policy, rollout).detach()
    rollout.ref_logprobs = reference_logprobs(reference, rollout)
    probability = rollout.logprobs.sum(1).exp()
    close(probability.sum(), 1.0)
    config = short_config(use_bias_correction_kl=True, importance_sampling_level=level)

    fields = (
        "completion_ids",
        "completion_mask",
        "completions",
        "truncated",
        "logprobs",
        "ref_logprobs",
        "advantages",
    )

    def terms(i):
        row = {name: getattr(rollout, name)[i : i + 1] for name in fields}
        one = replace(rollout, num_generations=1, **row)
        return batch_loss(EngineModels(policy, None), one, config, 1.0, totals)[0]

    expected = sum(probability[i] * terms(i) for i in range(V**2))
    prompt = rollout.prompt_ids[:, rollout.prompt_mask[0]]
    prefixes = [(prompt, 1.0)] + [
        (
            torch.cat([prompt, rows[V * i, :1][None]], 1),
            rollout.logprobs[V * i, 0].exp(),
        )
        for i in range(V)
    ]
    truth = 0.0
    for ids, weight in prefixes:
        log_pi, log_ref = (
            m.eval()(ids).logits[0, -1].log_softmax(0) for m in (policy, reference)
        )
        truth = truth + weight * divergence(log_pi, log_ref.detach()) / 2
    ours, exact = (
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(x, tuple(policy.parameters()))]
        )
        for x in (expected, truth)
    )
    assert exact.norm() > 0.1
    close(ours, exact, 1e-11)


@pytest.mark.parametrize("objective", ["clip", "cispo", "sapo"])
def test_the_policy_gradient_is_the_gradient_of_the_expected_reward(objective):
    """The whole way from logits to loss, against the exact gradient: every
    completion of up to two tokens, enumerated."""
    V, tokenizer = 7, character_tokenizer()
    policy = random_model("gpt2", vocabulary=V)
    rows = [(EOS,)] + [(a, b) for a in range(V) if a != EOS for b in range(V)]
    rewards = torch.randn(
        len(rows), generator=torch.Generator().manual_seed(0), dtype=DOUBLE
    )
    mask = torch.tensor([[True, len(row) == 2] for row in rows])
    rollout = as_rollout(tokenizer, [Query("1023")], [""] * len(rows))
    rollout = replace(
        rollout,
        completion_ids=torch.tensor([(*row, PAD)[:2] for row in rows]),
        completion_mask=mask,
        advantages=rewards,
    )
    rollout.logprobs = token_logprobs(policy, rollout).detach()
    probability = rollout.logprobs.sum(1).exp()
    close(probability.sum(), 1.0)
    loss, _ = policy_loss(
        token_logprobs(policy, rollout),
        rollout.logprobs,
        rewards,
        mask,
        objective=objective,
    )
    expected_reward = (token_logprobs(policy, rollout).sum(1).exp() * rewards).sum()
    for a, b in zip(
        *(
            torch.autograd.grad(x, tuple(policy.parameters()), retain_graph=True)
            for x in ((probability * loss.sum(1)).sum(), -expected_reward)
        )
    ):
        close(a, b, 1e-11)


# Aggregation --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how, value",
    [
        ({"loss_type": "grpo"}, 0.0),
        ({"loss_type": "bnpo"}, 0.6),
        ({"loss_type": "dapo"}, 0.6),
        ({"loss_type": "dr_grpo", "max_completion_length": 10}, 0.3),
    ],
)
@pytest.mark.parametrize("columns", [8, 12])
def test_aggregation(how, value, columns):
    """Bugs 4, 5: lengths (2, 8), A = (1, -1), rho = 1; dr_grpo divides by a
    constant, not by the longest completion (or the padding)."""
    mask = torch.arange(columns) < torch.tensor([[2], [8]])
    zeros = torch.zeros(2, columns, dtype=DOUBLE)
    loss, _ = policy_loss(zeros, zeros, torch.tensor([1.0, -1.0]).double(), mask)
    close(aggregate(loss, mask, **how), value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "dapo"},
        {"loss_type": "bnpo"},
        {"loss_type": "dr_grpo"},
        {"importance_sampling_level": "sequence"},
        {"importance_sampling_level": "sequence_token"},
        {"objective": "cispo"},
        {"objective": "sapo"},
        {"entropy_coef": 0.1},
        {"use_bias_correction_kl": True},
        {"mask_truncated_completions": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "grpo",
)
def test_gradient_and_metrics_do_not_depend_on_the_cut(llama, rollout, options):
    """Bugs 6, 27: the same gradient to 1e-12 and the same metrics, in one piece, in
    two, or one group at a time."""
    rollout = replace(
        rollout, truncated=torch.arange(9) % 4 == 1, scored=torch.arange(9) % 5 != 3
    )
    pieces = {
        budget: len(micro_batches(rollout, budget, 10**6)) for budget in (10_000, 50, 1)
    }
    assert list(pieces.values()) == [1, 2, 3]
    (metrics, whole), *others = (
        step_of(llama, rollout, max_tokens_per_micro_batch=budget, **options)
        for budget in pieces
    )
    assert whole.abs().max() > 1e-3
    for m, g in others:
        close(g, whole)
        close([m[name] for name in metrics], list(metrics.values()))


def test_gradient_does_not_depend_on_the_number_of_processes(llama, rollout):
    "Bug 6: ranks that know the totals of the step sum to the gradient of the step."
    config, mask = short_config(), rollout.completion_mask
    totals = {"num_sequences": mask.any(1).sum(), "num_tokens": mask.sum()}
    for ranks in ([[0], [1, 2]], [[2], [0], [1]]):
        parts = [
            torch.autograd.grad(
                batch_loss(
                    EngineModels(llama, None),
                    rollout.select(groups),
                    config,
                    0.1,
                    totals,
                )[0],
                tuple(llama.parameters()),
            )
            for groups in ranks
        ]
        close(
            torch.cat([sum(parameter).flatten() for parameter in zip(*parts)]),
            step_of(llama, rollout)[1],
        )


def test_value_gradient_does_not_depend_on_the_cut(llama, rollout):
    "Bug 6 for the value model: value loss and its gradient in pieces."
    rollout = replace(rollout, advantages=rollout.values)
    value = ValueModel(llama)
    torch.nn.init.normal_(value.head.weight, generator=torch.Generator().manual_seed(0))

    def step(budget):
        model, V = copy.deepcopy(llama), copy.deepcopy(value)
        config = short_config(
            algorithm="ppo", max_grad_norm=1e9, max_tokens_per_micro_batch=budget
        )
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.0) for m in (model, V)]
        return update(
            EngineModels(
                model, None, optimizers[0], value=V, value_optimizer=optimizers[1]
            ),
            rollout,
            config,
        )["value_loss"], gradient(V)

    (loss, whole), (cut_loss, cut) = step(10_000), step(1)
    assert whole.abs().max() > 1e-3
    close(cut, whole)
    close(cut_loss, loss)


def test_weights_do_not_depend_on_the_cut(llama, rollout):
    """Bug 6: one step a rollout, on the whole gradient and nothing of the step
    before, clipped once: the same weights from one piece and from three."""
    weights = []
    for budget in (10_000, 1):
        model = copy.deepcopy(llama)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(
                parameter, 1.0 / budget
            )  # left by another step
        update(
            EngineModels(model, None, torch.optim.SGD(model.parameters(), lr=0.1)),
            rollout,
            short_config(max_grad_norm=0.01, max_tokens_per_micro_batch=budget),
            beta=0.1,
        )
        weights.append(
            torch.cat(
                [parameter.detach().flatten() for parameter in model.parameters()]
            )
        )
    before = torch.cat(
        [parameter.detach().flatten() for parameter in llama.parameters()]
    )
    close((weights[0] - before).norm(), 0.1 * 0.01, 1e-6)
    close(*weights)


# Groups -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale_rewards": "none"},
        {"scale_rewards": "batch"},
        {"scale_rewards": "batch_centred"},
        {"baseline": "leave_one_out"},
        {"eps": 0.0},
    ],
    ids=str,
)
def test_equal_rewards_teach_nothing(dtype, options):
    """Bug 7: the mean of twelve 0.7 is not 0.7; the advantages must be exactly 0 all
    the same, and the other group's must not."""
    rewards = torch.tensor([0.7] * 12 + [0.0, 1.0] * 6, dtype=dtype)
    advantages = group_advantages(rewards, 12, **options)
    assert (
        (advantages[:12] == 0).all()
        and (advantages[12:] != 0).all()
        and advantages.dtype == dtype
    )


@pytest.mark.parametrize(
    "large, small, dtype", [(1000, 0.001, torch.float32), (1e8, 0.25, DOUBLE)]
)
def test_small_differences_of_large_rewards(large, small, dtype):
    """Bug 8: variance in float32 loses the digits of 1000 + (0, .001, .002, 0); in
    one pass (mean of squares less square of mean) also in float64."""
    rewards = large + torch.tensor([0, small, 2 * small, 0], dtype=dtype)
    r = [float(x) for x in rewards]
    mean = math.fsum(r) / 4
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in r) / 3)
    close(
        group_advantages(rewards, 4, eps=0.0).double(),
        [(x - mean) / std for x in r],
        1e-3,
    )
    close(
        whiten(rewards[None], torch.ones(1, 4, dtype=torch.bool))[0].double(),
        [(x - mean) / std for x in r],
        1e-3,
    )


def test_a_group_of_one_is_refused():
    "Bug 9: nothing to be compared with."
    with pytest.raises(ValueError, match="num_generations must be at least 2.*got 1"):
        group_advantages(torch.ones(3), 1)
    with pytest.raises(
        ValueError, match="num_generations = 1: .*greater than or equal to 2"
    ):
        short_config(num_generations=1)


@pytest.mark.parametrize(
    "rewards, options, advantages",
    [
        ((1, 0, 0, 0), {"eps": 0.0}, (1.5, -0.5, -0.5, -0.5)),  # ddof 1: std is 1/2
        ((1, 0, 0, 0), {"scale_rewards": "none"}, (0.75, -0.25, -0.25, -0.25)),
        (
            (1, 0, 0, 0),
            {"scale_rewards": "none", "baseline": "leave_one_out"},
            (1, -1 / 3, -1 / 3, -1 / 3),
        ),
        ((1, 0, 0, 0), {}, (0.75 / 0.5001, *[-0.25 / 0.5001] * 3)),
        (
            (1, 0, 3, 3),
            {"num_generations": 2, "eps": 0.0, "scale_rewards": "batch"},
            (0.5 / 1.5, -0.5 / 1.5, 0, 0),
        ),  # std of the batch: 1.5
        (
            (0, 2, 4, math.nan),
            {"num_generations": 2, "eps": 0.0, "scale_rewards": "batch"},
            (-1 / 2, 1 / 2, 0, 0),
        ),  # 0, 2, 4: std 2
        (
            (11, 9, 3, -3),
            {"num_generations": 2, "eps": 0.0, "scale_rewards": "batch_centred"},
            [x / math.sqrt(20 / 3) for x in (1, -1, 3, -3)],
        ),  # 1, -1, 3, -3: the squares add up to 20
        (
            (5, math.nan, 11, 9),
            {"num_generations": 2, "eps": 0.0, "scale_rewards": "batch_centred"},
            (0, 0, 1, -1),
        ),  # one that has nobody to be compared with is at distance 0: std 1
        (
            (0, 0, 4, 4, 1, 3),
            {"num_generations": 2, "eps": 0.5, "scale_rewards": "batch_centred"},
            (0, 0, 0, 0, -1 / (math.sqrt(0.4) + 0.5), 1 / (math.sqrt(0.4) + 0.5)),
        ),  # groups without variance count: 2 / 5
    ],
)
def test_group_advantages(rewards, options, advantages):
    """Bugs 10, 22, 25: ddof 1, RLOO, no scaling, and the standard deviation of the
    batch, of which a row without a score is no part."""
    close(
        group_advantages(
            torch.tensor(rewards, dtype=DOUBLE), **{"num_generations": 4} | options
        ),
        advantages,
    )


def test_the_centred_batch_is_whitened_whatever_the_queries():
    """Rewards of a query may be moved by any amount, all by one factor: mean 0 and
    standard deviation 1 over the step, where "batch" depends on the queries."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(5, 4, generator=generator, dtype=DOUBLE)
    easier = rewards + torch.tensor([[0.0], [9], [-4], [100], [2]], dtype=DOUBLE)
    options = {"num_generations": 4, "eps": 0.0, "scale_rewards": "batch_centred"}
    advantages = group_advantages(rewards.flatten(), **options)
    close(fmean(advantages.tolist()), 0)
    close(stdev(advantages.tolist()), 1)
    close(group_advantages(3 * easier.flatten(), **options), advantages)
    options["scale_rewards"] = "batch"
    a, b = (group_advantages(r.flatten(), **options) for r in (rewards, easier))
    assert (a / b).min() > 10


def test_process_advantages():
    """Bug 25: all step rewards of a group are normalised together, and each token
    gets those of the steps that end at or after it."""
    steps = [[(1, 0.2), (3, 0.8)], [(2, 0.5)], []]
    result = process_advantages(dense_steps(steps, 5), 3, eps=0.0)
    z = 0.3 / 0.3  # the step rewards .2, .5, .8 have mean .5 and std .3
    close(result, [[-z + z, -z + z, z, z, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]], 1e-6)
    others = [[(0, 7.0)], [(0, 8.0)], [(0, 9.0)]]
    three = process_advantages(
        dense_steps([[], [], [], *steps, *others], 5), 3, eps=0.0
    )
    close(
        three,
        [
            *([x, 0, 0, 0, 0] for x in (0, 0, 0)),
            *result.tolist(),
            *([x, 0, 0, 0, 0] for x in (-1, 0, 1)),
        ],
        1e-6,
    )  # other groups change nothing
    rollout = SimpleNamespace(
        step_rewards=torch.tensor([[0.2, 0.8], [0.5, torch.nan]], dtype=DOUBLE),
        num_generations=2,
        rewards=torch.zeros(2),
        completion_mask=torch.tensor([[True, True], [True, False]]),
    )
    close(group_box(rollout, short_config()).double(), [[0, 1], [0, 0]], 1e-3)


def test_sequence_ratio():
    """Bug 25: GSPO's ratio is the exponential of the mean log-ratio, the same for
    every token of the sequence."""
    log_rho, mask = (
        torch.tensor([[0.3, 0.1, -0.1, 9.0]], dtype=DOUBLE, requires_grad=True),
        torch.tensor([[True, True, True, False]]),
    )
    loss, statistics = policy_loss(
        log_rho,
        torch.zeros_like(log_rho),
        torch.tensor([2.0]).double(),
        mask,
        importance_sampling_level="sequence",
    )
    close(statistics["rho"][mask].detach(), [math.exp(0.1)] * 3)
    close(math.exp(0.1), 1.10517, 1e-5)
    aggregate(loss, mask).backward()
    close(log_rho.grad, [[-2 * math.exp(0.1) / 3] * 3 + [0]])  # d(-2 s) / d log rho_t


def slopes(A, level, log_rho=(0.15, 0.0, -0.1, 0.15), mask=None, **options):
    "The gradient of the summed loss of one completion in its log-probs, and the loss."
    logprobs = torch.tensor([log_rho], dtype=DOUBLE, requires_grad=True)
    loss, _ = policy_loss(
        logprobs,
        torch.zeros_like(logprobs),
        torch.tensor([A], dtype=DOUBLE),
        torch.ones_like(logprobs).bool() if mask is None else torch.tensor([mask]),
        importance_sampling_level=level,
        **options,
    )
    return torch.autograd.grad(loss.sum(), logprobs)[0][0], loss[0].detach()


def test_each_token_has_its_own_advantage_in_gspo_token():
    """A = (3, -1, -1, -1): the sequence's ratio s, and -s A_t as gradient; the one
    gradient of a sequence would be the mean, 0."""
    A, s = (3.0, -1.0, -1.0, -1.0), math.exp(0.05)
    slope, loss = slopes(A, "sequence_token")
    close(slope, [-s * a for a in A])
    close(loss, [-s * a for a in A])
    close(
        slopes(A, "token")[0],
        [-math.exp(x) * a for x, a in zip((0.15, 0, -0.1, 0.15), A)],
    )
    with pytest.raises(ValueError, match="sequence_token"):
        slopes(A, "sequence")
    # beyond the bound of the sequence's ratio the good token has no gradient left
    slope, _ = slopes(A, "sequence_token", epsilon=0.01, epsilon_high=0.04)
    close(slope, [0.0, s, s, s])


@pytest.mark.parametrize("objective", ["clip", "cispo", "sapo"])
@pytest.mark.parametrize("A", [1.5, -1.5])
@pytest.mark.parametrize("mask", [[True] * 4, [True, True, True, False]])
def test_gspo_token_is_gspo_where_a_completion_has_one_advantage(A, objective, mask):
    """Equations 11 and 18 of the paper: the same loss and gradient, with advantages [N]
    or [N, T], clipped or not."""
    results = [
        slopes(a, level, mask=mask, objective=objective, **bounds)
        for level in ("sequence", "sequence_token")
        for a in ((A,) * 4, (A, A, A, A if mask[3] else math.nan))
        for bounds in ({}, {"epsilon": 3e-4, "epsilon_high": 4e-4})
    ]
    for bounds in (0, 1):
        for slope, loss in results[2 + bounds :: 2]:
            close(slope, results[bounds][0])
            close(loss, results[bounds][1])
    assert results[0][0].abs().max() > 0


def test_the_weights_of_another_sampler_are_no_advantages(llama, rollout):
    """GSPO with the correction for another sampler: loss and gradient by their
    definition.

    The weight of each token multiplies its loss, -min(s A, clip(s) A), and the
    gradient of s reaches every token of the completion."""
    config = short_config(importance_sampling_level="sequence", epsilon=0.05)
    mask = rollout.completion_mask
    rollout.sampling_logprobs = rollout.logprobs - 0.7 * rollout.values.sin()
    rollout.loss_weights = importance_weights(rollout, 3.0)
    totals = {"num_sequences": mask.any(1).sum(), "num_tokens": mask.sum()}
    ours, _ = batch_loss(EngineModels(llama, None), rollout, config, 0.0, totals)
    logprobs, truth = packing.token_logprobs(llama, rollout), 0.0
    for i, n in enumerate(mask.sum(1).tolist()):
        A = rollout.advantages[i].item()
        difference = logprobs[i, :n] - rollout.logprobs[i, :n]
        s = (difference.sum() / n).exp()
        objective = min(s * A, s.clamp(0.95, 1.05) * A)
        weights = (rollout.logprobs - rollout.sampling_logprobs)[i, :n].exp()
        truth = truth - objective * weights.clamp(max=3.0).mean() / len(mask)
    a, b = (
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(x, tuple(llama.parameters()))]
        )
        for x in (ours, truth)
    )
    close(ours.detach(), truth.detach())
    close(a, b)
    assert a.abs().max() > 1e-3


# End of sequence, padding, positions --------------------------------------------------


def chain(transitions, vocabulary=len(VOCABULARY)):
    "Logits that lead from one character to the next; what is not listed leads to EOS."
    table = torch.full((vocabulary, vocabulary), -50.0)
    for i in range(vocabulary):
        table[i, transitions.get(i, EOS)] = 50.0
    return table


@pytest.mark.parametrize("pad", ["<pad>", "<eos>", None])
def test_padding_that_looks_like_eos(llama, pad):
    """Bug 11: with pad == eos, `[a, eos, eos]` is a completion of two tokens: the
    first EOS is one, the second is padding."""
    tokenizer, (a, b, c) = character_tokenizer(pad=pad), ids_of("789")
    model = with_logits(llama, chain({ids_of("=")[0]: a, ids_of(":")[0]: b, b: c}))
    rollout = sample(model, tokenizer, [Query("1+1="), Query("24:")], 1, 6)
    assert rollout.completion_mask.tolist() == [[True, True, False], [True, True, True]]
    assert rollout.completion_ids[0, :2].tolist() == [
        a,
        EOS,
    ] and rollout.completion_ids[1].tolist() == [b, c, EOS]
    assert rollout.completions == ["7", "89"] and not rollout.truncated.any()


def test_eos_carries_gradient(llama):
    "Bug 11: the end is a decision like any other, and is learned; padding is not."
    rollout = as_rollout(character_tokenizer(pad="<eos>"), [Query("1+1=")], ["2", "22"])
    assert rollout.completion_ids.tolist()[0] == [
        *ids_of("2"),
        EOS,
        EOS,
    ] and rollout.completion_mask.tolist()[0] == [True, True, False]
    logprobs = token_logprobs(llama, rollout)
    assert logprobs[0, 2] == 0
    slope = lambda t: max(
        g.abs().max()
        for g in torch.autograd.grad(
            logprobs[0, t], tuple(llama.parameters()), retain_graph=True
        )
    )
    assert slope(1) > 1e-3 and slope(2) == 0


def test_several_eos_tokens(llama, tokenizer):
    """Bug 12: every id of the generation config ends a completion, also as its first
    token, which is then not truncated; one that runs on is."""
    second, (a, b, c) = VOCABULARY.index(")"), ids_of("789")
    llama.generation_config.eos_token_id = [EOS, second]
    model = with_logits(
        llama,
        chain(
            {ids_of("=")[0]: a, ids_of(":")[0]: b, b: second, ids_of("+")[0]: c, c: c}
        ),
    )
    assert eos_token_ids(model, tokenizer) == [EOS, second]
    rollout = sample(
        model, tokenizer, [Query("1="), Query("2:"), Query("3+"), Query("4-")], 1, 4
    )
    assert rollout.completion_mask.sum(1).tolist() == [
        2,
        2,
        4,
        1,
    ] and rollout.truncated.tolist() == [False, False, True, False]
    assert rollout.completion_ids[1, :2].tolist() == [b, second]


def test_an_end_at_the_limit_is_not_a_truncation(llama, tokenizer):
    "Bug 12: EOS as the last token that fits is an end."
    a, b = ids_of("78")
    rollout = sample(
        with_logits(llama, chain({ids_of("=")[0]: a, ids_of(":")[0]: b, b: b})),
        tokenizer,
        [Query("1="), Query("2:")],
        1,
        2,
    )
    assert rollout.truncated.tolist() == [False, True]


def test_left_padding_moves_no_position(model, tokenizer):
    """Bug 13: a prompt padded by its neighbours gives the log-probs and values that
    it gives alone, with rotary and absolute positions."""
    rollout, value = random_rollout(model, tokenizer), ValueModel(model)
    torch.nn.init.normal_(value.head.weight)
    together, values = token_logprobs(model, rollout), value(rollout)
    assert not rollout.prompt_mask.all()
    for g in range(3):
        alone, rows = rollout.select([g]), slice(3 * g, 3 * g + 3)
        assert alone.prompt_mask.all()
        T = alone.completion_ids.shape[1]
        close(together[rows, :T], token_logprobs(model, alone), 1e-10)
        close(values[rows, :T], value(alone), 1e-10)


def test_sampling_with_padding_is_sampling_without(model, tokenizer):
    """Bug 13 in the sampler: greedy answers and log-probs of a batch of unequal
    prompts are those of each prompt alone."""
    queries = [Query(prompt) for prompt in ("1+2=", "345+678=", "7:")]
    together = sample(model, tokenizer, queries, 2, 5, top_k=1)
    for i, query in enumerate(queries):
        alone = sample(model, tokenizer, [query], 1, 5, top_k=1)
        n = int(alone.completion_mask.sum())
        for row in (2 * i, 2 * i + 1):
            assert together.completion_mask[row].sum() == n and together.completion_ids[
                row, :n
            ].equal(alone.completion_ids[0])
            close(together.logprobs[row, :n], alone.logprobs[0], 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"importance_sampling_level": "sequence"},
        {"importance_sampling_level": "sequence_token"},
        {"loss_type": "dr_grpo"},
        {"objective": "cispo", "loss_type": "dapo"},
        {"objective": "sapo"},
    ],
    ids=str,
)
def test_padding_changes_nothing(model, tokenizer, options):
    """Bug 14: more padding, full of junk, changes no loss, no gradient and no
    metric, whether the model sees it or `select` cuts it off first, as `update`
    does."""
    rollout = random_rollout(model, tokenizer)
    rollout = replace(
        rollout, advantages=rollout.advantages[:, None] * rollout.completion_mask
    )
    wide = padded(rollout)
    (m, g), (n, h) = step_of(model, rollout, **options), step_of(model, wide, **options)
    close(h, g)
    close(list(n.values()), list(m.values()))
    totals = {
        "num_sequences": torch.tensor(9),
        "num_tokens": rollout.completion_mask.sum(),
    }
    (loss, sums), (wide_loss, wide_sums) = (
        batch_loss(EngineModels(model, None), r, short_config(**options), 0.1, totals)
        for r in (rollout, wide)
    )
    close([wide_loss.detach(), *wide_sums.values()], [loss.detach(), *sums.values()])
    for a, b in zip(
        *(torch.autograd.grad(x, tuple(model.parameters())) for x in (wide_loss, loss))
    ):
        close(a, b)
    again = wide.select([0, 1, 2])
    for name in (
        "prompt_ids",
        "prompt_mask",
        "completion_ids",
        "completion_mask",
        "logprobs",
        "ref_logprobs",
        "values",
        "advantages",
        "returns",
    ):
        assert getattr(again, name).equal(getattr(rollout, name)), name


def test_padding_changes_no_advantage_of_ppo(rollout):
    "Bug 14 on PPO's way: token rewards, GAE, whitening and adaptive beta."
    moved = rollout.logprobs - 0.05 * rollout.completion_mask
    rollout = replace(rollout, ref_logprobs=moved)  # a KL within 20 % of the target
    target = 1.1 * 0.05 * rollout.completion_mask.sum(1).double().mean().item()
    wide, config = padded(rollout), short_config(algorithm="ppo")
    outcomes = []
    for r in (rollout, wide):
        rewards = token_rewards(r, 0.1)
        outcomes.append(
            (
                rewards[:, :6],
                *(x[:, :6] for x in gae_advantages(r, rewards, config)),
                torch.tensor(next_beta(0.1, r, target), dtype=DOUBLE),
            )
        )
        assert rewards[~r.completion_mask].abs().sum() == 0
    for a, b in zip(*outcomes):
        close(a, b)


def test_shift_by_one(model, tokenizer):
    """Bug 23: the log-prob of token t comes from the logits at t-1, as a decoder
    without batch, padding or cache computes it; the value too."""
    rollout, value = random_rollout(model, tokenizer), ValueModel(model)
    torch.nn.init.normal_(value.head.weight)
    (logprobs, entropy), values = (
        token_logprobs(model, rollout, 0.7, return_entropy=True),
        value(rollout),
    )
    for i, t in itertools.product(range(9), range(6)):
        if not rollout.completion_mask[i, t]:
            continue
        prefix = torch.cat(
            [
                rollout.prompt_ids[i // 3][rollout.prompt_mask[i // 3]],
                rollout.completion_ids[i, :t],
            ]
        )[None]
        distribution = (model.eval()(prefix).logits[0, -1] / 0.7).log_softmax(0)
        close(logprobs[i, t], distribution[rollout.completion_ids[i, t]], 1e-10)
        close(entropy[i, t], -(distribution.exp() * distribution).sum(), 1e-10)
        close(
            values[i, t],
            value.head(value.trunk(prefix).last_hidden_state[0, -1])[0],
            1e-10,
        )


# The sampler and the trainer agree ----------------------------------------------------


def test_temperature_is_in_the_logprobs(llama, tokenizer):
    """Bug 15: logits (2, 0) at T = 0.5 -> log-prob -0.01815, in the sampler as in
    the trainer, and in what is drawn."""
    table = torch.full((len(VOCABULARY),) * 2, -1e4)
    table[:, 3], table[:, 4] = 2.0, 0.0
    model = with_logits(llama, table)
    rollout = sample(
        model,
        tokenizer,
        [Query("1=")],
        4000,
        1,
        temperature=0.5,
        generator=torch.Generator().manual_seed(0),
    )
    first = rollout.completion_ids[:, 0] == 3
    close(-math.log(1 + math.exp(-4)), -0.01815, 1e-5)
    for logprobs in (rollout.logprobs, token_logprobs(model, rollout, 0.5)):
        close(logprobs[first][:1], [[-0.01815]], 1e-5)
        close(logprobs[~first][:1], [[-4.01815]], 1e-5)
    p = 1 / (1 + math.exp(-4))
    assert abs(first.float().mean() - p) < 4 * math.sqrt(p * (1 - p) / 4000)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 3},
        {"top_p": 0.7},
        {"temperature": 1.5, "top_p": 0.9, "top_k": 5},
        {"top_k": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sampler_and_trainer_agree(kind, tokenizer, options):
    """Bugs 16, 17: without an update rho = 1 to 1e-5, under every truncation,
    although the model has dropout and is in training mode."""
    model = random_model(kind, dropout=0.1, dtype=torch.float32).train()
    queries = [Query("1+2="), Query("345+6="), Query("7:")]
    for _ in range(2):  # the first call also tries whether the model reads padding
        model.train()
        rollout = sample(
            model,
            tokenizer,
            queries,
            4,
            8,
            generator=torch.Generator().manual_seed(0),
            **options,
        )
    model.train()
    close(
        (
            token_logprobs(model, rollout, options.get("temperature", 1.0))
            - rollout.logprobs
        ).exp()[rollout.completion_mask],
        torch.ones(int(rollout.completion_mask.sum())),
        1e-5,
    )


@pytest.mark.parametrize(
    "options, kept",
    [
        ({}, 5),
        ({"top_k": 2}, 2),
        ({"top_k": 1}, 1),
        ({"top_p": 0.5}, 1),
        ({"top_p": 0.51}, 2),
        ({"top_p": 0.95}, 4),
        ({"top_k": 3, "top_p": 0.6}, 2),
        ({"top_k": 3, "top_p": 0.52}, 1),
        ({"top_k": 99}, 5),
    ],
    ids=str,
)
def test_draw(options, kept):
    """Bug 16: which tokens top-k and top-p leave (by hand; top-p is a share of what
    top-k left), and that they are drawn in proportion to their probability."""
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04])
    tokens = draw(
        probabilities.log().expand(8000, 5),
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    share = torch.bincount(tokens, minlength=5) / 8000
    truth = torch.where(torch.arange(5) < kept, probabilities, 0)
    truth /= truth.sum()
    assert ((share - truth).abs() <= 4 * (truth * (1 - truth) / 8000).sqrt()).all(), (
        share
    )


@pytest.mark.parametrize("num_generations", [1, 8])
def test_bfloat16_samples_are_scored_again(tokenizer, num_generations):
    """Bug 16: in bfloat16 the sampler's own log-probs are not exact enough; those of
    `EngineModels.sample` give rho = 1, in pieces too."""
    model = random_model(dtype=torch.float32)
    queries = [Query("1+2="), Query("345+6=")] * 2
    config = short_config(
        dtype="bfloat16", max_completion_length=16, max_tokens_per_micro_batch=100
    )
    models = EngineModels(
        model,
        tokenizer,
        torch.optim.SGD(model.parameters(), lr=0.0),
        generator=torch.Generator().manual_seed(0),
    )
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        own = sample(
            model,
            tokenizer,
            queries,
            num_generations,
            16,
            generator=torch.Generator().manual_seed(0),
        )
        rollout = models.sample(queries, num_generations, config)
        logprobs = packing.token_logprobs(model, rollout).detach()
        assert own.completion_ids.equal(rollout.completion_ids)
        assert (own.logprobs - logprobs).abs().max() > 1e-3
        # cut in pieces, products of bfloat16 round in another way: by a last digit of
        # the logits, 1/64 from 2 to 4, or two
        close(logprobs, rollout.logprobs, 1e-6 if num_generations == 1 else 2 / 64)
        apart = (logprobs - rollout.logprobs).abs()[rollout.completion_mask]
        assert (apart > 1e-2).float().mean() < 0.01  # and that is rare

        n = len(rollout)
        rollout.advantages = torch.randn(n, generator=torch.Generator().manual_seed(0))
        metrics = update(models, rollout, config)
        assert metrics["ratio"] == pytest.approx(1.0, abs=1e-6)
        models.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        update(models, rollout, config)
        moved = update(models, rollout, config)
    # the policy has moved, and what it was is remembered
    assert abs(moved["ratio"] - 1) > 1e-4


def test_log_probs_of_a_bfloat16_model_are_float32(tokenizer):
    """Bug 16: the softmax of bfloat16 logits is taken in float32 (bfloat16 has three
    digits): the probabilities of all tokens sum to 1."""
    model, V = random_model(dtype=torch.bfloat16), len(VOCABULARY)
    rollout = replace(
        as_rollout(tokenizer, [Query("1+2=")], [""] * V),
        completion_ids=torch.arange(V)[:, None],
    )
    logprobs = token_logprobs(model, rollout)
    assert logprobs.dtype == torch.float32
    close(logprobs.detach().double().exp().sum(), 1.0, 1e-5)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_box_forgets(tokenizer, kind, algorithm):
    """Bugs 15, 17: with dropout 0.1 everywhere, every model in training mode and T =
    0.6, a step still has rho = 1, KL = 0 and V = its copy's V."""
    policy = random_model(dropout=0.1, dtype=torch.float32).train()
    models = kind(
        policy,
        tokenizer,
        torch.optim.SGD(policy.parameters(), lr=0.0),
        [lambda completions, **_: [float(len(c)) for c in completions]],
        reference=copy.deepcopy(policy).train(),
        beta=0.1,
    )
    if algorithm == "ppo":
        models.value = ValueModel(policy).train()
        torch.nn.init.normal_(models.value.head.weight)
        models.value_optimizer = torch.optim.SGD(models.value.parameters(), lr=0.0)
    models.generator = torch.Generator().manual_seed(0)
    rollout, metrics = STEPS[algorithm](
        models,
        [Query("1+2="), Query("345+6=")],
        short_config(algorithm=algorithm, temperature=0.6),
    )
    close(metrics["ratio"], 1.0, 1e-5)
    close(metrics["kl"], 0.0, 1e-5)
    if algorithm == "ppo":
        close(models.value.train()(rollout).detach(), rollout.values, 1e-5)


# PPO: reward, advantages, value -------------------------------------------------------


def test_the_score_lands_on_the_last_real_token():
    """Bug 18: `[t, t, eos, pad]` -> index 2, on top of the price of the KL, which
    every real token pays."""
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    logprobs, ref = (
        torch.tensor([[-1.0, -2, -3, 0], [-1, 0, 0, 0]]),
        torch.tensor([[-1.5, -1, -3, 0], [-3, 5, 5, 5]]),
    )
    rewards = kl_in_reward(torch.tensor([10.0, 20.0]), logprobs, ref, mask, 0.1)
    close(rewards.double(), [[-0.05, 0.1, 10, 0], [20 - 0.2, 0, 0, 0]], 1e-6)


def test_gae_by_hand():
    """Bug 19: r = (0, 0, 1), V = (.5, .6, .7), gamma 1, lambda .95 -> (.46575, .385,
    .3), and R = A + V."""
    values, real = (
        torch.tensor([[0.5, 0.6, 0.7, 9.0]], dtype=DOUBLE),
        torch.tensor([[True, True, True, False]]),
    )
    advantages, returns = gae(
        torch.tensor([[0.0, 0, 1, 9]], dtype=DOUBLE), values, real
    )
    close(advantages, [[0.46575, 0.385, 0.3, 0]])
    close(returns, [[0.96575, 0.985, 1.0, 0]])


@pytest.mark.parametrize(
    "gamma, lam", [(1.0, 0.95), (0.9, 0.8), (0.9, 0.0), (1.0, 1.0), (0.5, 1.0)]
)
def test_gae_is_its_double_sum(rollout, gamma, lam):
    """Bug 19: A_t = sum_l (gamma lambda)^l delta_(t+l), written out; and the two
    limits of lambda."""
    mask, r, V = rollout.completion_mask, rollout.returns, rollout.values
    advantages, returns = gae(r, V, mask, gamma, lam)
    for i, n in enumerate(mask.sum(1).tolist()):
        delta = [
            r[i, t] + (gamma * V[i, t + 1] if t + 1 < n else 0.0) - V[i, t]
            for t in range(n)
        ]
        for t in range(n):
            close(
                advantages[i, t],
                sum((gamma * lam) ** l * delta[t + l] for l in range(n - t)),
            )
            close(returns[i, t], advantages[i, t] + V[i, t])
            if lam == 1:
                close(
                    returns[i, t], sum(gamma**l * r[i, t + l] for l in range(n - t))
                )  # Monte Carlo
            if lam == 0:
                close(advantages[i, t], delta[t])
        assert advantages[i, n:].abs().sum() == returns[i, n:].abs().sum() == 0


def test_whitening_leaves_the_returns_alone(rollout):
    """Bug 19: returns are of unwhitened advantages; whitening counts the tokens that
    carry loss, and only those."""
    config = short_config(algorithm="ppo", mask_truncated_completions=True)
    rollout = replace(rollout, truncated=torch.arange(9) == 0)
    rewards = token_rewards(rollout, 0.1)
    plain, _ = gae(rewards, rollout.values, rollout.completion_mask)
    advantages, returns = gae_advantages(rollout, rewards, config)
    counted = advantages[rollout.loss_mask(True)]
    close(returns, (plain + rollout.values).masked_fill(~rollout.completion_mask, 0.0))
    close([counted.mean(), counted.std()], [0.0, 1.0], 1e-6)
    close(
        gae_advantages(rollout, rewards, replace(config, whiten_advantages=False))[0],
        plain,
    )


def test_whiten_keeps_the_mean_if_asked():
    x, mask = (
        torch.tensor([[1.0, 3.0, 99.0]]).double(),
        torch.tensor([[True, True, False]]),
    )
    close(whiten(x, mask), [[-1 / math.sqrt(2), 1 / math.sqrt(2), 0]], 1e-7)
    close(
        whiten(x, mask, shift_mean=False),
        [[2 - 1 / math.sqrt(2), 2 + 1 / math.sqrt(2), 0]],
        1e-7,
    )
    assert (
        whiten(torch.full((3, 4), 0.7), torch.ones(3, 4, dtype=torch.bool)) == 0
    ).all()


@pytest.mark.parametrize(
    "V, old, R, loss, slope",
    [
        (1.0, 0.0, 1.0, 0.32, 0.0),
        (0.1, 0.0, 1.0, 0.405, -0.9),
        (-1.0, 0.0, 1.0, 2.0, -2.0),
        (1.0, 0.0, -1.0, 2.0, 2.0),
    ],
)
def test_value_clip(V, old, R, loss, slope):
    """Bug 20: the larger of the two errors counts; V_old 0, V 1, R 1, eps .2 -> loss
    .32 without gradient."""
    value = torch.tensor([[V, 5.0]], dtype=DOUBLE, requires_grad=True)
    result = value_loss(
        value,
        torch.tensor([[old, 0.0]]).double(),
        torch.tensor([[R, 0.0]]).double(),
        torch.tensor([[True, False]]),
    )
    result.backward()
    close([result.item(), *value.grad[0].tolist()], [loss, slope, 0])


@pytest.mark.parametrize(
    "observed, factor",
    [
        (6.0, 1.0),
        (6.6, 1 + 0.1 * 0.0256),
        (600.0, 1 + 0.2 * 0.0256),
        (0.0, 1 - 0.2 * 0.0256),
    ],
)
def test_adaptive_beta(observed, factor):
    """Ziegler et al.: the error is cut at 20 % and the step scaled by n / horizon
    (256 / 10 000)."""
    close(adapt_beta(0.1, observed, 6.0, 256), 0.1 * factor)


def test_adaptive_beta_observes_whole_completions(rollout):
    """The target is nats a completion: k1 summed over its tokens, then the mean over
    completions (here 2 / 9, not 2 / tokens)."""
    ref = rollout.logprobs.clone()
    ref[0, 0] -= 2.0
    for target, factor in ((2 / 9, 1.0), (2.2 / 9, 1 - 0.2 / 2.2 * 9 / 10_000)):
        close(next_beta(0.1, replace(rollout, ref_logprobs=ref), target), 0.1 * factor)


# Completions that carry no loss -------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("how", ["truncated", "unscored"])
def test_rows_without_loss_leave_the_denominators(llama, rollout, loss_type, how):
    """Bugs 21, 22: masking a whole group gives the gradient and the metrics of a
    step that never had it."""
    out = torch.arange(9) < 3
    masked = (
        replace(rollout, truncated=out)
        if how == "truncated"
        else replace(rollout, scored=~out)
    )
    options = {"loss_type": loss_type, "mask_truncated_completions": True}
    (m, g), (n, h) = (
        step_of(llama, masked, **options),
        step_of(llama, rollout.select([1, 2]), **options),
    )
    close(g, h)
    close(list(m.values()), list(n.values()))
    assert (
        step_of(llama, rollout, **options)[1] - g
    ).abs().max() > 1e-3  # they would have counted


def test_truncated_rows_count_only_if_told(llama, rollout):
    """Bug 21: without `mask_truncated_completions` truncation changes nothing; and
    truncated rows stay in their group's mean."""
    close(
        step_of(llama, replace(rollout, truncated=torch.arange(9) < 3))[1],
        step_of(llama, rollout)[1],
    )
    truncated = replace(rollout, truncated=torch.arange(9) < 2)
    close(
        group_box(truncated, short_config(mask_truncated_completions=True)),
        group_box(rollout, short_config()),
    )


@pytest.mark.parametrize(
    "how",
    [
        {"truncated": torch.ones(9, dtype=torch.bool)},
        {"scored": torch.zeros(9, dtype=torch.bool)},
    ],
    ids=["truncated", "unscored"],
)
def test_nothing_to_learn_from(llama, rollout, how):
    "Bug 21: loss 0, finite, and not one weight moves, not even by AdamW's momentum."
    optimizer, config = (
        torch.optim.AdamW(llama.parameters(), lr=0.1),
        short_config(mask_truncated_completions=True),
    )
    update(EngineModels(llama, None, optimizer), rollout, config)
    before = copy.deepcopy(llama.state_dict())
    metrics = update(
        EngineModels(llama, None, optimizer), replace(rollout, **how), config
    )
    assert metrics["loss"] == 0 and all(math.isfinite(x) for x in metrics.values())
    assert all(before[name].equal(x) for name, x in llama.state_dict().items())
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert (
        aggregate(torch.full((2, 3), torch.nan), nothing) == 0
        and value_loss(*torch.ones(3, 2, 3), nothing) == 0
    )


def scored_rollout(tokenizer, *functions, n=3, weights=None):
    rollout = as_rollout(
        tokenizer, [Query("1+2=", {"answer": "3"})], list("345678")[:n]
    )
    return rollout, score(rollout, list(functions), weights)


def test_a_reward_function_may_abstain(tokenizer):
    """Bug 22: (1, None, 0) -> mean .5 over the others, and advantage 0 for the row
    without a score."""
    rollout, metrics = scored_rollout(tokenizer, lambda completions, **_: [1, None, 0])
    assert metrics == {"rewards/<lambda>/mean": 0.5} and rollout.scored.tolist() == [
        True,
        False,
        True,
    ]
    close(rollout_metrics(rollout)["reward"], 0.5)
    close(
        group_advantages(rollout.rewards, 3, eps=0.0).double(),
        [math.sqrt(0.5), 0, -math.sqrt(0.5)],
        1e-6,
    )
    assert group_advantages(torch.tensor([1.0, math.nan, math.nan]), 3).tolist() == [
        0,
        0,
        0,
    ]  # one score: nothing to compare with
    close(
        token_rewards(replace(rollout, logprobs=torch.zeros(3, 2)), 0.1),
        [[0, 1], [0, 0], [0, 0]],
    )


def test_weights_and_abstentions(tokenizer):
    """Bug 22: the weighted sum is over the functions that judged; a row that none
    judged is not scored."""
    f, g = (
        (lambda completions, **_: [1, None, None]),
        (lambda completions, **_: [2, 3, None]),
    )
    rollout, _ = scored_rollout(tokenizer, f, g, weights=[10.0, 0.5])
    assert (
        rollout.rewards[:2].tolist() == [11.0, 1.5]
        and rollout.rewards[2].isnan()
        and rollout.scored.tolist() == [True, True, False]
    )
    assert combine(torch.tensor([[1.0, 2.0]])).tolist() == [3.0]


def test_reward_functions_see_what_trl_gives_them(tokenizer):
    """Prompts, completions, token ids and one list a column, all of length N; a chat
    query gives a chat completion."""
    seen = {}

    def spy(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions, **columns)
        return [0.0] * len(prompts)

    rollout = as_rollout(
        tokenizer,
        [Query("1+2=", {"answer": "3"}), Query("2:", {})],
        ["3", "4", "5", "6"],
    )
    judge([spy], rollout)
    assert seen["prompts"] == ["1+2=", "1+2=", "2:", "2:"] and seen["completions"] == [
        "3",
        "4",
        "5",
        "6",
    ]
    assert seen["answer"] == ["3", "3", None, None] and seen["completion_ids"][3] == [
        *ids_of("6"),
        EOS,
    ]
    chat = replace(rollout, queries=[Query([{"role": "user", "content": "1+2="}])] * 2)
    judge([spy], chat)
    assert seen["completions"][0] == [{"role": "assistant", "content": "3"}]


def prompt_and_answer(prompts, completions, completion_ids, answer, call, **_):
    "Changes everything that it is given."
    for i, prompt in enumerate(prompts):
        prompt += completions[i]
        completions[i] = prompt[-1].pop("content")
        completion_ids[i].clear()
        answer[i].append("4")
        call[i]["seen"] = True
    prompts.reverse()
    return [float(len(a)) for a in answer]


async def later(**columns):
    return prompt_and_answer(**columns)


def test_a_reward_function_may_change_what_it_is_given(tokenizer):
    """Neither the queries, nor what the next function or the next call sees, nor the
    completions of one group beside each other."""
    chat = [{"role": "user", "content": "1+2="}]
    queries = [
        Query(chat, {"answer": ["3"], "call": {}}),
        Query(chat, {"answer": ["5"]}),
    ]
    queries[1].columns["call"] = queries[0].columns["call"]
    rollout = replace(
        as_rollout(tokenizer, [Query("1+2="), Query("1+4=")], list("3456")),
        queries=queries,
    )
    untouched, ids = copy.deepcopy(queries), rollout.completion_ids.clone()

    def appends(answer, **_):
        answer[0].append("4")
        return [0.0] * 4

    judge([appends], rollout)
    assert rollout.queries == untouched
    functions = [prompt_and_answer, later, prompt_and_answer]
    for _ in range(2):
        assert judge(functions, rollout) == [[2.0] * 4] * 3
        assert rollout.queries == untouched and rollout.completions == list("3456")
        assert rollout.completion_ids.equal(ids)


def test_what_cannot_be_copied_is_passed_on(tokenizer):
    lock, seen = threading.Lock(), []

    def keeps(lock, **_):
        seen.extend(lock)
        return [0.0] * len(lock)

    rollout = as_rollout(tokenizer, [Query("1+2=", {"lock": lock})], ["3", "4"])
    score(rollout, [keeps])
    assert seen == [lock, lock]


def test_functions_of_one_name(tokenizer):
    "Each has a metric of its own; a name that one function has alone stays its own."
    one, other, third = (lambda n: lambda **_: [n] * 2)(1), lambda **_: [2, 3], len
    rollout = as_rollout(tokenizer, [Query("1+2=")], ["3", "4"])
    assert score(rollout, [one, other, partial(one)]) == {
        "rewards/<lambda>/mean": 1.0,
        "rewards/<lambda>_2/mean": 2.5,
        "rewards/<lambda>_3/mean": 1.0,
    }

    def len_2(**_):
        return [0, 0]

    assert names_of([third, len_2, third, third]) == ["len", "len_2", "len_3", "len_4"]
    with pytest.raises(TypeError, match="'<lambda>_2' returned 'x'"):
        score(rollout, [one, lambda **_: ["x", 0]])


def test_rewards_are_combined_in_float64(tokenizer):
    """16777217 is not 16777216; sums beyond float32 have a mean and a spread; what
    is no number is refused by name."""
    rollout, metrics = scored_rollout(
        tokenizer, lambda **_: [2**24 + 1, 2**24], lambda **_: [0.1, 0.2], n=2
    )
    assert rollout.rewards.tolist() == [2**24 + 1.1, 2**24 + 0.2]
    assert list(metrics.values()) == [2**24 + 0.5, pytest.approx(0.15, rel=1e-15)]
    A = group_box(rollout, short_config())
    close(A.double(), [0.7071, -0.7071], 2e-4)
    assert A.dtype == torch.float32  # of the log-probs

    huge = lambda **_: [3e38, 0, -3e38]
    rollout, _ = scored_rollout(tokenizer, huge, huge)
    assert rollout.rewards.tolist() == [6e38, 0, -6e38]
    close(group_box(rollout, short_config()).double(), [1, 0, -1], 1e-6)

    def honest(**_):
        return [1, 0, 1]

    def enormous(**_):
        return [1, 0, 3e38]

    words = (
        r"rewards of honest, enormous for completion 2, \[1.0, 3e\+38\].*no finite sum"
    )
    with pytest.raises(ValueError, match=words):
        scored_rollout(tokenizer, honest, enormous, weights=[1.0, 1e300])
    with pytest.raises(ValueError, match="0, 1 for completion 0"):
        combine(torch.tensor([[3e38, 3e38]]))  # its result is float32
    with pytest.raises(ValueError, match="completion 1.*no finite sum"):
        combine(torch.tensor([[1.0], [math.inf]]), [0.0])

    def opposed(**_):
        return [[(0, 3e38), (1, -3e38)]] * 3

    with pytest.raises(ValueError, match="step rewards of opposed"):
        scored_rollout(tokenizer, opposed, weights=[1e300])


def test_nothing_judged_is_told(tokenizer):
    "By the names of the functions, with what they returned in the metrics as before."

    def silent(**_):
        return [None] * 3

    with pytest.warns(UserWarning, match="silent, silent_2 judged no completion"):
        rollout, metrics = scored_rollout(tokenizer, silent, silent)
    assert not rollout.scored.any() and rollout_metrics(rollout)["reward"] is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scored_rollout(tokenizer, silent, lambda **_: [None, 0, None])


def test_bradley_terry_loss():
    "-log sigmoid of the margin: margins 0 and log 3 -> mean of log 2 and log 4/3."
    close(
        bradley_terry_loss(
            torch.tensor([1.0, math.log(3)]), torch.tensor([1.0, 0.0])
        ).double(),
        (math.log(2) + math.log(4 / 3)) / 2,
        1e-6,
    )


@pytest.mark.parametrize(
    "chosen, rejected", [((2,), (3,)), ((2, 1), (2, 1)), ((0,),) * 2]
)
def test_bradley_terry_loss_of_what_are_no_pairs(chosen, rejected):
    with pytest.raises(ValueError, match="chosen and rejected must be .*, K > 0; got"):
        bradley_terry_loss(torch.zeros(chosen), torch.zeros(rejected))


def test_the_reward_model_reads_the_last_real_token(tokenizer):
    """Bugs 13, 14 in the reward model: the score of an answer does not depend on
    what it is batched with."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_labels=1,
        )
    ).double()
    judge, prompts, answers = (
        RewardModel(model, tokenizer),
        ["1+2=", "345+678=", "9:"],
        ["3", "1023", "3*3"],
    )
    close(
        judge(prompts=prompts, completions=answers),
        [judge(prompts=[p], completions=[a])[0] for p, a in zip(prompts, answers)],
        1e-10,
    )
    last = model.model(
        torch.tensor([ids_of("345+678=1023") + [EOS]])
    ).last_hidden_state[0, -1]
    close(
        judge(prompts=prompts, completions=answers)[1], model.score(last).item(), 1e-10
    )


# Loss, gradient, metrics --------------------------------------------------------------


def test_loss_0_is_not_gradient_0():
    "Bug 24: rho = 1 and A = (1, -1): the loss is 0, its slope is not."
    logprobs = torch.zeros(2, 1, dtype=DOUBLE, requires_grad=True)
    mask = torch.ones(2, 1, dtype=torch.bool)
    loss = aggregate(
        policy_loss(
            logprobs,
            torch.zeros(2, 1, dtype=DOUBLE),
            torch.tensor([1.0, -1.0]).double(),
            mask,
        )[0],
        mask,
    )
    loss.backward()
    assert loss.item() == 0 and logprobs.grad.flatten().tolist() == [-0.5, 0.5]


def test_an_update_with_loss_0_moves_the_policy(llama, rollout):
    """Bug 24, end to end: without an update rho = 1, and A = (1, 0, -1) in every
    group gives a loss of exactly 0; the policy learns all the same."""
    rollout = replace(
        rollout,
        advantages=torch.tensor([1.0, 0.0, -1.0] * 3).double(),
        ref_logprobs=None,
    )
    rollout.logprobs = token_logprobs(llama, rollout).detach()
    metrics, g = step_of(llama, rollout, in_loss=0.0)
    assert metrics["loss"] == 0 and metrics["grad_norm"] > 1e-2 and g.norm() > 1e-2


@pytest.mark.parametrize("budget", [10_000, 1])
def test_metrics_are_those_of_the_whole_step(llama, tokenizer, budget):
    """Bug 27: every metric from its definition over all tokens that carry loss,
    whatever the pieces."""
    rollout = replace(
        random_rollout(llama, tokenizer, off_policy=0.6),
        scored=torch.arange(9) % 4 != 2,
    )
    metrics, g = step_of(llama, rollout, max_tokens_per_micro_batch=budget, in_loss=0.1)
    with torch.no_grad():
        logprobs, entropy = token_logprobs(llama, rollout, return_entropy=True)
    tokens = [
        (i, t)
        for i, t in itertools.product(range(9), range(6))
        if rollout.completion_mask[i, t] and i % 4 != 2
    ]
    rho = {k: math.exp(logprobs[k] - rollout.logprobs[k]) for k in tokens}
    k3 = {
        k: math.exp(rollout.ref_logprobs[k] - logprobs[k])
        - (rollout.ref_logprobs[k] - logprobs[k]).item()
        - 1
        for k in tokens
    }
    A, mean = rollout.advantages.tolist(), lambda x: sum(map(float, x)) / len(tokens)
    low, high = (
        mean(rho[i, t] < 0.8 and A[i] < 0 for i, t in tokens),
        mean(rho[i, t] > 1.2 and A[i] > 0 for i, t in tokens),
    )
    assert low > 0 and high > 0
    objective = {
        (i, t): min(rho[i, t] * A[i], min(max(rho[i, t], 0.8), 1.2) * A[i])
        - 0.1 * k3[i, t]
        for i, t in tokens
    }
    rows = sorted({i for i, _ in tokens})
    loss = -sum(
        sum(x for k, x in objective.items() if k[0] == i)
        / rollout.completion_mask[i].sum().item()
        for i in rows
    ) / len(rows)
    close(
        [metrics[f"clip_ratio/{name}_mean"] for name in ("low", "high", "region")],
        [low, high, low + high],
    )
    close(
        [metrics["ratio"], metrics["entropy"], metrics["kl"]],
        [mean(rho.values()), mean(entropy[k] for k in tokens), mean(k3.values())],
    )
    close([metrics["loss"], metrics["grad_norm"]], [loss, g.norm()])


def test_rewards_of_a_step():
    """Bug 27: `frac_reward_zero_std` counts groups whose scores are all equal,
    unscored rows aside."""
    rewards = torch.tensor(
        [0.7, 0.7, 0.7, 1, 0, 1, 1, torch.nan, 1, torch.nan, torch.nan, 0]
    )
    rollout = SimpleNamespace(
        rewards=rewards,
        scored=~rewards.isnan(),
        step_rewards=None,
        sampling_logprobs=None,
        values=None,
        num_generations=3,
        completion_mask=torch.ones(12, 4, dtype=torch.bool),
        truncated=torch.arange(12) < 3,
    )
    metrics = rollout_metrics(rollout)
    close(
        [
            metrics["frac_reward_zero_std"],
            metrics["reward"],
            metrics["completions/mean_length"],
            metrics["completions/clipped_ratio"],
        ],
        [0.75, 6.1 / 9, 4, 0.25],
        1e-6,
    )
    close(metrics["reward_std"], stdev([0.7] * 3 + [1, 0, 1, 1, 1, 0]), 1e-6)
    within = [0, stdev([1, 0, 1]), 0]  # of the last group one is scored: no spread
    close(metrics["reward_std_within_groups"], fmean(within), 1e-6)


def test_entropy_bonus(llama, rollout):
    """Alone, the bonus is a loss of -coef times the token mean of the entropy, and a
    step on it raises the entropy."""
    calm = replace(rollout, advantages=torch.zeros(9, dtype=DOUBLE))
    optimizer, config = (
        torch.optim.SGD(llama.parameters(), lr=0.05),
        short_config(entropy_coef=0.5),
    )
    first, second = (
        update(EngineModels(llama, None, optimizer), calm, config) for _ in range(2)
    )
    close(first["loss"], -0.5 * first["entropy"])
    assert second["entropy"] > first["entropy"]


def test_gradients_are_clipped_to_max_grad_norm(llama, rollout):
    """The step of policy and value model is as long as `max_grad_norm`, each of its
    own; the metric is the norm before."""
    value = ValueModel(llama)
    torch.nn.init.normal_(value.head.weight, generator=torch.Generator().manual_seed(0))
    optimizers = [
        torch.optim.SGD(model.parameters(), lr=1.0) for model in (llama, value)
    ]

    def weights():
        return [
            torch.cat([p.detach().flatten().clone() for p in model.parameters()])
            for model in (llama, value)
        ]

    before = weights()
    metrics = update(
        EngineModels(
            llama, None, optimizers[0], value=value, value_optimizer=optimizers[1]
        ),
        rollout,
        short_config(algorithm="ppo", max_grad_norm=0.01),
    )
    for model, a, b, name in zip(
        (llama, value), before, weights(), ("grad_norm", "value_grad_norm")
    ):
        close((b - a).norm(), 0.01, 1e-6)
        close(gradient(model).norm(), 0.01, 1e-6)
        assert metrics[name] > 0.05
    assert metrics["grad_norm"] != metrics["value_grad_norm"]


@pytest.mark.parametrize("iterations", [1, 3])
def test_num_iterations_is_the_number_of_steps(llama, rollout, iterations):
    """mu updates on one sampling equal mu calls with one update each; the metrics
    are their mean."""
    one, many = copy.deepcopy(llama), copy.deepcopy(llama)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (one, many)]
    singles = [
        update(EngineModels(one, None, optimizers[0]), rollout, short_config())
        for _ in range(iterations)
    ]
    metrics = update(
        EngineModels(many, None, optimizers[1]),
        rollout,
        short_config(num_iterations=iterations),
    )
    for a, b in zip(one.parameters(), many.parameters()):
        assert a.equal(b)
    close(metrics["loss"], sum(m["loss"] for m in singles) / iterations)


def test_the_table_averages_over_real_tokens(rollout):
    """Bug 14 in completions.parquet: the advantage of a completion is the mean over
    its tokens, whatever stands in the padding."""
    rows = table(
        replace(rollout, advantages=rollout.values + 7.0 * ~rollout.completion_mask),
        step=1,
    )
    for i, row in enumerate(rows):
        n = int(rollout.completion_mask[i].sum())
        assert row["tokens"] == n
        close(row["advantage"], sum(rollout.values[i, :n].tolist()) / n)


# The two halves -----------------------------------------------------------------------


def boxes(tokenizer, algorithm, kind):
    """Every box of the figure, random: a reference that is not the policy, a value
    model that has an opinion, a reward by length."""
    policy = random_model("gpt2")
    models = kind(
        policy,
        tokenizer,
        torch.optim.SGD(policy.parameters(), lr=0.0),
        [lambda completions, **_: [len(text) / 2 for text in completions]],
        reference=random_model("gpt2", seed=1),
        beta=0.1,
    )
    if algorithm == "ppo":
        models.value = ValueModel(policy)
        torch.nn.init.normal_(
            models.value.head.weight, generator=torch.Generator().manual_seed(0)
        )
        models.value_optimizer = torch.optim.SGD(models.value.parameters(), lr=0.0)
    return models


QUERIES = [Query("1+2="), Query("345+6="), Query("7:")]


@pytest.mark.parametrize("kind", KINDS)
def test_ppo_step(tokenizer, kind):
    """The upper half: r and beta KL make token rewards, GAE makes advantages, the
    loss has no KL of its own."""
    models, config = (
        boxes(tokenizer, "ppo", kind),
        short_config(
            algorithm="ppo", lam=1.0, whiten_advantages=False, beta=0.1, vf_coef=0.5
        ),
    )
    models.generator = torch.Generator().manual_seed(0)
    rollout, metrics = STEPS["ppo"](models, QUERIES, config)
    assert len(rollout) == 3 and rollout.num_generations == 1
    close(rollout.ref_logprobs, token_logprobs(models.reference, rollout).detach())
    k1, n = (
        rollout.logprobs.double() - rollout.ref_logprobs,
        rollout.completion_mask.sum(1).tolist(),
    )
    assert k1[rollout.completion_mask].abs().min() > 1e-4
    for i in range(3):
        for t in range(n[i]):  # lambda 1: what is still to come, less what was expected
            to_come = len(rollout.completions[i]) / 2 - 0.1 * k1[i, t : n[i]].sum()
            close(rollout.returns[i, t], to_come, 1e-5)
            close(rollout.advantages[i, t], to_come - rollout.values[i, t], 1e-5)
    close(
        metrics["loss"],
        -rollout.advantages[rollout.completion_mask].double().mean(),
        1e-5,
    )
    close(
        metrics["value_loss"],
        ((rollout.values - rollout.returns) ** 2)[rollout.completion_mask]
        .double()
        .mean()
        / 2,
        1e-5,
    )
    assert metrics["beta"] == models.beta == 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_grpo_step(tokenizer, kind):
    """The lower half: G completions of each query, compared within their group; the
    KL is in the loss and not in the reward."""
    models, config = (
        boxes(tokenizer, "grpo", kind),
        short_config(num_generations=4, beta=0.1),
    )
    models.generator = torch.Generator().manual_seed(0)
    rollout, metrics = STEPS["grpo"](models, QUERIES, config)
    assert len(rollout) == 12 and rollout.values is None and rollout.returns is None
    close(rollout.ref_logprobs, token_logprobs(models.reference, rollout).detach())
    k3, n, loss = (
        kl(rollout.logprobs.double(), rollout.ref_logprobs),
        rollout.completion_mask.sum(1).tolist(),
        0.0,
    )
    for g in range(3):
        r = [len(rollout.completions[i]) / 2 for i in range(4 * g, 4 * g + 4)]
        mean = sum(r) / 4
        std = math.sqrt(sum((x - mean) ** 2 for x in r) / 3)
        for i, x in zip(range(4 * g, 4 * g + 4), r):
            close(rollout.advantages[i], (x - mean) / (std + 1e-4), 1e-5)
            loss += 0.1 * k3[i, : n[i]].mean() - (x - mean) / (std + 1e-4)
    assert rollout.advantages.abs().max() > 0.5
    close(metrics["loss"], loss / 12, 1e-5)


@dataclass(config={"extra": "forbid"}, kw_only=True)
class CorrectedPPO(PPOConfig):
    use_bias_correction_kl: bool = True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("corrected", [False, True])
def test_the_options_of_ppo_bear_a_kl_in_the_loss(tokenizer, kind, corrected):
    """A step of one's own may take PPO's options and pay for the KL in the loss: that
    is PPO's loss, and beta times the token mean of k3. On fresh samples the corrected
    one is the same number; a kind of the config may have the option."""
    config = short_config(algorithm="ppo", beta=0.1)
    if corrected:
        config = CorrectedPPO(**vars(config))
    assert config.use_bias_correction_kl == corrected
    losses = []
    for beta in (0.0, config.beta):
        models = boxes(tokenizer, "ppo", kind)
        models.generator = torch.Generator().manual_seed(0)
        rollout = models.sample(QUERIES, 1, config)
        rollout.ref_logprobs = models.reference_logprobs(rollout, config)
        models.score(rollout, config)
        rollout.values = models.predict_values(rollout, config)
        rewards = token_rewards(rollout, 0.0)
        rollout.advantages, rollout.returns = gae_advantages(rollout, rewards, config)
        losses.append(update(models, rollout, config, beta=beta)["loss"])
    k3 = kl(rollout.logprobs.double(), rollout.ref_logprobs)[rollout.completion_mask]
    assert k3.mean() > 1e-3
    close(losses[1] - losses[0], 0.1 * k3.mean(), 1e-6)


def test_the_correction_of_the_kl_is_no_option_of_ppo():
    "Whose own step has no KL in the loss: it would do nothing."
    with pytest.raises(ValueError, match="use_bias_correction_kl.*only grpo has it"):
        make_config(algorithm="ppo", use_bias_correction_kl=True)
    assert "use_bias_correction_kl" not in vars(make_config(algorithm="ppo"))
