"""A group in one row with its prompt once: the same numbers as a row for each
completion, for every kind of model, and fewer tokens."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from grpo_nb.engine.models import EngineModels
from grpo_nb import policy
from grpo_nb.engine import packing
from grpo_nb.engine.packing import (
    completions_per_row,
    shared_rows,
    shares_prompt,
    token_logprobs,
    values,
)
from grpo_nb.engine.precision import precision
from grpo_nb.policy import as_rollout, model_inputs
from grpo_nb.engine.adapters import reference_logprobs
from grpo_nb.rollout import Rollout
from grpo_nb.task import Query
from grpo_nb.update import update
from grpo_nb.value import ValueModel
from helpers import (
    VOCABULARY,
    character_tokenizer,
    gradient,
    random_rollout,
    short_config,
)

SMALL = dict(
    vocab_size=len(VOCABULARY),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=None,
)
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)),
    "smollm2": lambda: LlamaForCausalLM(
        LlamaConfig(**SMALL, num_key_value_heads=1, tie_word_embeddings=True)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2)),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(VOCABULARY),
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    ),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SMALL)),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(
            **SMALL, num_key_value_heads=2, num_local_experts=4, sliding_window=None
        )
    ),
}


def make(name, dtype=torch.float64):
    """A model of that kind with random weights, its norms in the dtype as well as
    they can be."""
    torch.manual_seed(0)
    model = MODELS[name]() if isinstance(name, str) else name()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(6)
    return model.to(dtype)


def plain(model, rollout):
    "A row for each completion, whole logits: log-probs and entropy."
    logits = model.eval()(**model_inputs(rollout)).logits[
        :, rollout.prompt_ids.shape[1] - 1 : -1
    ]
    every = logits.log_softmax(-1)
    mask = rollout.completion_mask
    return every.gather(-1, rollout.completion_ids[..., None]).squeeze(-1).masked_fill(
        ~mask, 0
    ), -(every.exp() * every).sum(-1).masked_fill(~mask, 0)


@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "in pieces"])
@pytest.mark.parametrize("G", [1, 3])
@pytest.mark.parametrize(
    "name", [name for name in MODELS if name != "mixtral"]
)  # its experts have no float64 kernel
def test_one_row_is_a_row_each(monkeypatch, name, G, pieces):
    """Log-probs, entropies and gradients, with prompts and completions of unequal
    length, the logits whole and in pieces of two tokens."""
    model = make(name)
    rollout = random_rollout(model, character_tokenizer(), num_generations=G)
    if pieces:
        monkeypatch.setattr(packing, "LOGITS", 2 * len(VOCABULARY))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shares_prompt(model, 12)
        ours = token_logprobs(model, rollout, return_entropy=True)
    truth = plain(model, rollout)
    for a, b in zip(ours, truth):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    slopes = []
    for logprobs, entropy in (ours, truth):
        model.zero_grad()
        (logprobs * rollout.values + 0.1 * entropy).sum().backward()
        slopes.append(gradient(model))
    assert (slopes[0] - slopes[1]).norm() <= 1e-5 * slopes[1].norm() and slopes[
        1
    ].norm() > 1e-3


PADDINGS = {
    "equal prompts": ("1+2=", "3+4="),
    "unequal prompts": ("1+2=", "345+678=", "7="),
    "one prompt": ("12+34=",),
}


@pytest.mark.parametrize("prompts", PADDINGS.values(), ids=PADDINGS)
@pytest.mark.parametrize("name", MODELS)
def test_the_simple_version_and_the_fast_one_agree(name, prompts):
    """Log-probs, entropies and gradients of the figure's `token_logprobs` and the
    engine's, at another temperature, with equal and empty completions."""
    model = make(name, torch.float32 if name == "mixtral" else torch.float64)
    tokenizer = character_tokenizer()
    rollout = random_rollout(model, tokenizer, num_generations=4, prompts=prompts)
    ids, mask = rollout.completion_ids.clone(), rollout.completion_mask.clone()
    ids[1], mask[1] = ids[0], mask[0]
    mask[2] = False
    rollout = replace(rollout, completion_ids=ids, completion_mask=mask)
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    simple, fast = [], []
    for found, way in (
        (simple, policy.token_logprobs),
        (fast, packing.token_logprobs),
    ):
        model.zero_grad()
        logprobs, entropy = way(model, rollout, 0.7, return_entropy=True)
        (logprobs * weights + 0.1 * entropy).sum().backward()
        found += [logprobs, entropy, gradient(model)]
        assert way(model, rollout, 0.7).equal(logprobs)
        assert not logprobs[~mask].any() and not entropy[~mask].any()
    for a, b in zip(simple[:2], fast[:2]):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    apart = (simple[2] - fast[2]).norm()
    assert apart < 1e-5 * simple[2].norm() and simple[2].norm() > 1


@pytest.mark.parametrize("version", [policy, packing], ids=["simple", "fast"])
def test_what_stands_on_padding_is_not_read(version):
    "A padding token that the model's embedding does not have, on either side."
    model = make("llama")
    rollout = random_rollout(model, character_tokenizer(), num_generations=3)
    junk = replace(
        rollout,
        prompt_ids=rollout.prompt_ids.masked_fill(~rollout.prompt_mask, 10**6),
        completion_ids=rollout.completion_ids.masked_fill(
            ~rollout.completion_mask, 10**6
        ),
    )
    ours = version.token_logprobs(model, junk)
    assert ours.equal(version.token_logprobs(model, rollout))


@pytest.mark.parametrize("version", [policy, packing], ids=["simple", "fast"])
def test_the_softmax_of_bfloat16_logits_is_in_float32(version):
    "bfloat16 has three digits: the probabilities of all tokens would not sum to 1."
    model = make("llama", torch.bfloat16)
    V = len(VOCABULARY)
    texts = as_rollout(character_tokenizer(), [Query("1+2=")], [""] * V)
    every_token = replace(texts, completion_ids=torch.arange(V)[:, None])
    logprobs = version.token_logprobs(model, every_token).detach()
    assert logprobs.dtype == torch.float32
    assert abs(logprobs.double().exp().sum() - 1) < 1e-5


@pytest.mark.parametrize("version", [policy, packing], ids=["simple", "fast"])
def test_dropout_is_off(version):
    "A model in train mode is scored twice alike, and is in eval mode then."
    model = make("gpt2").train()
    rollout = random_rollout(make("gpt2"), character_tokenizer(), num_generations=3)
    once = version.token_logprobs(model, rollout)
    assert not model.training
    assert once.equal(version.token_logprobs(model.train(), rollout))


@pytest.mark.parametrize("prompts", PADDINGS.values(), ids=PADDINGS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("shared", [False, True], ids=["own trunk", "head"])
def test_values_are_those_of_rows_padded_on_the_left(name, prompts, shared):
    "And their gradients, too; dropout is off, also in a trunk that is the policy's."
    model = make(name).train()
    rollout = random_rollout(
        make(name), character_tokenizer(), num_generations=3, prompts=prompts
    )
    value_model = ValueModel(model, shared=shared).train()
    torch.nn.init.normal_(value_model.head.weight)
    ours = values(value_model, rollout)
    assert not value_model.training and not value_model.trunk.training
    P = rollout.prompt_ids.shape[1]
    states = value_model.trunk(**model_inputs(rollout)).last_hidden_state
    truth = value_model.head(states).squeeze(-1)[:, P - 1 : -1]
    truth = truth.where(rollout.completion_mask, 0.0)
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-5)
    slopes = []
    for found in (ours, truth):
        value_model.zero_grad()
        value_model.trunk.zero_grad()
        found.square().sum().backward()
        slopes.append(gradient(value_model.trunk))
    assert (slopes[0] - slopes[1]).norm() <= 1e-5 * slopes[1].norm()


@pytest.mark.parametrize("name", MODELS)
def test_float32(name):
    "In float32 too, to its rounding."
    model = make(name, torch.float32)
    rollout = random_rollout(model, character_tokenizer(), num_generations=4)
    torch.testing.assert_close(
        token_logprobs(model, rollout), plain(model, rollout)[0], rtol=1e-5, atol=2e-5
    )


@given(
    st.lists(st.integers(0, 5), min_size=6, max_size=6),
    st.lists(st.integers(1, 4), min_size=2, max_size=2),
    st.sampled_from([1, 10**6]),
)
def test_where_every_token_is(lengths, prompts, hidden):
    """Each token stands in its row behind its prompt, at its own position, and is
    predicted by the token before it; it sees those before it and no sibling."""
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    prompt_mask = torch.arange(4) >= 4 - torch.tensor(prompts)[:, None]
    ids = torch.arange(100, 130).view(
        6, 5
    )  # every completion token has a number of its own, every prompt token, too
    rollout = Rollout(
        [None] * 2,
        torch.arange(1, 9).view(2, 4),
        prompt_mask,
        ids,
        mask,
        [""] * 6,
        mask[:, 0],
        3,
    )
    inputs, before = shared_rows(rollout, hidden)
    flat, position, L = (
        inputs["input_ids"].flatten(),
        inputs["position_ids"].flatten(),
        inputs["input_ids"].shape[1],
    )
    sees = inputs["attention_mask"]
    for place, (i, t) in zip(before.tolist(), mask.nonzero().tolist()):
        prompt = rollout.prompt_ids[i // 3][prompt_mask[i // 3]].tolist()
        text = prompt + ids[i, :t].tolist()
        assert flat[place] == text[-1] and position[place] == len(text) - 1
        row = inputs["input_ids"][place // L]
        seen = (
            row[sees[place // L, 0, place % L]]
            if sees.dim() == 4
            else row[: place % L + 1]
        )
        assert seen.tolist() == text


def test_the_prompt_is_computed_once(tiny):
    """Tokens that enter the model, counted at its embedding: at most P + sum of T_i
    a group, in scoring, for the reference, and in the update."""
    model, count = copy.deepcopy(tiny[0]), []
    shares_prompt(model, 16)  # asked once a model
    model.get_input_embeddings().register_forward_hook(
        lambda module, arguments, output: count.append(arguments[0].numel())
    )
    rollout = random_rollout(
        model, character_tokenizer(), num_generations=8, prompts=("12+34=",) * 4
    )
    rollout = replace(
        rollout, completion_ids=rollout.completion_ids.clamp(max=len(VOCABULARY) - 1)
    )
    real = int(rollout.prompt_mask.sum() + rollout.completion_mask.sum())
    longest = int(
        (
            rollout.prompt_mask.sum(1)
            + rollout.completion_mask.sum(1).view(4, 8).sum(1)
        ).max()
    )
    for run in (
        lambda: token_logprobs(model, rollout),
        lambda: reference_logprobs(model, rollout),
        lambda: update(
            EngineModels(model, None, torch.optim.SGD(model.parameters(), lr=0.0)),
            rollout,
            short_config(num_generations=8),
        ),
    ):
        count.clear()
        run()
        assert real <= sum(count) <= 4 * longest
    count.clear()
    update(
        EngineModels(model, None, torch.optim.SGD(model.parameters(), lr=0.0)),
        rollout,
        short_config(num_generations=8, max_tokens_per_micro_batch=1),
    )
    assert sum(count) == real and len(count) == 4  # a group alone has no padding at all


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_equal_completions_are_computed_once(name):
    """Within a group, not across groups; log-probs, entropies and gradients are
    those of all of them, and the empty completion is one, too."""
    model = make(name)
    rollout = random_rollout(model, character_tokenizer(), num_generations=6)
    ids, mask = rollout.completion_ids.clone(), rollout.completion_mask.clone()
    for copy_, source in ((1, 0), (4, 2), (5, 2), (7, 6), (8, 0)):
        ids[copy_], mask[copy_] = ids[source], mask[source]  # row 8 is of another group
    mask[[9, 11]] = False
    rollout = replace(rollout, completion_ids=ids, completion_mask=mask)
    shares_prompt(model, 12)
    count = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, arguments, output: count.append(arguments[0].numel())
    )
    ours = token_logprobs(model, rollout, return_entropy=True)
    hook.remove()
    texts = [
        {tuple(ids[i][mask[i]].tolist()) for i in range(6 * g, 6 * g + 6)}
        for g in range(3)
    ]
    assert [len(t) for t in texts] != [6, 6, 6]
    tokens = [
        int(prompt) + sum(map(len, t))
        for prompt, t in zip(rollout.prompt_mask.sum(1), texts)
    ]
    assert sum(count) == 3 * max(tokens)  # three rows, as long as the longest
    truth = plain(model, rollout)
    for a, b in zip(ours, truth):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    slopes = []
    for logprobs, entropy in (ours, truth):
        model.zero_grad()
        (logprobs * rollout.values + 0.1 * entropy).sum().backward()
        slopes.append(gradient(model))
    assert (slopes[0] - slopes[1]).norm() <= 1e-5 * slopes[1].norm() and slopes[
        1
    ].norm() > 1e-3


@pytest.mark.parametrize(
    "P, T, hidden",
    [
        (6, 4, 128),
        (128, 32, 128),
        (96, 48, 576),
        (512, 256, 896),
        (8, 512, 128),
        (256, 1024, 4096),
    ],
)
def test_completions_per_row(P, T, hidden):
    """Against the FLOPs of every cut, counted with 12 hidden^2 weights a layer and
    the whole square of a row."""

    def flops(k):
        return (
            16 / k * (2 * 12 * hidden**2 * (P + k * T) + 4 * hidden * (P + k * T) ** 2)
        )

    k, cuts = completions_per_row(16, P, T, hidden), [1, 2, 4, 8, 16]
    assert flops(k) <= 1.25 * min(map(flops, cuts)) and all(
        flops(more) > 1.25 * min(map(flops, cuts)) for more in cuts if more > k
    )
    if T < P:
        assert k == 16


@pytest.mark.parametrize(
    "kind, warns",
    [
        (
            lambda: MistralForCausalLM(
                MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4)
            ),
            False,
        ),  # its window is in its config
        (
            lambda: MambaForCausalLM(
                MambaConfig(
                    vocab_size=len(VOCABULARY),
                    hidden_size=32,
                    num_hidden_layers=2,
                    pad_token_id=0,
                    eos_token_id=1,
                    bos_token_id=None,
                )
            ),
            True,
        ),
        (
            lambda: Gemma2ForCausalLM(
                Gemma2Config(
                    **SMALL,
                    num_key_value_heads=2,
                    head_dim=8,
                    final_logit_softcapping=30.0,
                )
            ),
            False,
        ),  # too little to see in a trial, and in its config
        (
            lambda: LlamaForCausalLM(LlamaConfig(**SMALL, attn_implementation="eager")),
            True,
        ),
    ],
    ids=["sliding window", "state space", "soft cap", "eager attention"],
)
def test_a_model_that_cannot_share(kind, warns):
    """It falls back to a row for each completion, with one warning, and its numbers
    are right."""
    model = make(kind, torch.float32)
    rollout = random_rollout(
        make("llama", torch.float32), character_tokenizer(), num_generations=3
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not any(shares_prompt(model, 12) for _ in range(3))
    assert [
        ("row of its own" in str(w.message))
        for w in caught
        if issubclass(w.category, UserWarning)
    ].count(True) == warns
    torch.testing.assert_close(
        token_logprobs(model, rollout), plain(model, rollout)[0], rtol=1e-4, atol=1e-5
    )


def test_within_its_window_a_model_shares():
    model = make(
        lambda: MistralForCausalLM(
            MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=16)
        )
    )
    rollout = random_rollout(model, character_tokenizer(), num_generations=3)
    assert shares_prompt(model, 12) and not shares_prompt(model, 17)
    torch.testing.assert_close(
        token_logprobs(model, rollout), plain(model, rollout)[0], rtol=0, atol=1e-6
    )


def test_logits_never_exist_whole(monkeypatch):
    """With a budget of four rows of logits, no larger piece is ever projected,
    forward or backward."""
    model, seen = make("llama"), []
    rollout = random_rollout(model, character_tokenizer(), num_generations=3)
    monkeypatch.setattr(packing, "LOGITS", 4 * len(VOCABULARY))
    shares_prompt(model, 12)
    model.get_output_embeddings().register_forward_hook(
        lambda module, arguments, output: seen.append(output.shape[0])
    )
    token_logprobs(model, rollout).sum().backward()
    n = int(rollout.completion_mask.sum())
    assert (
        max(seen) <= 4 and sum(seen) == 2 * n
    )  # once forward, once again in the backward pass


def test_a_larger_group_in_smaller_rows():
    """Long completions: several rows a group, some of them shared; the same numbers
    and gradients."""
    model = make("gpt2")
    rollout = random_rollout(
        model, character_tokenizer(), num_generations=6, T=40, prompts=("1+2=", "3=")
    )
    assert 2 < shared_rows(rollout, 32)[0]["input_ids"].shape[0] < 12
    results = [
        (
            *x,
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(
                        (x[0] * rollout.values).sum(), tuple(model.parameters())
                    )
                ]
            ),
        )
        for x in (
            token_logprobs(model, rollout, return_entropy=True),
            plain(model, rollout),
        )
    ]
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_another_attention_is_asked_again():
    "What was found out under one attention implementation does not hold under another."
    model = make("llama", torch.float32)
    rollout = random_rollout(model, character_tokenizer(), num_generations=3)
    assert shares_prompt(model, 12)
    model.set_attn_implementation("eager")
    with pytest.warns(UserWarning, match="row of its own"):
        ours = token_logprobs(copy.deepcopy(model), rollout)
    torch.testing.assert_close(ours, plain(model, rollout)[0], rtol=1e-4, atol=1e-5)


def test_in_bfloat16(monkeypatch):
    """Under autocast, gradients through pieces are those of the whole; and a model
    whose weights are bfloat16 shares its prompt, too."""
    model = make("llama", torch.float32)
    rollout = random_rollout(model, character_tokenizer(), num_generations=3)
    slopes = []
    for budget in (2**25, 2 * len(VOCABULARY)):
        monkeypatch.setattr(packing, "LOGITS", budget)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = token_logprobs(model, rollout).sum()
        loss.backward()
        slopes.append(gradient(model))
    assert (slopes[0] - slopes[1]).norm() < 0.02 * slopes[0].norm()
    half = make("llama", torch.bfloat16)
    assert shares_prompt(half, 12) and token_logprobs(half, rollout).isfinite().all()


def test_no_pass_sees_the_weights_before_an_update():
    """Within the precision of a run, a pass reads the weights as they are, not a
    copy that an earlier pass has rounded."""
    model = make("llama", torch.float32)
    rollout = random_rollout(model, character_tokenizer(), num_generations=3)
    config = short_config(dtype="bfloat16")
    with precision(config, model.device):
        token_logprobs(model, rollout).sum().backward()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
        ours = token_logprobs(model, rollout)
    with precision(config, model.device):
        truth = token_logprobs(model, rollout)
    assert ours.equal(truth)


def test_completions_without_a_token():
    "A tokenizer without EOS and empty answers: nothing to score, and no crash."
    model, tokenizer = make("llama"), character_tokenizer(eos=None)
    rollout = as_rollout(tokenizer, [Query("1+2="), Query("3=")], ["", "", "", ""])
    assert rollout.completion_ids.shape == (4, 0) and token_logprobs(
        model, rollout
    ).shape == (4, 0)


def test_ppo_cuts_for_its_value_model(llama):
    "The value model has a row for each completion: the budget holds for it, too."
    tokenizer, seen = character_tokenizer(), []
    rollout = random_rollout(
        llama,
        tokenizer,
        num_generations=1,
        T=9,
        prompts=("1+2=", "34567+34567=", "1=", "2=", "3=", "4="),
    )
    rollout = replace(rollout, advantages=rollout.values)
    value = ValueModel(llama)
    for model in (llama.base_model, value.trunk):
        model.get_input_embeddings().register_forward_hook(
            lambda module, arguments, output: seen.append(arguments[0].numel())
        )
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.0) for m in (llama, value)]
    update(
        EngineModels(
            llama, None, optimizers[0], value=value, value_optimizer=optimizers[1]
        ),
        rollout,
        short_config(algorithm="ppo", max_tokens_per_micro_batch=45),
    )
    assert len(seen) > 2 and max(seen) <= 45
