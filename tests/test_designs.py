"""Designs: a step with any baseline is the step that it is said to be, and runs in
pieces are made once, whoever makes them."""

import pandas as pd
import pytest
import torch

from grpo_nb.algorithm import grpo_step, ppo_step
from grpo_nb.engine.data import load_task
from grpo_nb.evidence.designs import (
    MEANS,
    VALUES,
    Pieces,
    baseline_run,
    baseline_step,
    difference_of_shares,
    exact_values,
    judge,
    mean_of_steps,
)
from grpo_nb.evidence.statistics import Claim
from grpo_nb.evidence.sweep import grid
from grpo_nb.policy import as_rollout, token_logprobs
from grpo_nb.run.build import build_models
from grpo_nb.run.options import make_config
from grpo_nb.run.training import step_queries

TASK = load_task("add")


def built(algorithm="ppo", seed=0, **options):
    config = make_config(
        algorithm=algorithm, beta=0.0, max_completion_length=8, device="cpu", **options
    )
    models = build_models(config, TASK)
    models.generator = torch.Generator().manual_seed(seed)
    return models, config


def rolled(baseline="batch mean", answers=4, queries=6):
    models, config = built(num_prompts=queries * answers)
    asked = TASK.queries("train", queries)
    rollout, explained = baseline_step(models, asked, baseline, answers, config)
    return rollout, explained, models


def weights(models):
    return torch.cat([p.detach().flatten() for p in models.policy.parameters()])


def test_with_a_value_model_it_is_the_step_of_ppo():
    asked = TASK.queries("train", 8)
    ours, config = built(num_prompts=8)
    theirs, _ = built(num_prompts=8)
    rollout, _ = baseline_step(ours, asked, "value model", 1, config)
    expected, _ = ppo_step(theirs, asked, config)
    assert rollout.completions == expected.completions
    assert rollout.advantages.equal(expected.advantages)
    assert weights(ours).equal(weights(theirs))
    for one, other in zip(ours.value.parameters(), theirs.value.parameters()):
        assert one.equal(other)


def test_with_grpo_its_advantages_are_those_of_the_step_of_grpo():
    asked = TASK.queries("train", 6)
    models, config = built("grpo", num_prompts=6, num_generations=4)
    rollout, _ = grpo_step(models, asked, config)
    expected = rollout.advantages
    rollout.advantages = None
    judge(models, rollout, "GRPO", 4, config)
    mask = rollout.completion_mask
    assert expected.abs().max() > 0
    assert rollout.advantages.equal(expected[:, None].where(mask, 0.0))


@pytest.mark.parametrize("baseline", ["batch mean", "group mean"])
def test_a_mean_is_taken_off_and_the_tokens_are_whitened(baseline):
    rollout, explained, _ = rolled(baseline)
    rewards = rollout.rewards.tolist()
    rows = [[] for _ in rewards]
    for i, reward in enumerate(rewards):
        others = rewards
        if baseline == "group mean":
            others = rewards[i // 4 * 4 : i // 4 * 4 + 4]
        length = int(rollout.completion_mask[i].sum())
        rows[i] = [reward - sum(others) / len(others)] * length
    flat = [x for row in rows for x in row]
    mean = sum(flat) / len(flat)
    std = (sum((x - mean) ** 2 for x in flat) / (len(flat) - 1)) ** 0.5
    assert std > 0 and explained is None
    for row, advantages in zip(rows, rollout.advantages):
        expected = torch.tensor([(x - mean) / std for x in row])
        torch.testing.assert_close(advantages[: len(row)], expected, atol=1e-5, rtol=0)
        assert (advantages[len(row) :] == 0).all()


@pytest.mark.parametrize("baseline", [*MEANS, "exact value"])
def test_a_value_model_that_judges_nothing_does_not_learn(baseline):
    _, _, models = rolled(baseline)
    fresh, _ = built(num_prompts=24)
    for one, other in zip(models.value.parameters(), fresh.value.parameters()):
        assert one.equal(other)
    assert not weights(models).equal(weights(fresh))
    assert models.value is not None


def test_exact_values_are_what_is_left_of_the_right_answer():
    models, _ = built()
    query = TASK.parse("47+38=")
    texts = ["85", "8", "95", "85", "851", ""]
    rollout = as_rollout(models.tokenizer, [query] * len(texts), texts)
    with torch.no_grad():
        p = token_logprobs(models.policy, rollout)[0].exp()  # of 8, 5 and the end
    all_, rest, end = (p[0] * p[1] * p[2]).item(), (p[1] * p[2]).item(), p[2].item()
    T = rollout.completion_ids.shape[1]
    expected = [
        [all_, rest, end],
        [all_, rest],
        [all_, 0.0, 0.0],
        [all_, rest, end],
        [all_, rest, end, 0.0],
        [all_],
    ]
    expected = [row + [0.0] * (T - len(row)) for row in expected]
    got = exact_values(models.policy, models.tokenizer, rollout)
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_a_group_of_one_and_another_baseline_are_refused():
    models, config = built(num_prompts=4)
    asked = TASK.queries("train", 4)
    with pytest.raises(ValueError, match="num_generations must be at least 2"):
        baseline_step(models, asked, "GRPO", 1, config)
    with pytest.raises(ValueError, match="baseline must be .*, got 'mean of all'"):
        baseline_step(models, asked, "mean of all", 1, config)
    assert "exact value" in VALUES


@pytest.fixture
def claim(tmp_path):
    claim = Claim("example", "Nothing.", rerun=True)
    claim.root = tmp_path
    claim.directory = tmp_path / "runs"
    claim.results = tmp_path / "results"
    return claim


def counted(made):
    def one_run(cell):
        made.append(cell["seed"])
        return pd.DataFrame({"step": [5, 10], "reward": 0.5}).assign(**cell)

    return one_run


CELLS = grid(baseline="GRPO", rate=[1e-4, 0.1], seed=[0, 1])


def test_pieces_share_the_runs_and_none_is_made_twice(claim):
    made = []
    first = Pieces(claim, counted(made), piece=0, pieces=2)
    second = Pieces(claim, counted(made), piece=1, pieces=2)
    assert first.table("runs", CELLS, making=True)["run"].nunique() == 2
    assert made == [0, 0]
    table = second.table("runs", CELLS, making=True)
    assert made == [0, 0, 1, 1] and table["run"].nunique() == 4
    again = first.table("runs", CELLS, making=True)
    assert len(made) == 4
    pd.testing.assert_frame_equal(again, table)


def test_a_committed_table_gives_its_runs_back(claim):
    made = []
    design = Pieces(claim, counted(made))
    table = design.table("runs", CELLS[:3], making=True)
    for path in claim.directory.iterdir():
        path.unlink()
    everything = design.table("runs", CELLS, making=True)
    assert len(made) == 4  # the fourth alone was missing
    pd.testing.assert_frame_equal(everything[everything["run"] < 3], table)


def test_no_run_begins_when_the_minutes_are_over(claim):
    made = []
    Pieces(claim, counted(made)).table("runs", CELLS[:1], making=True)
    late = Pieces(claim, counted(made), minutes=0.0)
    table = late.table("runs", CELLS, making=True)
    assert len(made) == 1 and table["run"].nunique() == 1


def test_numbers_are_found_again_as_a_table_has_them(claim):
    made = []
    cells = grid(rate=[1 / 3, 1e-4], baseline="GRPO", seed=[0, 12345678])
    design = Pieces(claim, counted(made))
    design.table("runs", cells, making=True)
    for path in claim.directory.iterdir():
        path.unlink()
    design.table("runs", cells, making=True)
    assert len(made) == 4


def test_a_table_of_another_design_is_not_overwritten(claim):
    made = []
    design = Pieces(claim, counted(made))
    design.table("runs", CELLS, making=True)
    kept = (claim.results / "example_runs.csv").read_text()
    with pytest.raises(ValueError, match="2 runs .* would be lost, as .*0.1.*'seed'"):
        design.table("runs", CELLS[:2], making=True)
    with pytest.raises(ValueError, match="of another design: it has no column 'lam'"):
        design.table("runs", [cell | {"lam": 1.0} for cell in CELLS], making=True)
    assert (claim.results / "example_runs.csv").read_text() == kept


def test_what_cannot_be_is_refused(claim):
    with pytest.raises(ValueError, match="piece must be at least 0 and below pieces"):
        Pieces(claim, counted([]), piece=2, pieces=2)
    with pytest.raises(ValueError, match="no run is there: .* minutes = 0 were over"):
        Pieces(claim, counted([]), minutes=0.0).table("runs", CELLS, making=True)


def test_without_a_table_there_is_nothing_to_read(claim):
    design = Pieces(claim, counted([]))
    assert design.table("runs", CELLS) is None
    made = design.table("runs", CELLS, making=True)
    pd.testing.assert_frame_equal(design.table("runs", CELLS), made)


@pytest.mark.parametrize(
    ("counts", "ends"),
    [  # Newcombe 1998, table II, method 10
        ((56, 70, 48, 80), (0.0524, 0.3339)),
        ((9, 10, 3, 10), (0.1705, 0.8090)),
        ((6, 7, 2, 7), (0.0582, 0.8062)),
        ((5, 56, 0, 29), (-0.0381, 0.1926)),
        ((0, 10, 0, 20), (-0.1611, 0.2775)),
        ((10, 10, 0, 10), (0.6075, 1.0)),
    ],
)
def test_the_difference_of_two_shares_has_the_interval_that_newcombe_printed(
    counts, ends
):
    _, low, high = difference_of_shares(*counts)
    assert (round(low, 4), round(high, 4)) == ends


@pytest.mark.parametrize("counts", [(0, 0, 1, 2), (7, 6, 1, 2), (1, 2, -1, 2)])
def test_a_share_of_no_runs_is_refused(counts):
    with pytest.raises(ValueError, match="must be a whole number from 0 to of_"):
        difference_of_shares(*counts)


def test_a_temperature_counts_in_exact_values():
    models, _ = built()
    query = TASK.parse("47+38=")
    rollout = as_rollout(models.tokenizer, [query], ["85"])
    with torch.no_grad():
        p = token_logprobs(models.policy, rollout, 0.5)[0].sum().exp().item()
    assert exact_values(models.policy, models.tokenizer, rollout, 0.5)[
        0, 0
    ].item() == pytest.approx(p, rel=1e-5)


def test_exact_values_of_a_group_are_those_of_its_query_repeated():
    models, _ = built()
    query = TASK.parse("47+38=")
    apart = as_rollout(models.tokenizer, [query] * 2, ["85", "95"])
    group = as_rollout(models.tokenizer, [query] * 2, ["85", "95"])
    group.queries = [query]
    group.num_generations = 2
    one, other = (
        exact_values(models.policy, models.tokenizer, rollout)
        for rollout in (apart, group)
    )
    torch.testing.assert_close(one, other)


def test_a_run_is_its_steps_and_in_a_head_start_the_policy_rests():
    models, config = built(seed=7, num_prompts=8)
    config.seed = 3
    rows = baseline_run(models, TASK, "GRPO", 2, 4, 3, config)
    by_hand, _ = built(seed=3, num_prompts=8)
    rewards = [
        baseline_step(by_hand, step_queries(TASK, 2, 3, step), "GRPO", 4, config)[0]
        .rewards.double()
        .mean()
        .item()
        for step in (1, 2, 3)
    ]
    assert rows["step"].tolist() == [1, 2, 3] and rows["reward"].tolist() == rewards
    assert rows["explained"].isna().all()
    assert weights(models).equal(weights(by_hand))

    models, config = built(num_prompts=8)
    fresh = weights(models).clone()
    rows = baseline_run(models, TASK, "value model", 8, 1, 0, config, head_start=2)
    assert rows["step"].tolist() == [-1, 0] and rows["explained"].notna().all()
    assert weights(models).equal(fresh)
    assert not models.value.head.weight.equal(built()[0].value.head.weight)


def test_steps_are_averaged_up_to_the_one_that_names_them():
    rows = pd.DataFrame({"step": [1, 2, 3, 4, 5], "reward": [1.0, 2, 3, 4, 5]})
    found = mean_of_steps(rows, 2)
    assert found["step"].tolist() == [2, 4, 6]
    assert found["reward"].tolist() == [1.5, 3.5, 5.0]
