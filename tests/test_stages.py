"""The variants of the stages: process rewards, length and form, dynamic sampling, a
value head on the trunk, the outer loop."""

import copy
import itertools
import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_nb.engine.models import EngineModels

from grpo_nb.run import iterative, training
from grpo_nb.algorithm import STEPS
from grpo_nb.run.options import RECIPES
from grpo_nb.gae import advantages as gae_advantages
from grpo_nb.gae import whiten
from grpo_nb.group import advantages as group_box
from grpo_nb.group import (
    SCALES,
    group_advantages,
    has_variance,
    informative,
    process_advantages,
)
from grpo_nb.policy import as_rollout
from grpo_nb.reference import token_rewards
from grpo_nb.engine.judging import RewardModel, score
from grpo_nb.reward import format_reward, overlong_reward, process_reward
from grpo_nb.reward import score as plain_score
from grpo_nb.rollout import Rollout
from grpo_nb.run.dynamic_sampling import dynamic_sampling
from grpo_nb.engine.data import load_task
from grpo_nb.task import Query
from grpo_nb.run.build import build_models
from grpo_nb.run.iterative import outer_iteration, preference_pairs
from grpo_nb.run.training import train
from grpo_nb.update import update
from grpo_nb.value import ValueModel, value_loss
from helpers import (
    character_tokenizer,
    dense_steps,
    gradient,
    process_advantages_by_definition,
    random_model,
    random_rollout,
    read_metrics,
    reproducible,
    short_config,
)

DOUBLE = torch.float64


def ended_steps(rollout):
    "Of each completion the rewards of its steps, by the tokens that they end at."
    return [
        {t: x for t, x in enumerate(row) if not math.isnan(x)}
        for row in rollout.step_rewards.tolist()
    ]


def last_step(rollout):
    "A step at the last token of each completion, worth the number of its row."
    ends = rollout.completion_mask.sum(1).tolist()
    steps = [[(n - 1, float(i))] for i, n in enumerate(ends)]
    return dense_steps(steps, rollout.completion_mask.shape[1])


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=DOUBLE),
        torch.as_tensor(b, dtype=DOUBLE),
        rtol=0,
        atol=tolerance,
    )


# Rollouts as one ----------------------------------------------------------------------


def test_joining_undoes_selecting(rollout):
    """Every field, whatever the lengths and the order of the parts; a field that one
    part lacks is dropped."""
    rollout = replace(rollout, step_rewards=last_step(rollout))
    for order in itertools.permutations(range(3)):
        again = Rollout.join([rollout.select([g]) for g in order]).select(
            [order.index(g) for g in range(3)]
        )
        for name, x in vars(rollout).items():
            if isinstance(x, torch.Tensor):
                torch.testing.assert_close(
                    getattr(again, name), x, rtol=0, atol=0, equal_nan=True
                )
            else:
                assert getattr(again, name) == x, name
    assert Rollout.join([replace(rollout, values=None), rollout]).values is None
    with pytest.raises(ValueError, match=r"one num_generations, got \[3, 1\]"):
        Rollout.join([rollout, as_rollout(character_tokenizer(), [Query("1=")], ["1"])])


# Rewards ------------------------------------------------------------------------------


def test_soft_overlong_penalty():
    "DAPO, eq. 13, by its three cases; the default cache is a fifth of the limit."
    lengths = [1, 11, 12, 13, 14, 15, 16, 17, 99]
    penalty = overlong_reward(16, cache=4)(
        prompts=[""] * 9,
        completions=[""] * 9,
        completion_ids=[[0] * n for n in lengths],
    )
    close(penalty, [0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1])
    assert overlong_reward(10)(
        prompts=[""] * 2, completions=[""] * 2, completion_ids=[[0] * 8, [0] * 9]
    ) == [0, -0.5]
    for cache in (0, 17):
        with pytest.raises(
            ValueError, match=rf"cache must lie in 1\.\.16 .*got {cache}"
        ):
            overlong_reward(16, cache)


@pytest.mark.parametrize(
    "task, right, wrong",
    [("add", "46", "4 6"), ("target", "8*3", "8x3"), ("add_chat", "8", "eight")],
)
def test_form(task, right, wrong):
    """The form of a task says nothing about right and wrong, only about what an
    answer looks like."""
    f = format_reward(load_task(task).form)
    assert f(prompts=["q"] * 3, completions=[right, wrong, right + "\n"]) == [1, 0, 0]


@pytest.mark.parametrize(
    "completion, steps",
    [
        ("468", [(1, 1), (2, 1), (3, 1)]),
        ("46", [(1, 1), (2, 0)]),
        ("467", [(1, 1), (2, 1), (3, 0)]),
        ("4680", [(1, 1), (2, 1), (3, 1), (4, 0)]),
        ("", [(0, 0)]),
        ("568", [(1, 0), (2, 0), (3, 0)]),
    ],
)
def test_steps_of_a_sum(completion, steps):
    "A digit is right if the answer up to it is; the last one, if the whole answer is."
    assert (
        load_task("add", digits=3).steps(
            completion, Query("123+345=", {"answer": "468"})
        )
        == steps
    )


def merging_tokenizer():
    """Tokens of one to three digits, so that steps in characters and steps in tokens
    are not the same."""
    vocabulary = {
        token: i
        for i, token in enumerate(["<pad>", "<eos>", *"0123456789", "12", "123"])
    }
    core = Tokenizer(models.BPE(vocabulary, [("1", "2"), ("12", "3")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Sequence([]), decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>"
    )


def test_steps_end_at_tokens():
    "A step that ends inside a token ends with it; the last step ends with EOS."
    tokenizer, task = merging_tokenizer(), load_task("add", digits=3)
    rollout = as_rollout(tokenizer, [Query("1", {"answer": "1237"})], ["1237", "127"])
    assert rollout.completion_mask.sum(1).tolist() == [3, 3]  # 123 7 eos, 12 7 eos
    score(rollout, [process_reward(task, tokenizer)])
    assert ended_steps(rollout) == [{0: 3.0, 2: 1.0}, {0: 2.0, 2: 0.0}]


@pytest.mark.parametrize("seed", range(20))
def test_the_simple_score_is_the_checked_one(tokenizer, seed):
    "Numbers, silence and steps of three functions, drawn at random: equal bits."
    rng = random.Random(seed)
    texts = ["".join(rng.choices("0123456789", k=rng.randint(1, 5))) for _ in range(6)]
    rollout = as_rollout(tokenizer, [Query("1+2="), Query("2+2=")], texts)

    def judgement(text):
        ends = sorted(rng.sample(range(len(text) + 1), rng.randint(0, len(text))))
        steps = [(end, rng.gauss(0, 9)) for end in ends]
        return rng.choice([None, rng.gauss(0, 9), rng.randint(-2, 2), steps])

    def function(name):
        column = [judgement(text) for text in texts]

        def f(**_):
            return column

        f.__name__ = name
        return f

    functions = [function(name) for name in "abc"]
    weights = rng.choice([None, [1.0, 0.1, -3], [0, 1e-3, 7.0]])
    plain, checked = replace(rollout), replace(rollout)
    ours = plain_score(plain, functions, weights)
    theirs = score(checked, functions, weights)
    assert repr(ours) == repr(theirs)  # NaN where a function was silent
    torch.testing.assert_close(
        plain.rewards, checked.rewards, rtol=0, atol=0, equal_nan=True
    )
    assert plain.scored.equal(checked.scored)
    if plain.step_rewards is None:
        assert checked.step_rewards is None
    else:
        assert ended_steps(plain) == ended_steps(checked)
    with pytest.raises(ValueError, match="one for each of 3 functions"):
        plain_score(plain, functions, [1.0])


def test_steps_and_scores_together(tokenizer):
    """A score beside steps is one more step at the last token; weights and
    abstentions hold for steps, too."""

    def steps(completions, **_):
        return [[(0, 1.0), (1, 0.5)], None, []]

    def plain(completions, **_):
        return [2.0, 3.0, None]

    rollout = as_rollout(tokenizer, [Query("1+2=")], ["34", "34", "34"])
    metrics = score(rollout, [steps, plain], weights=[10.0, 0.1])
    assert rollout.scored.tolist() == [True, True, True]
    first, second, third = ended_steps(rollout)
    assert (list(first), list(second), list(third)) == ([0, 1, 2], [2], [])
    close([*first.values(), *second.values()], [10, 5, 0.2, 0.3])
    close(rollout.rewards.double(), [15.2, 0.3, 0], 1e-6)
    close([metrics["rewards/steps/mean"], metrics["rewards/plain/mean"]], [0.75, 2.5])
    score(rollout, [lambda **_: [[(0, 1.0)], None, [(2, 0.0)]]])
    assert rollout.scored.tolist() == [True, False, True]
    assert ended_steps(rollout) == [{0: 1.0}, {}, {2: 0.0}]


@pytest.mark.parametrize("score", [score, plain_score])
def test_steps_that_end_at_one_token_are_one(tokenizer, score):
    "Of one function, and of several with their weights, before any statistics."

    def twice(**_):
        return [[(0, 1.0), (0, 0.5), (1, 2.0)]]

    def again(**_):
        return [[(1, 3.0)]]

    rollout = as_rollout(tokenizer, [Query("1+2=")], ["34"])
    score(rollout, [twice, again], weights=[1.0, 10.0])
    assert ended_steps(rollout) == [{0: 1.5, 1: 32.0}] and rollout.rewards == 33.5


@pytest.mark.parametrize("score", [score, plain_score])
def test_a_step_of_an_empty_completion(tokenizer, score):
    "There is no token that it could end at: it is dropped, and nothing is scored."

    def steps(**_):
        return [[(0, 1.0)], [(-1, 1.0)], []]

    def plain(**_):
        return [2.0, 3.0, 4.0]

    for functions, expected in [([steps], 1.0), ([steps, plain], 3.0)]:
        rollout = as_rollout(tokenizer, [Query("1+2=")], ["3", "4", "5"])
        rollout.completion_mask[1:] = False
        score(rollout, functions)
        assert rollout.scored.tolist() == [True, False, False]
        assert rollout.rewards[0] == expected and rollout.rewards[1:].isnan().all()
        assert rollout.step_rewards[1:].isnan().all()
        assert (group_box(rollout, short_config())[1:] == 0).all()


@pytest.mark.parametrize(
    "returned, error, words",
    [
        ([[(3, 1.0)], [], []], ValueError, ["token 3", "completion 0", "0..2"]),
        ([[(-1, 1.0)], [], []], ValueError, ["token -1"]),
        ([[(0, math.nan)], [], []], ValueError, ["nan", "finite"]),
        ([[(0.5, 1.0)], [], []], TypeError, ["(0.5, 1.0)"]),
        ([[(0, 1.0, 2)], [], []], TypeError, ["(0, 1.0, 2)"]),
    ],
)
def test_wrong_steps_are_refused(tokenizer, returned, error, words):
    rollout = as_rollout(tokenizer, [Query("1+2=")], ["34", "34", "34"])
    with pytest.raises(error) as caught:
        score(rollout, [lambda **_: returned])
    for word in words:
        assert word in str(caught.value)
    assert rollout.rewards is None and rollout.step_rewards is None


def test_process_rewards_of_ppo(rollout):
    """Each step's reward lands on its last token, on top of the price of the KL;
    their sum is that of outcome supervision."""
    n = rollout.completion_mask.sum(1).tolist()
    steps = replace(
        rollout,
        step_rewards=dense_steps([[(0, 0.25), (k - 1, 0.5)] for k in n], max(n)),
        rewards=torch.full((9,), 0.75).double(),
    )
    none, plain, by_steps = (
        token_rewards(r, 0.1)
        for r in (
            replace(rollout, rewards=torch.zeros(9).double()),
            replace(steps, step_rewards=None),
            steps,
        )
    )
    for i, k in enumerate(n):
        expected = none[i].clone()
        expected[0] += 0.25
        expected[k - 1] += 0.5
        close(by_steps[i], expected)
    close(by_steps.sum(1), plain.sum(1))


@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(0, 4), st.floats(-5, 5).map(lambda x: round(x, 2))),
            max_size=3,
        ),
        min_size=6,
        max_size=6,
    ),
    st.sampled_from(list(SCALES)),
    st.sampled_from(["mean", "leave_one_out"]),
)
def test_process_advantages_by_definition(steps, scale, baseline):
    """Section 4.1.3 in plain Python: pool the steps of a group, standardise, and
    give a token the sum of the steps that end at or after it."""
    result = process_advantages(dense_steps(steps, 5), 3, scale, baseline, eps=0.0)
    expected = process_advantages_by_definition(
        steps, 3, 5, scale=scale, baseline=baseline, eps=0.0
    )
    torch.testing.assert_close(
        result, torch.tensor(expected, dtype=DOUBLE), rtol=1e-5, atol=1e-5
    )


def test_dense_steps_are_the_lists():
    "3,000 groups, with every choice: a tensor with NaN says what lists of steps say."
    draw = random.Random(0)
    for trial in range(300):
        G, T = draw.randint(2, 5), draw.randint(1, 9)
        steps = [random_steps(draw, T) for _ in range(10 * G)]
        options = {
            "scale": draw.choice(list(SCALES)),
            "baseline": draw.choice(["mean", "leave_one_out"]),
        }
        expected = process_advantages_by_definition(steps, G, T, **options)
        close(process_advantages(dense_steps(steps, T), G, *options.values()), expected)


def random_steps(draw, T):
    "Up to four steps of a completion of up to T tokens; several may end at one token."
    length = draw.randint(0, T)
    rewards = [0.0, 0.5, 1.0, 1 / 3, 0.7]
    return [
        (draw.randrange(length), draw.choice(rewards))
        for _ in range(draw.randint(0, 4) if length else 0)
    ]


@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 0.5, 1.0]), max_size=3), min_size=6, max_size=6
    )
)
def test_a_group_is_informative_if_an_advantage_is_not_zero(steps):
    """For steps and for outcomes alike: what dynamic sampling keeps is what has a
    gradient. A group of equal sums of different steps has one."""
    rollout = SimpleNamespace(
        num_generations=3,
        rewards=torch.tensor([float(sum(s)) for s in steps]),
        step_rewards=dense_steps([list(enumerate(s)) for s in steps], 3),
        completion_mask=torch.ones(6, 3, dtype=torch.bool),
    )
    A = process_advantages(rollout.step_rewards, 3).view(2, -1)
    assert (A.abs().amax(1) > 0).tolist() == informative(rollout).tolist()
    outcomes = group_advantages(rollout.rewards, 3).view(2, -1)
    assert (outcomes.abs().amax(1) > 0).tolist() == informative(
        SimpleNamespace(num_generations=3, rewards=rollout.rewards, step_rewards=None)
    ).tolist()


def test_steps_that_nobody_gave(tokenizer):
    """Empty lists of steps for all: judged, worth 0, and no advantage; no crash on
    integers."""
    rollout = as_rollout(tokenizer, [Query("1+2=")], ["3", "4"])
    assert score(rollout, [lambda **_: [[], []]]) == {"rewards/<lambda>/mean": 0.0}
    assert (
        rollout.rewards.tolist() == [0, 0]
        and rollout.scored.all()
        and group_box(rollout, short_config()).abs().sum() == 0
    )


def test_process_supervision_is_chosen_by_the_reward(tokenizer):
    "The box of the figure sees steps and gives one advantage a token; none on padding."
    rollout = as_rollout(
        tokenizer, [Query("12+34=", {"answer": "46"})], ["46", "4", "56", "47777"]
    )
    score(rollout, [process_reward(load_task("add"), tokenizer)])
    A = group_box(rollout, short_config())
    assert (
        A.shape == rollout.completion_mask.shape
        and A[~rollout.completion_mask].abs().sum() == 0
    )
    assert A[0, 0] > A[3, 0] and A[2, 0] < 0 < A[0, 1]


# Dynamic sampling ---------------------------------------------------------------------


def sampler(tokenizer, seen):
    "Query i gives a group of two whose scores differ if and only if i is odd."

    def sample(queries):
        seen.append([int(q.prompt[:-1]) for q in queries])
        return as_rollout(tokenizer, queries, ["1", "22"] * len(queries))

    def judge(rollout):
        return score(
            rollout,
            [
                lambda prompts, **_: [
                    float(int(p[:-1]) % 2 and i % 2) for i, p in enumerate(prompts)
                ]
            ],
        )

    return sample, judge


@pytest.mark.parametrize(
    "rounds, kept, drawn, seen",
    [
        (0, [0, 1, 2, 3], None, [[0, 1, 2, 3]]),
        (1, [1, 3, 5], 12, [[0, 1, 2, 3], [4, 5]]),
        (2, [1, 3, 5], 14, [[0, 1, 2, 3], [4, 5], [6]]),
        (3, [1, 3, 5, 7], 16, [[0, 1, 2, 3], [4, 5], [6], [7]]),
        (9, [1, 3, 5, 7], 16, [[0, 1, 2, 3], [4, 5], [6], [7]]),
    ],
)
def test_dynamic_sampling(tokenizer, rounds, kept, drawn, seen):
    """Only what is missing is sampled again, only groups with variance stay, and
    every sample is counted; metrics are of the first round."""
    calls = []
    queries = [Query(f"{i}=") for i in range(4 if rounds == 0 else 20)]
    rollout, metrics = dynamic_sampling(
        *sampler(tokenizer, calls),
        queries,
        SimpleNamespace(num_prompts=4, dynamic_sampling=rounds),
    )
    assert [int(q.prompt[:-1]) for q in rollout.queries] == kept and calls == seen
    assert len(rollout) == 2 * len(kept) and metrics["rewards/<lambda>/mean"] == 0.25
    if rounds:
        assert (
            metrics["num_sampled"] == drawn
            and metrics["frac_reward_zero_std"] == 0.5
            and metrics["reward"] == 0.25
            and has_variance(rollout.rewards, 2).all()
        )


def test_dynamic_sampling_without_anything_to_learn(tokenizer):
    """All groups equal, or no spare query: no error, and the first round is what is
    left."""
    sample, judge = sampler(tokenizer, [])
    config = SimpleNamespace(num_prompts=2, dynamic_sampling=3)
    rollout, metrics = dynamic_sampling(
        sample, judge, [Query(f"{i}=") for i in (0, 2, 4, 6)], config
    )
    assert (
        [q.prompt for q in rollout.queries] == ["0=", "2="]
        and metrics["num_sampled"] == 8
        and metrics["dynamic_sampling/groups"] == 0
    )
    rollout, metrics = dynamic_sampling(
        sample, judge, [Query("0="), Query("1=")], config
    )
    assert [q.prompt for q in rollout.queries] == ["1="] and metrics["num_sampled"] == 4


def test_dynamic_sampling_in_a_run(tmp_path):
    """`num_completions` counts what was thrown away, `completions.parquet` holds
    what was learned from."""
    run = train(
        short_config(dynamic_sampling=3, max_steps=3, output_dir=str(tmp_path / "run")),
        progress=False,
    )
    counted, lines = 0, read_metrics(run.directory)
    for line in lines:
        rows = run.completions.query(f"step == {line['step']}")
        assert line["num_completions"] - counted >= len(rows) and len(rows) % 4 == 0
        counted = line["num_completions"]
    assert counted > len(run.completions) or all(
        line["frac_reward_zero_std"] == 0 for line in lines
    )


# PPO ----------------------------------------------------------------------------------


def test_whitened_rewards_keep_their_mean(rollout):
    "Unit standard deviation over the tokens with loss, the same mean, before GAE."
    config = short_config(
        algorithm="ppo", whiten_rewards=True, whiten_advantages=False, lam=1.0
    )
    rewards, mask = token_rewards(rollout, 0.1), rollout.completion_mask
    _, returns = gae_advantages(rollout, rewards, config)
    scaled = (rewards[mask] - rewards[mask].mean()) / rewards[mask].std() + rewards[
        mask
    ].mean()
    for i, n in enumerate(mask.sum(1).tolist()):
        close(returns[i, 0], scaled[int(mask[:i].sum()) :][:n].sum(), 1e-6)
    close(whiten(rewards, mask, shift_mean=False)[mask].mean(), rewards[mask].mean())


def test_a_head_on_the_trunk_adds_its_gradient_to_the_policy(tokenizer):
    """The gradient in the policy is that of the policy loss plus vf_coef times that
    of the value loss, by autograd on the sum."""
    policy = random_model("gpt2")
    rollout, value = random_rollout(policy, tokenizer), ValueModel(policy, shared=True)
    torch.nn.init.normal_(value.head.weight, generator=torch.Generator().manual_seed(0))
    assert (
        sum(p.numel() for p in value.parameters()) == 17
        and value.trunk is policy.base_model
    )
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.0) for m in (policy, value)]

    def step(vf_coef, budget=10_000):
        config = short_config(
            algorithm="ppo",
            value_model="head",
            vf_coef=vf_coef,
            max_grad_norm=1e9,
            max_tokens_per_micro_batch=budget,
        )
        update(
            EngineModels(
                policy, None, optimizers[0], value=value, value_optimizer=optimizers[1]
            ),
            rollout,
            config,
        )
        return gradient(policy).clone(), gradient(value).clone()

    policy.zero_grad()
    value.zero_grad()
    value_loss(
        value(rollout), rollout.values, rollout.returns, rollout.completion_mask, 0.2
    ).backward()
    of_value, of_head = gradient(policy).clone(), gradient(value).clone()
    (small, head), (large, _), (cut, _) = step(0.1), step(0.6), step(0.1, budget=1)
    close(large - small, 0.5 * of_value)
    close(head, 0.1 * of_head)
    close(cut, small)
    assert of_value.abs().max() > 1e-3


def test_a_separate_value_model_leaves_the_policy_alone(rollout):
    """Its own weights: the value loss gives the policy no gradient, and training it
    does not move the policy."""
    policy = random_model("llama")
    value = ValueModel(policy)
    torch.nn.init.normal_(value.head.weight, generator=torch.Generator().manual_seed(0))
    value_loss(
        value(rollout), rollout.values, rollout.returns, rollout.completion_mask
    ).backward()
    assert gradient(policy).abs().max() == 0 and gradient(value).abs().max() > 1e-3


def test_a_head_trains_and_is_judged_like_a_model(tmp_path):
    """A run of PPO with a head: the critic's own parameters are its head's, and the
    value loss falls."""
    run = train(
        short_config(
            algorithm="ppo",
            value_model="head",
            vf_coef=0.1,
            num_prompts=32,
            max_steps=12,
            beta=0.0,
            output_dir=str(tmp_path / "run"),
        ),
        progress=False,
    )
    loss = run.metrics["value_loss"]
    assert (
        loss.iloc[-4:].mean() < loss.iloc[:2].mean()
        and run.metrics["value_grad_norm"].gt(0).all()
    )


# The outer loop -----------------------------------------------------------------------


def test_pairs_of_a_group(tokenizer):
    """Each distinct wrong answer once, beside a right one of its own group; groups
    without a choice give nothing."""
    task, (a, b, c) = (
        load_task("add"),
        [
            Query(p, {"answer": s})
            for p, s in (("1+2=", "3"), ("2+2=", "4"), ("3+3=", "6"))
        ],
    )
    rollout = as_rollout(
        tokenizer,
        [a, b, c],
        ["3", "4", "5", "5", "4", "4", "4", "4", "1", "2", "3", "4"],
    )
    assert preference_pairs(rollout, task.is_right) == [(a, "3", "4"), (a, "3", "5")]


def test_outer_iteration():
    """Due at the first step and after every `ref_model_sync_steps`; the reference
    becomes the policy, a tenth of what the reward model learns from is replayed."""
    config = short_config(
        ref_model_sync_steps=3,
        reward_funcs=["learned"],
        beta=0.1,
        reward_model_prompts=60,
        reward_model_steps=2,
    )
    task, generator, preferences = (
        load_task("add"),
        torch.Generator().manual_seed(0),
        [],
    )
    models = build_models(config, task)
    before = copy.deepcopy(models.rewards[0].model.state_dict())
    assert isinstance(models.rewards[0], RewardModel) and not any(
        p.requires_grad for p in models.rewards[0].model.parameters()
    )
    first = outer_iteration(config, task, models, generator, 1, preferences)
    assert first["reward_model/pairs"] == len(preferences) > 10 and any(
        not before[k].equal(x) for k, x in models.rewards[0].model.state_dict().items()
    )
    for p in preferences:
        assert task.is_right(
            p["chosen"], task.parse(p["prompt"])
        ) and not task.is_right(p["rejected"], task.parse(p["prompt"]))
    with torch.no_grad():
        next(models.policy.parameters()).add_(0.01)
    for step in (2, 3):
        assert outer_iteration(config, task, models, generator, step, preferences) == {}
    assert not next(models.policy.parameters()).equal(
        next(models.reference.parameters())
    )
    n = len(preferences)
    fourth = outer_iteration(config, task, models, generator, 4, preferences)
    assert all(
        a.equal(b)
        for a, b in zip(models.policy.parameters(), models.reference.parameters())
    )
    fresh = len(preferences) - n
    assert fourth["reward_model/pairs"] - fresh == min(n, round(fresh / 9)) and {
        p["step"] for p in preferences
    } == {1, 4}
    assert not any(
        p.requires_grad
        for p in (*models.reference.parameters(), *models.rewards[0].model.parameters())
    )
    models.generator = generator
    STEPS["grpo"](
        models, task.queries("train", 4), config
    )  # the renewed boxes go on working


def test_without_an_outer_loop_nothing_is_renewed():
    models = SimpleNamespace(reference=None, rewards=[], learned=None)
    for step in (1, 2, 100):
        assert outer_iteration(short_config(), None, models, None, step, []) == {}


def test_nothing_to_prefer_is_an_error_at_the_start(tmp_path):
    "An untrained reward model is not optimised against; nothing is left half done."
    task = replace(load_task("add"), is_right=lambda completion, query: False)
    with pytest.raises(ValueError, match="no preference among 8 queries"):
        train(
            short_config(
                reward_funcs=["learned"],
                reward_model_prompts=8,
                output_dir=str(tmp_path / "run"),
            ),
            task,
            progress=False,
        )


def test_a_reward_in_place_of_the_learned_one(tmp_path):
    """Functions given as objects replace those of the config: nothing is learned,
    and a name among them is a name."""
    config = short_config(
        recipe="iterative",
        num_generations=4,
        reward_model_prompts=8,
        reward_model_steps=1,
        output_dir=str(tmp_path / "a"),
    )
    run = train(
        config,
        reward_funcs=[lambda completions, **_: [float(len(c)) for c in completions]],
        progress=False,
    )
    assert (
        "reward_model/pairs" not in run.metrics
        and not (run.directory / "reward_model").exists()
    )
    models = build_models(short_config(), load_task("add"), ["accuracy", "learned"])
    assert (
        models.learned is models.rewards[1]
        and build_models(short_config(), load_task("add")).learned is None
    )
    with pytest.raises(ValueError, match='one "learned"'):
        short_config(reward_funcs=["learned", "learned"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_completion_is_counted(tmp_path, monkeypatch, recipe):
    """`num_completions` is what was sampled with temperature, for every recipe:
    refills and preferences included, evaluation (greedy) not."""
    drawn = []

    def spied(draw):
        def spy(*arguments, **options):
            rollout = draw(*arguments, **options)
            if options.get("top_k") != 1:
                drawn.append(len(rollout))
            return rollout

        return spy

    monkeypatch.setattr(EngineModels, "sample", spied(EngineModels.sample))
    # of evaluations, and of preferences
    monkeypatch.setattr(training, "sample", spied(training.sample))
    monkeypatch.setattr(iterative, "sample", spied(iterative.sample))
    options = (
        {
            "num_generations": 4,
            "reward_model_prompts": 10,
            "reward_model_steps": 1,
            "ref_model_sync_steps": 1,
        }
        if recipe == "iterative"
        else {"num_generations": 4}
        if recipe != "ppo"
        else {"algorithm": "ppo"}
    )
    run = train(
        short_config(
            recipe=recipe, max_steps=2, output_dir=str(tmp_path / "run"), **options
        ),
        progress=False,
    )
    assert run.metrics["num_completions"].iloc[-1] == sum(drawn) >= 2 * 4


def test_more_steps_later_is_more_steps_at_once(tmp_path):
    """The outer loop does not depend on `max_steps`: two steps and two more, with a
    reward model that is trained on in between."""
    options = dict(
        recipe="iterative",
        num_generations=4,
        ref_model_sync_steps=2,
        reward_model_prompts=8,
        reward_model_steps=2,
        save_steps=2,
    )
    for name, steps in {"once": [4], "twice": [2, 4]}.items():
        for n in steps:
            train(
                short_config(
                    **options,
                    max_steps=n,
                    resume=n == 4 and name == "twice",
                    eval_steps=2,
                    output_dir=str(tmp_path / name),
                ),
                progress=False,
            )
            if n == 2:
                (tmp_path / name / "model").rename(tmp_path / "set aside")
    a, b = (tmp_path / name for name in ("once", "twice"))
    assert [reproducible(line) for line in read_metrics(a)] == [
        reproducible(line) for line in read_metrics(b)
    ]
    for name in (
        "model/model.safetensors",
        "reward_model/model.safetensors",
        "preferences.jsonl",
    ):
        assert (a / name).read_bytes() == (b / name).read_bytes()


def test_scores_do_not_depend_on_autocast(tiny):
    "A reward model scores in its own precision, also inside a bfloat16 run."
    reward = RewardModel.from_policy(*tiny)
    answers = ["1", "22", "333"]
    plain = reward(prompts=["1+2="] * 3, completions=answers)
    with torch.autocast("cpu", torch.bfloat16):
        assert reward(prompts=["1+2="] * 3, completions=answers) == plain


@pytest.mark.parametrize("recipe", ["dapo", "iterative", "deepseekmath_process"])
def test_recipes_in_bfloat16(tmp_path, recipe):
    small = (
        {"reward_model_prompts": 8, "reward_model_steps": 1}
        if recipe == "iterative"
        else {}
    )
    run = train(
        short_config(
            recipe=recipe,
            num_generations=4,
            dtype="bfloat16",
            max_steps=2,
            output_dir=str(tmp_path / "run"),
            **small,
        ),
        progress=False,
    )
    assert all(p.isfinite().all() for p in run.policy.parameters())


def test_preferences_of_a_run_can_be_read(tmp_path):
    run = train(
        short_config(
            recipe="iterative",
            num_prompts=8,
            num_generations=8,
            max_steps=3,
            ref_model_sync_steps=2,
            reward_model_prompts=20,
            reward_model_steps=2,
            output_dir=str(tmp_path / "run"),
        ),
        progress=False,
    )
    lines = [
        json.loads(line)
        for line in (run.directory / "preferences.jsonl").read_text().splitlines()
    ]
    assert {line["step"] for line in lines} == {1, 3} and set(lines[0]) == {
        "step",
        "prompt",
        "chosen",
        "rejected",
    }
    assert (
        run.metrics["kl"][3] < 1e-6 < run.metrics["kl"][2]
    )  # at step 3 the policy has just become the reference
