"""A look into a run: what is recorded of a step is what the step knew, and the
diagnostics of the update are what their definitions say."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from grpo_nb import gae
from grpo_nb.evidence.plots import show_group
from grpo_nb.group import group_advantages
from grpo_nb.models import Models
from grpo_nb.policy import load_policy, token_logprobs
from grpo_nb.reference import token_rewards
from grpo_nb.run.diagnostics import ObservedModels, StepGroups, explained_variance
from grpo_nb.run.diagnostics import groups_from_rows, noise_scale, signal_and_noise
from grpo_nb.run.diagnostics import update_metrics
from grpo_nb.run.run_directory import Completions, read_completions
from grpo_nb.run.training import open_run, table, train
from grpo_nb.update import batch_loss, update
from helpers import character_tokenizer, random_model, random_rollout
from helpers import read_metrics, reproducible, run, same_run, short_config

# Definitions --------------------------------------------------------------------------


def test_explained_variance_is_its_definition():
    "Against numpy, on the real tokens alone; none where nothing varies."
    rng = np.random.default_rng(0)
    values, returns = torch.tensor(rng.normal(size=(2, 5, 4)))
    mask = torch.tensor(rng.random((5, 4)) < 0.6)
    v, r = values[mask].numpy(), returns[mask].numpy()
    truth = 1 - np.var(r - v) / np.var(r)
    assert math.isclose(explained_variance(values, returns, mask), truth)
    assert explained_variance(returns + 3, returns, mask) == pytest.approx(1)
    assert explained_variance(values, torch.ones_like(returns), mask) is None
    assert explained_variance(values, returns, torch.zeros_like(mask)) is None


def test_kl_and_clip_of_a_step_by_hand():
    """Ratios 1/2, 1, 3/2 and, on padding, 9: k3 is rho - 1 - log rho, and two of three
    tokens are outside [0.8, 1.2]; with one ratio a sequence, of its mean."""
    rollout = random_rollout(random_model(), character_tokenizer(), 1, 4, ("1+2=",))
    rollout = rollout.select([0])
    mask = torch.tensor([[True, True, True, False]])
    rho = torch.tensor([[0.5, 1.0, 1.5, 9.0]], dtype=torch.float64)
    rollout.completion_mask = mask
    groups = StepGroups(1, rollout, new_logprobs=rollout.logprobs + rho.log())
    found = update_metrics(groups, short_config())
    kls = [x - 1 - math.log(x) for x in (0.5, 1.0, 1.5)]
    assert found["update/kl"] == pytest.approx(sum(kls) / 3)
    assert found["update/outside_clip"] == pytest.approx(2 / 3)
    one = update_metrics(groups, short_config(importance_sampling_level="sequence"))
    assert one["update/outside_clip"] == 0  # (1/2 * 1 * 3/2) ** (1/3) = 0.91
    high = update_metrics(groups, short_config(epsilon_high=0.6))
    assert high["update/outside_clip"] == pytest.approx(1 / 3)
    assert update_metrics(StepGroups(1, rollout), short_config()) == {}


# Tokens of a run ----------------------------------------------------------------------

MOVED = {"learning_rate": 1e-3, "max_steps": 1, "log_token_groups": 3}


@pytest.fixture(scope="module", params=["grpo", "ppo"])
def one_step(request, tmp_path_factory):
    "A run of one step: the policy before it is the tiny one, after it the run's."
    directory = tmp_path_factory.mktemp("run") / request.param
    options = MOVED | {"algorithm": request.param}
    if request.param == "ppo":
        options |= {"num_prompts": 8, "whiten_advantages": False}
    return run(directory, **options)


def test_recorded_tokens_are_those_of_the_step(one_step):
    "Against the plain forward pass of the policies before and after the step."
    groups, config = one_step.groups(1), one_step.config
    r = groups.rollout
    mask = r.completion_mask
    start, tokenizer = load_policy("tiny", "cpu")
    with torch.no_grad():
        old, entropy = token_logprobs(start, r, 1.0, return_entropy=True)
        new = token_logprobs(one_step.policy, r)
    for found, truth in (
        (r.logprobs, old),
        (r.ref_logprobs, old),
        (groups.entropy, entropy),
        (groups.new_logprobs, new),
    ):
        torch.testing.assert_close(found[mask], truth[mask], rtol=0, atol=2e-5)
    assert (new - old)[mask].abs().max() > 1e-3
    rows = one_step.completions.head(len(r))
    assert r.completions == rows["completion"].tolist()
    for text, ids, real in zip(r.completions, r.completion_ids, mask):
        assert tokenizer.decode(ids[real], skip_special_tokens=True) == text
    asked = [query.text for query in r.queries]
    assert asked == rows["query"].tolist()[:: r.num_generations]
    prompts = tokenizer.batch_decode(r.prompt_ids, skip_special_tokens=True)
    assert prompts == asked and len(groups) == 3 == config.log_token_groups
    assert r.rewards.tolist() == rows["reward"].tolist()
    assert groups.step == 1 and groups.tokenizer is one_step.tokenizer


def test_advantages_and_values_are_those_of_the_step(one_step):
    r = one_step.groups(1).rollout
    if one_step.config.algorithm == "grpo":
        truth = group_advantages(r.rewards, 4)
        torch.testing.assert_close(r.advantages, truth)
        assert r.values is None and r.returns is None
        return
    rewards = token_rewards(r, one_step.config.beta)
    config = one_step.config
    truth = gae.gae(rewards, r.values, r.completion_mask, config.gamma, config.lam)
    for found, expected in zip((r.advantages, r.returns), truth):
        torch.testing.assert_close(found, expected)


def test_one_row_a_token(one_step):
    "The tidy table says the same, and has a row for each real token."
    groups = one_step.groups(1)
    frame, mask = groups.frame(), groups.rollout.completion_mask
    assert len(frame) == mask.sum()
    last = frame.iloc[-1]
    row = int(last["group"]) * groups.rollout.num_generations + int(last["completion"])
    t = int(last["position"])
    assert last["token_id"] == groups.rollout.completion_ids[row, t]
    ratio = (groups.new_logprobs - groups.rollout.logprobs).exp()
    assert last["ratio"] == pytest.approx(ratio[row, t].item())
    values = {"value", "return"} if one_step.config.algorithm == "ppo" else set()
    assert values == {"value", "return"} & set(frame)


def test_metrics_are_those_of_the_recorded_tokens(one_step):
    line = one_step.metrics.loc[1]
    frame = one_step.groups(1).frame()
    rho = frame["ratio"]
    assert line["update/kl"] == pytest.approx((rho - 1 - np.log(rho)).mean(), abs=1e-6)
    outside = ((rho - 1).abs() > one_step.config.epsilon).mean()
    assert line["update/outside_clip"] == pytest.approx(outside)


def test_a_group_of_a_run_as_a_picture(one_step):
    "By run and step, or by what was recorded: one picture; in text, no escape code."
    view = show_group(one_step, 1, 2, color="ratio")
    groups = one_step.groups(1)
    assert view.html == show_group(groups, 2, "ratio").html
    one = groups.select(2)
    tokens = one.rollout.completion_mask.sum()
    shown = f"ratio {one.numbers['ratio'][0, 0].item():+.3f}"
    assert view.html.count("ratio ") - 1 == tokens and shown in view.html
    lines = view.text.splitlines()
    assert lines[0] == one.rollout.queries[0].text
    assert len(lines) == 2 + len(one.rollout) and repr(view) == view.text
    assert all(text in line for text, line in zip(one.rollout.completions, lines[2:]))
    with pytest.raises(ValueError, match=r"group must lie in 0\.\.2, got 3"):
        show_group(one_step, 1, 3)
    with pytest.raises(ValueError, match="color must be one of log-prob, .*entropy"):
        show_group(one_step, 1, 0, color="colour")


def test_recording_changes_nothing(tmp_path):
    "No group, one, or more than there are: the same run but for what is recorded."
    plain = run(tmp_path / "0", log_token_groups=0, max_steps=2)
    for n in (1, 99):
        other = run(tmp_path / str(n), log_token_groups=n, max_steps=2)
        lines = zip(read_metrics(plain.directory), read_metrics(other.directory))
        for a, b in lines:
            added = {"update/kl", "update/outside_clip"}
            assert b.keys() - a.keys() == added
            kept = {name: x for name, x in b.items() if name not in added}
            assert reproducible(kept) == reproducible(a)
        name = "model/model.safetensors"
        assert (plain.directory / name).read_bytes() == (
            other.directory / name
        ).read_bytes()
        pd.testing.assert_frame_equal(plain.completions, other.completions)
        assert len(other.groups(2)) == min(n, 4)


def test_a_resumed_run_has_the_same_tokens(tmp_path):
    "Bit for bit, from a checkpoint; how many are recorded may change."
    options = {"max_steps": 3, "save_steps": 1, "algorithm": "ppo"}

    def stop(line):
        if line["step"] == 2:
            raise ConnectionError("the power is gone")

    straight = run(tmp_path / "straight", **options)
    config = short_config(output_dir=str(tmp_path / "run"), **options)
    with pytest.raises(ConnectionError):
        train(config, progress=False, on_step=stop)
    resumed = train(replace(config, resume=True), progress=False)
    same_run(straight.directory, resumed.directory)
    with pytest.raises(ConnectionError):
        other = replace(config, output_dir=str(tmp_path / "other"))
        train(other, progress=False, on_step=stop)
    other = replace(other, resume=True, log_token_groups=0)
    directory = train(other, progress=False).directory
    rows = Completions(directory)
    assert [len(rows.tokens(step)) for step in (1, 2, 3)] == [4, 0, 0]


def test_a_run_without_tokens_says_so(tmp_path):
    "None recorded, a step that is not there, and a file of an older version."
    plain = run(tmp_path / "plain", log_token_groups=0)
    with pytest.raises(ValueError, match="no tokens of step 1: .*log_token_groups=0"):
        plain.groups(1)
    with pytest.raises(ValueError, match=r"step must be one of the run's, 1\.\.1.* 7"):
        show_group(plain, 7)
    path = plain.directory / "completions.parquet"
    rows = plain.completions
    rows.to_parquet(path, index=False)
    older = open_run(plain.directory)
    pd.testing.assert_frame_equal(older.completions, rows)
    with pytest.raises(ValueError, match="or by a version that kept none"):
        older.groups(1)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="completions.parquet is damaged"):
        older.groups(1)


def test_rows_make_the_same_groups_again(tmp_path):
    "Whatever was known of them; token-wise advantages, a group without a reward."
    model, tokenizer = random_model(), character_tokenizer()
    rollout = random_rollout(model, tokenizer)
    rollout.rewards[3:6] = math.nan
    rollout.scored[3:6] = False
    rollout.advantages = rollout.values * 2
    groups = StepGroups(4, rollout, rollout.values.exp(), rollout.logprobs - 1)
    rows = pd.DataFrame(table(rollout, 4, groups))
    back = groups_from_rows(rows, 3)
    mask = rollout.completion_mask
    assert back.step == 4 and back.rollout.completion_mask.equal(mask)
    assert back.rollout.prompt_mask.equal(rollout.prompt_mask)
    assert back.rollout.scored.equal(rollout.scored)
    for name in ("logprobs", "ref_logprobs", "values", "returns", "advantages"):
        found, truth = getattr(back.rollout, name), getattr(rollout, name)
        torch.testing.assert_close(found[mask], truth[mask].float())
    for name in ("entropy", "new_logprobs"):
        found, truth = getattr(back, name), getattr(groups, name)
        torch.testing.assert_close(found[mask], truth[mask].float())


def test_the_table_of_people_has_no_token_columns(one_step):
    "They are in the file, and read by those who ask for them alone."
    file = pq.read_schema(one_step.directory / "completions.parquet")
    assert {"completion_ids", "entropy", "new_logprobs"} <= set(file.names)
    seven = "step query completion reward advantage tokens truncated".split()
    assert list(read_completions(one_step.directory)) == seven


# Signal and noise of a gradient -------------------------------------------------------


def test_two_halves_are_the_papers_estimators():
    "McCandlish et al., appendix A.1, with a small batch of half the large one."
    rng = np.random.default_rng(1)
    g = rng.normal(size=(12, 7)) + 0.3
    first, total = torch.tensor(g[:6].sum(0) / 12), torch.tensor(g.mean(0))
    found = signal_and_noise([first[:3], first[3:]], [total[:3], total[3:]], (6, 6))
    halves = g[:6].mean(0), g[6:].mean(0)
    small = np.mean([half @ half for half in halves])
    large = g.mean(0) @ g.mean(0)
    assert found["gradient/signal"] == pytest.approx((12 * large - 6 * small) / 6)
    assert found["gradient/noise"] == pytest.approx((small - large) / (1 / 6 - 1 / 12))


def test_the_estimates_are_unbiased():
    "Of unequal halves, too: |G|^2 = 0.7 and a trace of 70, over many steps."
    rng = np.random.default_rng(2)
    steps = []
    for g in 0.1 + rng.normal(size=(3000, 5, 70)):
        halves = [torch.tensor(g[:2].sum(0) / 5)], [torch.tensor(g.mean(0))]
        steps.append(signal_and_noise(*halves, (2, 3)))
    steps = pd.DataFrame(steps)
    assert steps["gradient/noise"].mean() == pytest.approx(70, rel=0.02)
    assert steps["gradient/signal"].mean() == pytest.approx(0.7, abs=0.2)
    assert noise_scale(steps) == pytest.approx(100, rel=0.3)


def half_gradients(model, rollout, config, halves):
    "The gradient of each half, alone: the plain boxes and one backward pass."
    mask = rollout.loss_mask()
    totals = {"num_sequences": mask.any(1).sum(), "num_tokens": mask.sum()}
    found = []
    for groups in halves:
        model.zero_grad()
        part = rollout.select(groups)
        batch_loss(Models(model, None), part, config, 0.1, totals)[0].backward()
        found.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    return found


@pytest.mark.parametrize("limit", [10**6, 1])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_halves_of_an_update(limit, loss_type):
    """Five groups, one without loss: two and two, in one pass each or in a pass a
    group. The step itself is the one without the measurement."""
    model, prompts = random_model(dropout=0.0), ("1+2=", "3+4=", "5+6=", "78+9=", "1=")
    rollout = random_rollout(model, character_tokenizer(), prompts=prompts)
    rollout.scored[3:6] = False
    options = {"max_tokens_per_micro_batch": limit, "log_token_groups": 0}
    config = short_config(gradient_noise=True, loss_type=loss_type, **options)
    g1, g2 = half_gradients(model, rollout, config, ([0, 2], [3, 4]))

    def step(config):
        start = random_model(dropout=0.0)
        optimizer = torch.optim.SGD(start.parameters(), lr=0.1)
        models = ObservedModels(start, None, optimizer)
        return update(models, rollout, config, beta=0.1), start.state_dict()

    found, weights = step(config)
    plain, others = step(replace(config, gradient_noise=False))
    dot = sum((2 * a * 2 * b).sum().item() for a, b in zip(g1, g2))
    apart = sum((2 * a - 2 * b).square().sum().item() for a, b in zip(g1, g2))
    assert found["gradient/signal"] == pytest.approx(dot, rel=1e-6)
    assert found["gradient/noise"] == pytest.approx(apart, rel=1e-6)  # 1/2 + 1/2 = 1
    for name, x in plain.items():
        assert found[name] == pytest.approx(x, rel=1e-6, abs=1e-9)
    for a, b in zip(weights.values(), others.values()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("limit", [10**6, 1])
def test_the_entropy_is_that_of_the_updates_own_pass(limit, noise):
    """Before any step of several iterations, in micro-batches of any order, and of
    the rollout that is asked for where a step updates on two; no pass is added."""
    prompts = ("1+2=", "3+4=", "5+6=", "78+9=", "1=")
    options = {"max_tokens_per_micro_batch": limit, "gradient_noise": noise}
    passes = {}
    for recorded in (0, 2):
        model = random_model(dropout=0.0)
        first = random_rollout(model, character_tokenizer(), prompts=prompts)
        other = random_rollout(model, character_tokenizer(), seed=1)
        with torch.no_grad():
            _, truth = token_logprobs(model, first, 1.0, return_entropy=True)
        calls = []
        model.get_input_embeddings().register_forward_hook(
            lambda *arguments, calls=calls: calls.append(1)
        )
        config = short_config(num_iterations=2, log_token_groups=recorded, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        models = ObservedModels(model, None, optimizer)
        update(models, first, config)
        update(models, other, config)
        passes[recorded] = len(calls)
        groups = models.record(first, config, 1)
    assert passes[0] == passes[2] > 0
    mask = groups.rollout.completion_mask
    rows, length = mask.shape
    expected = truth[:rows, :length]
    torch.testing.assert_close(groups.entropy[mask], expected[mask])
    assert models.passes == []


def test_one_group_has_no_halves():
    "And a step in which one group alone carries loss: it is taken, not measured."
    model = random_model(dropout=0.0)
    rollout = random_rollout(model, character_tokenizer())
    rollout.scored[3:] = False
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    models = ObservedModels(model, None, optimizer)
    config = short_config(gradient_noise=True, log_token_groups=0)
    metrics = update(models, rollout, config)
    assert metrics["grad_norm"] > 0 and "gradient/signal" not in metrics


@pytest.mark.parametrize("options", [{}, {"algorithm": "ppo"}, {"use_peft": True}])
def test_a_run_measures_its_noise(tmp_path, options):
    "Every step, of several iterations, with a value model or adapters."
    if "use_peft" in options:
        pytest.importorskip("peft")
    measured = {"gradient_noise": True, "num_iterations": 2, "max_steps": 2}
    result = run(tmp_path / "run", **measured | options)
    assert result.metrics["gradient/noise"].gt(0).all()
    assert result.metrics["gradient/signal"].notna().all()
    record = json.loads((result.directory / "config.json").read_text())
    assert record["gradient_noise"] is True
    with pytest.raises(ValueError, match="gradient_noise = True, now False"):
        (result.directory / "model").rename(tmp_path / "elsewhere")
        run(result.directory, resume=True, **measured | options | UNMEASURED)


UNMEASURED = {"gradient_noise": False}
