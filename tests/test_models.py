"""Models that people have: families of transformers against the plain way, LoRA,
value models from a checkpoint.

The plain way is written here: one forward pass a completion, no padding, nothing
shared, and the losses from their definitions."""

import json
import shutil
import sys

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from grpo_nb import policy
from grpo_nb.engine import adapters, attention, decoding, micro_batch, packing
from grpo_nb.run import build
from grpo_nb.run.options import make_config
from grpo_nb.evidence.plots import trained_parameters
from grpo_nb.engine.judging import RewardModel
from grpo_nb.engine.packing import shared_rows, shares_prompt
from grpo_nb.loading import TINY
from grpo_nb.policy import load_policy, token_logprobs
from grpo_nb.engine.adapters import reference_logprobs
from grpo_nb.engine.decoding import sample
from grpo_nb.engine.data import load_task
from grpo_nb.task import Query
from grpo_nb.run.build import build_models, load_value_model
from grpo_nb.run.checkpoint import checkpoints
from grpo_nb.run.command_line import chat, parse_arguments
from grpo_nb.run.iterative import outer_iteration
from grpo_nb.run.training import open_run, train
from grpo_nb.value import predict_values
from helpers import (
    EOS,
    PAD,
    VOCABULARY,
    character_tokenizer,
    random_rollout,
    read_metrics,
    reproducible,
    start_process,
)

SMALL = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "query_pre_attn_scalar": 8,
    "sliding_window": 32,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
GPT2 = {
    "vocab_size": len(VOCABULARY),
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
}
MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe"]
FAMILIES = (
    {
        name: SMALL
        for name in (
            "llama",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "phi",
            "phi3",
        )
    }
    | {"gpt2": GPT2}
    | dict.fromkeys(MIXTURES, SMALL | EXPERTS)
)
EAGER = {
    "gemma2"
    # its attention caps its scores; in float64 transformers' own mask for it leaves NaN
    # behind padding, so it is checked in float32
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A family -> a directory with a model of random weights and a tokenizer, as its
    user would have it."""
    made = {}

    def get(family, **changes):
        key = json.dumps([family, changes], sort_keys=True)
        if key not in made:
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(family, **FAMILIES[family] | changes)
            )
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for p in model.parameters():
                    if p.dim() > 1:
                        p.copy_(0.4 * torch.randn(p.shape, generator=generator))
            made[key] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[key])
            character_tokenizer().save_pretrained(made[key])
        return str(made[key])

    return get


def load(path, dtype=torch.float32):
    "Policy and tokenizer; the fused kernel for mixtures of experts knows no float64."
    model, tokenizer = load_policy(path, "cpu", dtype)
    if dtype == torch.float64 and any(p.dim() == 3 for p in model.parameters()):
        model.set_experts_implementation("eager")
    return model, tokenizer


def plain_logprobs(model, prompt, completion, temperature=1.0):
    """log pi of each completion token: one forward pass over prompt and completion,
    nothing else in it."""
    logits = model(torch.tensor([prompt + completion])).logits[0] / temperature
    return (
        logits.log_softmax(-1)[len(prompt) - 1 : -1]
        .gather(1, torch.tensor(completion)[:, None])
        .squeeze(1)
    )


def plain(model, rollout, temperature=1.0):
    "The same for a rollout, [N, T]."
    result = []
    for i in range(len(rollout)):
        g = i // rollout.num_generations
        prompt, completion = (
            rollout.prompt_ids[g][rollout.prompt_mask[g]].tolist(),
            rollout.completion_ids[i][rollout.completion_mask[i]].tolist(),
        )
        result.append(
            torch.nn.functional.pad(
                plain_logprobs(model, prompt, completion, temperature),
                (0, rollout.completion_ids.shape[1] - len(completion)),
            )
        )
    return torch.stack(result)


def gradient(model):
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
            for p in model.parameters()
        ]
    )


def small(path, output, **options):
    "A config for a step or two of a random model."
    few = {} if options.get("algorithm") == "ppo" else {"num_generations": 2}
    return make_config(
        **{
            "model": path,
            "num_prompts": 3,
            "max_steps": 1,
            "eval_size": 2,
            "max_completion_length": 6,
            "save_steps": 0,
            "device": "cpu",
            "output_dir": str(output),
        }
        | few
        | options
    )


# Families -----------------------------------------------------------------------------


WAYS = {"simple": policy, "square": packing, "parts": packing}


@pytest.mark.filterwarnings("ignore:.*does not compute a group in one row")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_the_plain_way(directory, monkeypatch, family, way):
    """Values in float64 to 1e-10 (in float32 to 1e-5), gradients to 1e-6 (1e-5) of
    the largest entry: transformers computes its norms in float32.

    The figure's way, and shared rows with attention over the square and in parts."""
    layers, attend = [], attention.attend_in_parts
    monkeypatch.setattr(attention, "GAIN", 0.0 if way == "parts" else float("inf"))
    monkeypatch.setattr(
        attention, "attend_in_parts", lambda *x: layers.append(x) or attend(*x)
    )
    dtype, values, slopes = (
        (torch.float32, 1e-5, 1e-5) if family in EAGER else (torch.float64, 1e-10, 1e-6)
    )
    model, tokenizer = load(directory(family), dtype)
    rollout = random_rollout(model, tokenizer)
    assert shares_prompt(model, 20) == (family not in EAGER)
    layers.clear()
    weights, gradients = (
        torch.randn(
            rollout.logprobs.shape, generator=torch.Generator().manual_seed(1)
        ).to(dtype),
        [],
    )
    for score in (WAYS[way].token_logprobs, plain):
        model.zero_grad()
        logprobs = score(model, rollout, 0.7)
        (logprobs * weights).sum().backward()
        gradients.append((logprobs.detach(), gradient(model)))
    (ours, g), (theirs, h) = gradients
    assert len(layers) == (2 if way == "parts" and family not in EAGER else 0)
    assert (ours - theirs).abs().max().item() < values and (
        (g - h).abs().max() / h.abs().max()
    ).item() < slopes


@pytest.mark.parametrize("spared", [decoding.SPARED, 0], ids=["copies", "once"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_logprobs_are_those_of_the_plain_way(
    directory, monkeypatch, family, spared
):
    """Prompts of different lengths, a cache, rows that end early: each token has the
    log-prob that a plain pass gives it, also where a prompt's cache is kept once."""
    monkeypatch.setattr(decoding, "SPARED", spared)
    model, tokenizer = load(directory(family))
    rollout = sample(
        model,
        tokenizer,
        [Query("1+2="), Query("345+678=")],
        16,
        12,
        temperature=2.0,
        generator=torch.Generator().manual_seed(0),
    )
    assert rollout.completion_mask.sum(1).min().item() < 12
    with torch.no_grad():
        assert (rollout.logprobs - plain(model, rollout, 2.0)).abs().max().item() < 2e-5


def recorded(steps):
    """A reward function that notes what it is asked, and gives each completion a
    number of its own."""

    def reward(prompts, completion_ids, **_):
        steps.append((prompts, completion_ids))
        return [(sum(ids) * 7 + len(ids)) % 11 / 10 for ids in completion_ids]

    return reward


def by_hand(
    path,
    algorithm,
    steps,
    mu,
    beta,
    lr,
    adapt=lambda policy: None,
    G=2,
    epsilon=0.2,
    lam=0.95,
):
    """The recorded steps once more: PPO or GRPO as a loop over completions, with one
    AdamW for each model, in float64."""
    (policy, tokenizer), (reference, _), (trunk, _) = (
        load(path, torch.float64) for _ in range(3)
    )
    adapt(policy)
    width = policy.get_output_embeddings().in_features
    head = torch.nn.Linear(width, 1).double()
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizers = [
        torch.optim.AdamW(
            [p for p in policy.parameters() if p.requires_grad], lr, weight_decay=0.0
        ),
        torch.optim.AdamW(
            [*trunk.base_model.parameters(), *head.parameters()], 1e-3, weight_decay=0.0
        ),
    ]

    def value(prompt, o):
        return head(
            trunk.base_model(torch.tensor([prompt + o])).last_hidden_state[
                0, len(prompt) - 1 : -1
            ]
        ).squeeze(1)

    for prompts, completions in steps:
        rewards = torch.tensor(recorded([])(prompts, completions), dtype=torch.float64)
        prompts = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        pairs = list(zip(prompts, completions))
        with torch.no_grad():
            old, ref, V = (
                [f(*pair) for pair in pairs]
                for f in (
                    lambda *p: plain_logprobs(policy, *p),
                    lambda *p: plain_logprobs(reference, *p),
                    value,
                )
            )
        if algorithm == "grpo":
            groups = rewards.view(-1, G)
            advantages = [
                a.expand(len(o))
                for a, o in zip(
                    (
                        (groups - groups.mean(1, keepdim=True))
                        / (groups.std(1, keepdim=True) + 1e-4)
                    ).flatten(),
                    completions,
                )
            ]
        else:
            advantages, returns = [], []
            for r, logp, logp_ref, v in zip(rewards, old, ref, V):
                token = -beta * (logp - logp_ref)
                token[-1] += r
                A, following = torch.zeros_like(v), 0.0
                for t in reversed(range(len(v))):
                    A[t] = following = (
                        token[t]
                        + (v[t + 1] if t + 1 < len(v) else 0.0)
                        - v[t]
                        + lam * following
                    )
                advantages.append(A)
                returns.append(A + v)
            whole = torch.cat(advantages)
            advantages = [
                (A - whole.mean()) / (whole.var() + 1e-8).sqrt() for A in advantages
            ]
        tokens = sum(map(len, completions))
        for _ in range(mu):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = value_loss = 0.0
            for i, pair in enumerate(pairs):
                logp = plain_logprobs(policy, *pair)
                rho, d = (logp - old[i]).exp(), ref[i] - logp
                term = -torch.minimum(
                    rho * advantages[i],
                    rho.clamp(1 - epsilon, 1 + epsilon) * advantages[i],
                )
                if algorithm == "grpo":
                    loss = loss + (term + beta * (d.exp() - d - 1)).mean() / len(pairs)
                else:
                    v = value(*pair)
                    clipped = v.clamp(V[i] - 0.2, V[i] + 0.2)
                    loss = loss + term.sum() / tokens
                    value_loss = (
                        value_loss
                        + torch.maximum(
                            (v - returns[i]) ** 2, (clipped - returns[i]) ** 2
                        ).sum()
                        / 2
                        / tokens
                    )
            loss.backward()
            if algorithm == "ppo":
                value_loss.backward()
            for optimizer in optimizers if algorithm == "ppo" else optimizers[:1]:
                torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
                optimizer.step()
    return policy


@pytest.mark.filterwarnings(
    "ignore:.*does not compute a group in one row",
    "ignore:transformers has no token classifier",
)
@pytest.mark.parametrize(
    "family, algorithm",
    [(family, "grpo") for family in FAMILIES if family not in EAGER]
    + [(family, "ppo") for family in ("llama", "gpt2", "gemma3_text", "mixtral")],
)
def test_two_steps_of_training_are_those_of_the_plain_loop(
    directory, tmp_path, monkeypatch, family, algorithm
):
    """Two steps, each of two updates at 1e-3, on what was sampled: in float64 (norms
    and rewards in float32) every weight agrees to 1e-5."""
    path, steps, mu, beta, lr = directory(family), [], 2, 0.1, 1e-3
    monkeypatch.setattr(
        build, "load_policy", lambda name, device: load(name, torch.float64)
    )
    config = small(
        path,
        tmp_path / "run",
        algorithm=algorithm,
        max_steps=2,
        num_iterations=mu,
        beta=beta,
        learning_rate=lr,
    )
    trained = train(config, reward_funcs=[recorded(steps)], progress=False).policy
    start, expected = (
        load(path, torch.float64)[0],
        by_hand(path, algorithm, steps, mu, beta, lr),
    )
    assert len(steps) == 2
    apart, moved = (
        max(
            (p - q).abs().max().item()
            for p, q in zip(trained.parameters(), other.parameters())
        )
        for other in (expected, start)
    )
    assert apart < 1e-5 and moved > 1e-3


@pytest.mark.filterwarnings("ignore:.*does not compute a group in one row")
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_trained_opens_elsewhere(directory, tmp_path, family):
    """As a user runs it, in float32 with the fused kernels: the saved model has the
    same logits in transformers, and TRL's trainer takes it."""
    run = train(
        small(directory(family), tmp_path / "run"),
        reward_funcs=[recorded([])],
        progress=False,
    )
    ids = torch.tensor([[3, 4, 5, 6]])
    model = AutoModelForCausalLM.from_pretrained(run.directory / "model").eval()
    with torch.no_grad():
        assert model(ids).logits.equal(run.policy(ids).logits)
    trl = pytest.importorskip("trl")
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path / "trl"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        beta=0.0,
        num_generations=2,
        per_device_train_batch_size=2,
    )
    trainer = trl.GRPOTrainer(
        str(run.directory / "model"),
        recorded([]),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["1+2=", "3+4="]}),
    )
    assert type(trainer.model) is type(run.policy)
    with torch.no_grad():
        assert trainer.model.eval()(ids).logits.equal(run.policy(ids).logits)


# Mixtures of experts ------------------------------------------------------------------


def routes(model, call):
    "Which experts each token goes to, in each layer."
    found, hooks = (
        [],
        [
            layer.mlp.gate.register_forward_hook(
                lambda module, arguments, output: found.append(output[-1].sort().values)
            )
            for layer in model.model.layers
        ],
    )
    with torch.no_grad():
        call()
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", MIXTURES)
def test_sharing_the_prompt_leaves_the_routes(directory, family):
    "A token goes to the same experts in a shared row as in a row of its own."
    model, tokenizer = load(directory(family))
    rollout = random_rollout(model, tokenizer, prompts=("12+34=",))
    inputs, before = shared_rows(rollout, 10**6)
    together = routes(model, lambda: model.base_model(**inputs))
    where = torch.zeros_like(rollout.completion_ids).masked_scatter(
        rollout.completion_mask, before
    )
    for i, (o, mask) in enumerate(zip(rollout.completion_ids, rollout.completion_mask)):
        alone = routes(
            model, lambda: model(torch.cat([rollout.prompt_ids[0], o[mask]])[None])
        )
        for layer, shared in zip(alone, together):
            assert layer[5:-1].equal(
                shared[where[i][mask]]
            )  # the prompt has six tokens


@pytest.mark.parametrize("family", MIXTURES)
def test_a_router_loss_in_the_config_stays_out(directory, family):
    """A model whose config asks for the router's auxiliary loss is sampled, scored
    and trained like any other.

    transformers would compute that loss in every forward pass, and not find the mask
    that it expects."""
    with_loss, plain_one = (
        load(directory(family, **changes))
        for changes in (
            {"output_router_logits": True, "router_aux_loss_coef": 10.0},
            {},
        )
    )
    rollouts = [
        sample(
            *pair,
            [Query("1+2="), Query("345+678=")],
            4,
            8,
            generator=torch.Generator().manual_seed(0),
        )
        for pair in (with_loss, plain_one)
    ]
    assert rollouts[0].completion_ids.equal(rollouts[1].completion_ids)
    gradients = []
    for model, _ in (with_loss, plain_one):
        token_logprobs(model, rollouts[1]).sum().backward()
        gradients.append(gradient(model))
    assert gradients[0].equal(gradients[1])


# LoRA ---------------------------------------------------------------------------------

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 12, "learning_rate": 1e-2}


class Low(torch.nn.Module):
    "W -> W + (alpha / r) B A, the definition."

    def __init__(self, A, B, scale):
        super().__init__()
        self.A, self.B, self.scale = (
            torch.nn.Parameter(A.clone()),
            torch.nn.Parameter(B.clone()),
            scale,
        )

    def forward(self, W):
        return W + self.scale * self.B @ self.A


@pytest.mark.parametrize(
    "family, algorithm", [("llama", "grpo"), ("qwen3", "grpo"), ("llama", "ppo")]
)
def test_two_steps_with_adapters_are_those_of_the_definition(
    directory, tmp_path, monkeypatch, family, algorithm
):
    """A plain loop that trains A and B of W + (alpha / r) B A, with a second model
    as the reference: the same A and B, to 1e-5, after steps of 1e-2."""
    path, steps, mu, beta = directory(family), [], 2, 0.1
    monkeypatch.setattr(
        build, "load_policy", lambda name, device: load(name, torch.float64)
    )
    config = small(
        path,
        tmp_path / "run",
        algorithm=algorithm,
        max_steps=2,
        num_iterations=mu,
        beta=beta,
        lora_target_modules=["q_proj", "up_proj"],
        **LORA,
    )
    start = {
        name: p.detach().double()
        for name, p in build_models(config, load_task("add")).policy.named_parameters()
        if "lora_" in name
    }
    layers = sorted({name.split(".lora_")[0] for name in start})
    trained = dict(
        train(
            config, reward_funcs=[recorded(steps)], progress=False
        ).policy.named_parameters()
    )

    def adapt(policy):
        policy.requires_grad_(False)
        for layer in layers:
            A, B = (start[f"{layer}.lora_{x}.default.weight"] for x in "AB")
            torch.nn.utils.parametrize.register_parametrization(
                policy.get_submodule(layer), "weight", Low(A, B, 12 / 4), unsafe=True
            )

    expected = by_hand(path, algorithm, steps, mu, beta, 1e-2, adapt)
    assert len(layers) == 4
    for layer in layers:
        low = expected.get_submodule(layer).parametrizations.weight[0]
        for x, right in zip("AB", (low.A, low.B)):
            name = f"{layer}.lora_{x}.default.weight"
            assert (trained[name] - right).abs().max().item() < 1e-5 and (
                trained[name] - start[name]
            ).abs().max().item() > 1e-3


@pytest.mark.filterwarnings(
    "ignore:.*does not compute a group in one row",
    "ignore:fan_in_fan_out",
    "ignore:The following",
)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_on_every_family(directory, tmp_path, family):
    """All linear layers but the head, experts and their router too: nothing changes
    at the start; then only the adapters move; what is saved is the adapter alone,
    and PEFT, transformers and load_policy open it with the same logits."""
    peft, ids = pytest.importorskip("peft"), torch.tensor([[3, 4, 5, 6]])
    config = small(directory(family), tmp_path / "run", **LORA)
    base, adapted = load(directory(family))[0], build_models(config, load_task("add"))
    with torch.no_grad():
        assert adapted.policy(ids).logits.equal(base(ids).logits)
    run = train(config, reward_funcs=[recorded([])], progress=False)
    for name, p in run.policy.named_parameters():
        if "lora_" not in name:
            assert p.equal(base.get_parameter(name.replace("base_layer.", ""))), name
    kept = {path.name for path in (run.directory / "model").iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
    } <= kept and "model.safetensors" not in kept
    opened = [
        peft.AutoPeftModelForCausalLM.from_pretrained(run.directory / "model"),
        AutoModelForCausalLM.from_pretrained(run.directory / "model"),
        load_policy(str(run.directory / "model"), "cpu")[0],
        open_run(run.directory, reward_funcs=[recorded([])]).policy,
        peft.PeftModel.from_pretrained(
            load(directory(family))[0], run.directory / "model"
        ),
    ]
    with torch.no_grad():
        logits = run.policy(ids).logits
        assert not logits.equal(base(ids).logits)
        for model in opened:
            assert model.eval()(ids).logits.equal(logits)


def test_the_reference_is_the_policy_without_its_adapters(
    directory, tmp_path, monkeypatch
):
    """Bit for bit those of the base, with no second model in memory; the adapters
    are on again afterwards, also if the scoring raises."""
    (base, tokenizer), models = (
        load(directory("llama")),
        build_models(small(directory("llama"), tmp_path, **LORA), load_task("add")),
    )
    policy, rollout = models.policy, random_rollout(base, tokenizer)
    assert (
        models.reference is policy
        and build_models(
            small(directory("llama"), tmp_path, **LORA, beta=0.0), load_task("add")
        ).reference
        is None
    )
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(0))
        before = token_logprobs(policy, rollout)
    assert reference_logprobs(policy, rollout).equal(
        reference_logprobs(base, rollout)
    ) and not before.equal(reference_logprobs(base, rollout))
    with torch.no_grad():
        assert token_logprobs(policy, rollout).equal(before)

    def broken(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(micro_batch, "token_logprobs", broken)
        reference_logprobs(policy, rollout)
    with torch.no_grad():
        assert token_logprobs(policy, rollout).equal(before)
    assert all(
        p.requires_grad == ("lora_" in name) for name, p in policy.named_parameters()
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_policy_with_its_adapters_becomes_the_reference(
    directory, tmp_path, family
):
    """An outer iteration renews the adapters of the reference; they stay when the
    policy moves on. What they stand beside is one model, and none of it is trained."""
    options = LORA | {"ref_model_sync_steps": 2, "beta": 0.1}
    config = small(directory(family), tmp_path, **options)
    models = build_models(config, task := load_task("add"))
    base, tokenizer = load(directory(family))
    policy, rollout = models.policy, random_rollout(base, tokenizer)
    generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def moved():
        for name, p in policy.named_parameters():
            if "lora_" in name:
                p += 0.1 * torch.randn(p.shape, generator=generator)
        return token_logprobs(policy, rollout)

    def of_reference():
        return models.reference_logprobs(rollout, config)

    start = reference_logprobs(base, rollout)
    assert of_reference().equal(start)
    first = moved()
    assert of_reference().equal(start)  # frozen in the first iteration
    assert outer_iteration(config, task, models, generator, 2, []) == {}
    assert of_reference().equal(start)  # not yet due
    outer_iteration(config, task, models, generator, 3, [])
    assert torch.allclose(of_reference(), first, atol=1e-6)
    assert not torch.allclose(first, start, atol=1e-2)
    second = moved()
    assert torch.allclose(of_reference(), first, atol=1e-6)
    assert not torch.allclose(second, first, atol=1e-2)
    with torch.no_grad():
        assert token_logprobs(policy, rollout).equal(second)  # its own are on
    pairs = dict(models.reference.named_parameters())
    for name, p in policy.named_parameters():
        assert (pairs[name] is not p) == p.requires_grad == ("lora_" in name)
        assert not pairs[name].requires_grad


def test_outer_iterations_of_adapters_resume(tmp_path):
    """Four steps at once, or three and one more: the same, bit for bit. The KL begins
    at 0 in each iteration; a checkpoint holds the adapters of both models alone."""
    options = LORA | {"ref_model_sync_steps": 2, "num_generations": 8}
    options |= {"save_steps": 1, "eval_steps": 1}
    for name, steps in {"once": [4], "twice": [3, 4]}.items():
        for n in steps:
            config = small(
                "tiny", tmp_path / name, max_steps=n, resume=n != steps[0], **options
            )
            run = train(config, reward_funcs=[recorded([])], progress=False)
            if n == 3:
                shutil.rmtree(tmp_path / name / "model")
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert [reproducible(line) for line in read_metrics(once)] == [
        reproducible(line) for line in read_metrics(twice)
    ]
    for name in ("model/adapter_model.safetensors", "checkpoint-4/state.safetensors"):
        assert (once / name).read_bytes() == (twice / name).read_bytes(), name
    kls = run.metrics["kl"]
    assert kls[1] < 1e-6 and kls[3] < 1e-6 < 1e-4 < min(kls[2], kls[4])
    kept = load_file(once / "checkpoint-4/state.safetensors")
    weights = {name for name in kept if ".weights." in name}
    assert {name.split(".")[0] for name in weights} == {"policy", "reference"}
    assert all("lora_" in name for name in weights)


@pytest.mark.parametrize(
    "options",
    [{}, {"algorithm": "ppo"}, {"algorithm": "ppo", "value_model": "head"}],
    ids=["grpo", "ppo", "head"],
)
def test_adapters_resume(tmp_path, options):
    """Four steps at once, or stopped after two and resumed: the same adapters,
    metrics and checkpoints, bit for bit; checkpoints hold what is trained."""
    options = options | LORA | {"max_steps": 4, "save_steps": 1, "num_iterations": 2}
    calls, judge = [], recorded([])

    def reward(**columns):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return judge(**columns)

    straight = train(
        small("tiny", tmp_path / "straight", **options),
        reward_funcs=[reward],
        progress=False,
    )
    with pytest.raises(KeyboardInterrupt):
        train(
            small("tiny", tmp_path / "resumed", **options),
            reward_funcs=[reward],
            progress=False,
        )
    assert (
        checkpoints(tmp_path / "resumed")[-1][0] == 2 and straight.metrics["kl"][4] > 0
    )
    torch.manual_seed(1234)
    resumed = train(
        small("tiny", tmp_path / "resumed", resume=True, **options),
        reward_funcs=[reward],
        progress=False,
    )
    assert [reproducible(line) for line in read_metrics(straight.directory)] == [
        reproducible(line) for line in read_metrics(resumed.directory)
    ]
    for name in (
        "model/adapter_model.safetensors",
        "checkpoint-4/state.safetensors",
        "checkpoint-4/trainer.json",
    ):
        assert (straight.directory / name).read_bytes() == (
            resumed.directory / name
        ).read_bytes(), name
    names = [
        name
        for name in load_file(straight.directory / "checkpoint-4/state.safetensors")
        if name.startswith("policy.weights.")
    ]
    assert names and all("lora_" in name for name in names)


def talk(directory):
    "Open a run, and ask one question."
    chat(open_run(directory), ["3+4="])


@pytest.mark.parametrize("path", ["tiny", "mine"])
def test_an_adapter_finds_its_base_from_everywhere(tmp_path, monkeypatch, path):
    """The embedded model, or one that was named by a relative path: the run opens,
    and talks, in another process and another directory."""
    (tmp_path / "there").mkdir()
    (tmp_path / "elsewhere").mkdir()
    if path == "mine":
        shutil.copytree(TINY, tmp_path / "there/mine")
    flags = (
        [
            "--use_peft",
            "true",
            "--lora_target_modules",
            "q_proj",
            "v_proj",
            "--model",
            path,
        ]
        + "--max_steps 1 --num_prompts 2 --num_generations 2 --eval_size 2 "
        "--device cpu --output_dir run".split()
    )
    monkeypatch.chdir(tmp_path / "there")
    train(parse_arguments(flags), progress=False)
    place, log = tmp_path / "elsewhere", tmp_path / "log"
    process = start_process(talk, tmp_path / "there/run", cwd=place, log=log)
    process.join(timeout=120)
    assert process.exitcode == 0 and "reward" in log.read_text(), log.read_text()
    assert (
        json.loads((tmp_path / "there/run/model/adapter_config.json").read_text())["r"]
        == 16
    )


def test_a_value_model_beside_adapters(directory, tmp_path):
    """A separate one is the base, trained whole; a head sees the adapted trunk, and
    its loss pulls on the adapters."""
    separate, head = (
        build_models(
            small(
                directory("llama"), tmp_path, algorithm="ppo", value_model=kind, **LORA
            ),
            load_task("add"),
        )
        for kind in ("separate", "head")
    )
    assert not any(
        "lora_" in name for name, _ in separate.value.named_parameters()
    ) and all(p.requires_grad for p in separate.value.parameters())
    rollout = random_rollout(head.policy, head.tokenizer)
    with torch.no_grad():
        for name, p in head.policy.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(0))
        head.value.head.weight.fill_(1.0)
        separate.value.head.weight.fill_(1.0)
    assert not head.value(rollout).allclose(separate.value(rollout))  # another trunk
    head.value(rollout).sum().backward()
    assert all(
        (p.grad is not None) == ("lora_" in name)
        for name, p in head.policy.named_parameters()
    )


def test_the_comparison_counts_what_is_trained(directory, tmp_path):
    """The adapters, beside them a value model as large as the base: also of a run
    that is opened again."""

    def count(model):
        return sum(p.numel() for p in model.parameters())

    base, judge = (
        load(directory("llama"))[0],
        classifier(directory, "llama", tmp_path / "judge"),
    )
    for name, options, beside in [
        ("grpo", {}, 0),
        ("separate", {"algorithm": "ppo"}, count(base.base_model) + 17),
        ("head", {"algorithm": "ppo", "value_model": "head"}, 17),
        (
            "path",
            {"algorithm": "ppo", "value_model": str(tmp_path / "judge")},
            count(judge),
        ),
    ]:
        run = train(
            small(directory("llama"), tmp_path / name, **LORA, **options),
            reward_funcs=[recorded([])],
            progress=False,
        )
        adapters = sum(p.numel() for p in run.policy.parameters() if p.requires_grad)
        for one in (run, open_run(run.directory, reward_funcs=[recorded([])])):
            assert trained_parameters(one) == adapters + beside


@pytest.mark.parametrize(
    "options", [{"gradient_checkpointing": True}, {"dtype": "bfloat16"}], ids=str
)
def test_adapters_with_less_memory(tmp_path, options):
    """Checkpointed layers give the same adapters; in bfloat16 they are still
    float32, and move."""
    options = LORA | {"max_steps": 2} | options
    plain_run, lean = (
        train(
            small("tiny", tmp_path / name, num_generations=8, **chosen),
            reward_funcs=[recorded([])],
            progress=False,
        )
        for name, chosen in (("plain", LORA | {"max_steps": 2}), ("lean", options))
    )
    for (name, p), q in zip(
        plain_run.policy.named_parameters(), lean.policy.parameters()
    ):
        assert q.dtype == torch.float32 and (
            "gradient_checkpointing" not in options or torch.allclose(p, q, atol=1e-5)
        ), name
    assert lean.metrics["kl"][2] > 0


def test_what_adapters_cannot_do_is_refused(directory, tmp_path, monkeypatch):
    "By name, and before anything is written."
    for options in ({}, {"ref_model_sync_steps": 2}):
        with pytest.raises(ValueError, match="use_peft.*reference_dtype.*bfloat16"):
            small(
                "tiny",
                tmp_path / "no",
                reference_dtype="bfloat16",
                **LORA,
                **options,
            )
    with pytest.raises(ValueError, match="lora_target_modules"):
        small("tiny", tmp_path / "no", **LORA, lora_target_modules=[])
    with pytest.raises(
        ValueError,
        match=r"lora_target_modules = \['nothing'\] does not fit LlamaForCausalLM",
    ):
        train(small("tiny", tmp_path / "no", **LORA, lora_target_modules=["nothing"]))
    run = train(small("tiny", tmp_path / "run", **LORA), progress=False)
    with pytest.raises(ValueError, match="adapters"):
        RewardModel.from_policy(run.policy, run.tokenizer)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "peft", None)
        patched.setattr(adapters.importlib.util, "find_spec", lambda name: None)
        patched.setattr(
            build, "load_policy", lambda *_: pytest.fail("a model was loaded")
        )
        with pytest.raises(ImportError, match=r'pip install "grpo_nb\[peft\]"'):
            train(small("tiny", tmp_path / "no", **LORA))
        with pytest.raises(ImportError, match=r'pip install "grpo_nb\[peft\]"'):
            open_run(run.directory)
    assert not (tmp_path / "no").exists()
    assert train(
        small(
            "tiny",
            tmp_path / "free",
            **LORA,
            beta=0.0,
            reward_funcs=["learned", "accuracy"],
            ref_model_sync_steps=1,
            reward_model_prompts=6,
            reward_model_steps=1,
        )
    ).accuracy


# A value model from a checkpoint ------------------------------------------------------


def classifier(
    directory, family, output, labels=1, kind=AutoModelForSequenceClassification
):
    "A classifier on the family's trunk, with a random head, saved."
    config = AutoConfig.from_pretrained(directory(family))
    config.num_labels = labels
    torch.manual_seed(0)
    model = kind.from_config(config).eval()
    model.base_model.load_state_dict(load(directory(family))[0].base_model.state_dict())
    model.save_pretrained(output)
    character_tokenizer().save_pretrained(output)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "mixtral"])
def test_a_reward_model_as_value_model(directory, tmp_path, family):
    "Before each token the value is what the reward model says of the text so far."
    judge, (policy, tokenizer) = (
        classifier(directory, family, tmp_path / "judge"),
        load(directory(family)),
    )
    rollout = random_rollout(policy, tokenizer)
    values = predict_values(load_value_model(str(tmp_path / "judge"), policy), rollout)
    assert values.abs().max().item() > 0.01
    with torch.no_grad():
        for i, (o, mask) in enumerate(
            zip(rollout.completion_ids, rollout.completion_mask)
        ):
            prompt = rollout.prompt_ids[i // 3][rollout.prompt_mask[i // 3]]
            for t in range(mask.sum()):
                assert (
                    abs(
                        judge(torch.cat([prompt, o[:t]])[None]).logits.item()
                        - values[i, t].item()
                    )
                    < 1e-4
                )


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_the_value_model_of_a_run_starts_another(directory, tmp_path, family):
    """It is saved with its trained head, transformers opens it as a token
    classifier, and a second run begins where the first one ended."""
    first = train(
        small(directory(family), tmp_path / "first", algorithm="ppo", max_steps=2),
        reward_funcs=[recorded([])],
        progress=False,
    )
    saved = first.directory / "value_model"
    rollout = random_rollout(first.policy, first.tokenizer)
    value = load_value_model(str(saved), first.policy)
    assert value.head.bias.item() != 0 and value.head.weight.any()
    opened = AutoModelForTokenClassification.from_pretrained(saved).eval()
    with torch.no_grad():
        ids = torch.cat(
            [rollout.prompt_ids[:1][rollout.prompt_mask[:1]], rollout.completion_ids[0]]
        )[None]
        assert torch.allclose(
            opened(ids).logits[0, -7:-1, 0], value(rollout)[0], atol=1e-5
        )  # the first completion has six tokens
    options = {"algorithm": "ppo", "value_model": str(saved)}
    models = build_models(
        small(directory(family), tmp_path, **options), load_task("add")
    )
    assert models.value(rollout).equal(value(rollout)) and all(
        p.requires_grad for p in models.value.parameters()
    )
    second = train(
        small(directory(family), tmp_path / "second", **options),
        reward_funcs=[recorded([])],
        progress=False,
    )
    moved = load_value_model(str(second.directory / "value_model"), first.policy)
    assert not moved(rollout).equal(value(rollout))


def test_a_trunk_without_a_head_of_its_own(directory, tmp_path):
    """Of a language model, or of a classifier with two labels, only the trunk is
    taken: the head is new, and the value 0."""
    classifier(directory, "llama", tmp_path / "two", labels=2)
    policy, tokenizer = load(directory("llama"))
    rollout = random_rollout(policy, tokenizer)
    for path in (str(tmp_path / "two"), directory("llama")):
        value = load_value_model(path, policy)
        assert not predict_values(value, rollout).any()
        for p, q in zip(value.trunk.parameters(), policy.base_model.parameters()):
            assert p.equal(q) and p is not q


def test_wrong_value_models_are_refused(directory, tmp_path):
    """By name, before anything is written: nothing there, another vocabulary, too
    short a context, no trained head, an adapter."""
    half = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(directory("llama"))
    )
    half.config.architectures = ["LlamaForSequenceClassification"]
    half.save_pretrained(tmp_path / "headless")
    config = json.loads((tmp_path / "headless/config.json").read_text())
    (tmp_path / "headless/config.json").write_text(
        json.dumps(
            config
            | {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
        )
    )
    short = directory("gpt2", n_positions=8)
    adapter = (
        train(small("tiny", tmp_path / "adapter", **LORA), progress=False).directory
        / "model"
    )
    for value_model, says in [
        ("/nowhere", "'/nowhere'"),
        (
            directory("llama", vocab_size=30),
            "vocabulary has 30 tokens, the policy's 20",
        ),
        (str(tmp_path / "headless"), "lacks score.weight"),
        (short, "context of 8"),
        (str(adapter), "value_model must be"),
    ]:
        with pytest.raises(ValueError, match=says):
            train(
                small(
                    directory("llama"),
                    tmp_path / "run",
                    algorithm="ppo",
                    value_model=value_model,
                ),
                progress=False,
            )
    assert not (tmp_path / "run").exists()


def test_no_token_classifier_is_said(directory, tmp_path):
    "transformers has none for Gemma 3: the run ends well, with a warning."
    with pytest.warns(UserWarning, match="no token classifier for Gemma3TextModel"):
        run = train(
            small(directory("gemma3_text"), tmp_path / "run", algorithm="ppo"),
            reward_funcs=[recorded([])],
            progress=False,
        )
    assert (run.directory / "model").is_dir() and not (
        run.directory / "value_model"
    ).exists()
