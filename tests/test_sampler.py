"""Another sampler in the place of ours, and truncated importance sampling, without
vLLM: by enumeration, by hand, and by TRL.

test_vllm.py has the same with the engine itself."""

import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from grpo_nb.engine.models import EngineModels, importance_weights
from grpo_nb.engine import vllm_sampler
from grpo_nb.run import build
from grpo_nb.algorithm import STEPS
from grpo_nb.run.options import make_config
from grpo_nb.engine.decoding import sample
from grpo_nb.engine.packing import token_logprobs
from grpo_nb.names import how_to_install
from grpo_nb.policy import load_policy
from grpo_nb.engine.data import load_task
from grpo_nb.task import Query
from grpo_nb.run.build import build_models
from grpo_nb.run.training import rollout_metrics, train
from grpo_nb.update import batch_loss, update
from helpers import (
    VOCABULARY,
    gradient,
    random_model,
    random_rollout,
    read_metrics,
    reproducible,
    short_config,
)

CORRECTED = {"use_vllm": True, "vllm_importance_sampling_correction": True}


def elsewhere(
    model,
    tokenizer,
    queries,
    num_generations,
    max_completion_length,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    generator=None,
    max_num_seqs=None,
    skip_special_tokens=True,
    off=1.3,
):
    """A sampler that is wrong on purpose: it draws at another temperature. Its
    log-probs are those that it drew with."""
    drawn = sample(
        model,
        tokenizer,
        queries,
        num_generations,
        max_completion_length,
        off * temperature,
        top_p,
        top_k,
        generator,
        max_num_seqs,
        skip_special_tokens,
    )
    return replace(drawn, sampling_logprobs=drawn.logprobs, logprobs=None)


class StandIn:
    "In the place of `VLLMSampler`."

    def __init__(self, policy, tokenizer, config):
        pass

    def __call__(self, *arguments):
        return elsewhere(*arguments)


@pytest.fixture
def stand_in(monkeypatch):
    "use_vllm = True gets the stand-in; vLLM is not asked for."
    monkeypatch.setattr(vllm_sampler, "VLLMSampler", StandIn)
    monkeypatch.setattr(vllm_sampler, "import_vllm", lambda: None)


def test_the_engine_stops_at_no_id_without_a_logit(tiny, monkeypatch):
    """vLLM refuses to be asked for an end beyond the model's vocabulary, which a
    tokenizer may have, and which is never drawn."""
    policy, tokenizer = tiny
    ends = [tokenizer.eos_token_id, policy.config.vocab_size]
    asked = []

    def requests(options, *_):
        asked.append(options["stop_token_ids"])
        raise InterruptedError

    monkeypatch.setattr(vllm_sampler, "_requests", requests)
    monkeypatch.setattr(vllm_sampler, "eos_token_ids", lambda *_: ends)
    engine = vllm_sampler.VLLMSampler.__new__(vllm_sampler.VLLMSampler)
    engine.llm, engine.room = "an engine", 100
    engine.vocab_size = policy.config.vocab_size
    with pytest.raises(InterruptedError):
        engine(policy, tokenizer, [Query("1+2=")], 1, 4)
    assert asked == [[tokenizer.eos_token_id]]


# The correction -----------------------------------------------------------------------


def every_token(model, tokenizer, off=1.3):
    """The rollout of all completions of one token, each once, and the log-probs of a
    sampler that draws at another temperature."""
    V = len(VOCABULARY)
    rollout = random_rollout(
        model, tokenizer, num_generations=V, T=1, prompts=("1+2=",), off_policy=0.0
    )
    rollout = replace(
        rollout,
        completion_ids=torch.arange(V)[:, None],
        ref_logprobs=None,
    )
    with torch.no_grad():
        pi = token_logprobs(model, rollout)
        mu = token_logprobs(model, rollout, temperature=off)
    rollout = replace(rollout, logprobs=pi, sampling_logprobs=mu)
    return rollout, pi[:, 0].exp(), mu[:, 0].exp()


def loss_of(model, rollout, limit=None, beta=0.0, **options):
    "The loss of a whole step; corrected, if there is a limit of the weights."
    weights = None if limit is None else importance_weights(rollout, limit)
    mask = rollout.completion_mask
    totals = {"num_sequences": mask.any(1).sum(), "num_tokens": mask.sum()}
    config = make_config(device="cpu", beta=beta, **options)
    weighted = replace(rollout, loss_weights=weights)
    return batch_loss(EngineModels(model, None), weighted, config, beta, totals)[0]


def loss_gradient(model, rollout, limit=None):
    model.zero_grad()
    loss_of(model, rollout, limit).backward()
    return gradient(model)


def test_the_expected_gradient_is_that_on_policy(llama, tokenizer):
    """For completions of one token, without a bound: exact, by listing all of them,
    against the gradient of the expected reward.

    Each stands once in the group, with an advantage times its probability under the
    sampler: a mean over rows is an expectation."""
    rollout, pi, mu = every_token(llama, tokenizer)
    V, reward = (
        len(VOCABULARY),
        torch.rand(
            len(VOCABULARY),
            generator=torch.Generator().manual_seed(1),
            dtype=torch.float64,
        ),
    )
    llama.zero_grad()
    (-(token_logprobs(llama, rollout)[:, 0].exp() * reward).sum()).backward()
    right = gradient(llama)
    off_policy = replace(
        rollout, advantages=V * mu * (reward - 0.5)
    )  # a baseline changes no expectation on-policy
    exact = loss_gradient(llama, off_policy, limit=1e9)
    assert (exact - right).norm() < 1e-9 * right.norm()
    uncorrected = loss_gradient(llama, off_policy)
    assert (uncorrected - right).norm() > 0.05 * right.norm()
    wrong = replace(
        off_policy, sampling_logprobs=2 * pi.log()[:, None] - mu.log()[:, None]
    )
    upside_down = loss_gradient(llama, wrong, limit=1e9)
    assert (upside_down - right).norm() > (uncorrected - right).norm()


@pytest.mark.parametrize("cap", [0.5, 1.05, 1.4])
def test_weights_are_bounded(llama, tokenizer, cap):
    """The bound against weights made by hand: none is above it, those below it are
    as they were."""
    rollout, pi, mu = every_token(llama, tokenizer, off=2.0)
    weights = torch.tensor(
        [min(p / m, cap) for p, m in zip(pi.tolist(), mu.tolist())], dtype=torch.float64
    )
    assert weights.max() == cap and (weights < cap).any() and ((pi / mu).max() > cap)
    advantages = torch.linspace(-1, 2, len(pi), dtype=torch.float64)
    ours = loss_gradient(llama, replace(rollout, advantages=advantages), limit=cap)
    by_hand = loss_gradient(llama, replace(rollout, advantages=advantages * weights))
    assert (ours - by_hand).norm() < 1e-10 * by_hand.norm()


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo"])
def test_against_trl(llama, rollout, monkeypatch, beta, loss_type):
    """Value and gradient of the corrected loss are those of TRL: the weight is at
    the policy loss, not at the KL."""
    pytest.importorskip("trl")
    from grpo_nb.evidence.trl_oracles import import_trl, trl_loss

    rollout = replace(
        rollout,
        sampling_logprobs=rollout.logprobs
        + 0.5
        * torch.randn(
            rollout.logprobs.shape,
            generator=torch.Generator().manual_seed(2),
            dtype=torch.float64,
        ),
    )
    mask, trainer = rollout.completion_mask, import_trl().GRPOTrainer
    plain, weights = (
        trainer._compute_loss,
        (rollout.logprobs - rollout.sampling_logprobs).exp().clamp(max=1.2),
    )

    def corrected(self, model, inputs):
        self.use_vllm = self.vllm_importance_sampling_correction = True
        return plain(self, model, inputs | {"importance_sampling_ratio": weights})

    monkeypatch.setattr(trainer, "_compute_loss", corrected)
    theirs = trl_loss(
        token_logprobs(llama, rollout),
        rollout.logprobs,
        rollout.ref_logprobs if beta else None,
        rollout.advantages,
        mask,
        loss_type,
        beta=beta,
        max_completion_length=6,
    )
    ours = loss_of(
        llama, rollout, 1.2, beta, loss_type=loss_type, max_completion_length=6
    )
    gradients = []
    for loss in (theirs, ours):
        llama.zero_grad()
        loss.backward()
        gradients.append(gradient(llama))
    assert (
        abs(ours - theirs) < 1e-10
        and (gradients[0] - gradients[1]).norm() < 1e-9 * gradients[0].norm()
    )


def test_the_corrected_gradient_does_not_depend_on_the_cut(tokenizer):
    "In one piece or a piece a group: the weights go with their tokens."
    moves = []
    for tokens in (10_000, 1):
        model = random_model("llama")
        rollout = random_rollout(model, tokenizer)
        rollout.loss_weights = torch.linspace(0.5, 2, rollout.logprobs.numel()).view(
            rollout.logprobs.shape
        )
        config = short_config(max_tokens_per_micro_batch=tokens, num_iterations=2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        metrics = update(
            EngineModels(model, None, optimizer), rollout, config, beta=0.1
        )
        assert metrics["grad_norm"] > 0
        moves.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (moves[0] - moves[1]).abs().max() < 1e-12


def test_only_another_engine_is_corrected():
    with pytest.raises(
        ValueError,
        match="vllm_importance_sampling_correction = True needs use_vllm = True",
    ):
        make_config(device="cpu", vllm_importance_sampling_correction=True)


# Another sampler in a step ------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_step_with_another_sampler(algorithm):
    """The trainer's log-probs are computed, not taken from the sampler; both are
    kept, and their distance is reported."""
    config = short_config(algorithm=algorithm, max_completion_length=6)
    models = build_models(config, task := load_task("add"))
    before = load_policy("tiny", "cpu")[0]
    models.sampler = elsewhere
    models.generator = torch.Generator().manual_seed(0)
    rollout, _ = STEPS[algorithm](models, task.queries("train", 4), config)
    with torch.no_grad():
        pi, mu = (
            token_logprobs(before, rollout),
            token_logprobs(before, rollout, temperature=1.3),
        )
    mask = rollout.completion_mask
    assert (rollout.logprobs - pi).abs().max() < 1e-5 and (
        rollout.sampling_logprobs - mu
    )[mask].abs().max() < 1e-4
    metrics, d = rollout_metrics(rollout), (pi - mu)[mask].tolist()
    by_hand = {
        "sampling_logp_difference/mean": sum(map(abs, d)) / len(d),
        "sampling_logp_difference/max": max(map(abs, d)),
        "importance_sampling_ratio/min": 2.718281828459045 ** min(d),
        "importance_sampling_ratio/max": 2.718281828459045 ** max(d),
        "importance_sampling_ratio/mean": sum(2.718281828459045**x for x in d) / len(d),
    }
    assert {name for name in metrics if name.startswith("sampling/")} == {
        f"sampling/{name}" for name in by_hand
    }
    for name, x in by_hand.items():
        assert metrics[f"sampling/{name}"] == pytest.approx(x, rel=1e-3), name


def test_our_own_sampler_reports_no_mismatch():
    config = short_config()
    models = build_models(config, task := load_task("add"))
    models.generator = torch.Generator().manual_seed(0)
    rollout, _ = STEPS["grpo"](models, task.queries("train", 4), config)
    assert models.sampler is sample and rollout.sampling_logprobs is None
    assert not any(name.startswith("sampling/") for name in rollout_metrics(rollout))


def test_the_verb_asks_the_sampler_for_what_the_config_says(tiny):
    asked = []

    def noted(*arguments):
        asked.append(arguments)
        return sample(*arguments)

    generator, queries = torch.Generator(), [Query("1+2=")]
    config = make_config(
        device="cpu", max_completion_length=5, temperature=0.5, max_num_seqs=2
    )
    EngineModels(*tiny, generator=generator, sampler=noted).sample(queries, 3, config)
    assert asked == [(*tiny, queries, 3, 5, 0.5, 1.0, 0, generator, 2, True)]


# In a run -----------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_the_options_change_a_run(tmp_path, stand_in, algorithm):
    """use_vllm samples from elsewhere and logs the mismatch, the correction and its
    bound change what is learned; the same settings repeat a run."""

    def weights(name, **options):
        run = train(
            short_config(
                algorithm=algorithm,
                max_steps=2,
                temperature=2.0,
                learning_rate=1e-3,
                reward_funcs=["brevity"],
                output_dir=str(tmp_path / name),
                **options,
            ),
            progress=False,
        )
        lines = [reproducible(line) for line in read_metrics(run.directory)]
        return torch.cat([p.detach().flatten() for p in run.policy.parameters()]), lines

    plain, ours = weights("plain")
    other, theirs = weights("vllm", use_vllm=True)
    corrected, _ = weights("corrected", **CORRECTED)
    bounded, first = weights(
        "bounded", **CORRECTED, vllm_importance_sampling_clip_max=0.5
    )
    again, second = weights("again", **CORRECTED, vllm_importance_sampling_clip_max=0.5)
    assert all(
        "sampling/importance_sampling_ratio/mean" in line for line in theirs
    ) and not any(name.startswith("sampling/") for line in ours for name in line)
    assert bounded.equal(again) and first == second
    for a, b in ((plain, other), (other, corrected), (corrected, bounded)):
        assert not a.equal(b)


def test_vllm_that_is_not_there_is_said_before_anything_is_done(tmp_path, monkeypatch):
    "The extra is named; no model has been loaded and nothing written."
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(
        build, "load_policy", lambda *_: pytest.fail("a model was loaded")
    )
    with pytest.raises(
        ImportError,
        match=re.escape(f"use_vllm = True needs vLLM: {how_to_install('vllm')}"),
    ):
        train(
            short_config(use_vllm=True, output_dir=str(tmp_path / "run")),
            progress=False,
        )
    assert not (tmp_path / "run").exists()


def test_adapters_are_refused_before_anything_is_done(monkeypatch):
    monkeypatch.setattr(
        build, "load_policy", lambda *_: pytest.fail("a model was loaded")
    )
    with pytest.raises(ValueError, match="use_vllm = True sends whole weights"):
        build_models(short_config(use_vllm=True, use_peft=True), load_task("add"))


def test_vllm_in_several_processes_is_refused(monkeypatch):
    monkeypatch.setattr(vllm_sampler, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="one process, this run has 2"):
        vllm_sampler.import_vllm()


@pytest.mark.parametrize(
    "option",
    [
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"data_parallel_size": 4},
        {"distributed_executor_backend": "mp"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_an_engine_of_several_processes_is_refused(tiny, monkeypatch, option):
    "By its name, before an engine is started: weights are handed over in this process."
    started = []
    engine = SimpleNamespace(LLM=lambda **options: started.append(options))
    monkeypatch.setattr(vllm_sampler, "import_vllm", lambda: engine)
    config = short_config(use_vllm=True, device="cpu")
    (name, value), *_ = option.items()
    with pytest.raises(ValueError, match=f"{name} = {value!r} .*in this process"):
        vllm_sampler.start_engine(*tiny, config, **option)
    assert started == []
    vllm_sampler.start_engine(*tiny, config, tensor_parallel_size=1)
    assert started[0]["tensor_parallel_size"] == 1
