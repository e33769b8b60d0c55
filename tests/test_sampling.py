"""The sampler's cache: the same numbers as without one, no prompt read twice,
nothing copied that need not be, for every kind of model."""

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from grpo_nb.engine import decoding
from grpo_nb.algorithm import grpo_step, ppo_step
from grpo_nb.engine.packing import token_logprobs
from grpo_nb.policy import load_policy
from grpo_nb.engine.adapters import reference_logprobs
from grpo_nb.engine.decoding import sample
from grpo_nb.engine.decoding import _by_length, _fill_gaps, _PreallocatedLayer
from grpo_nb.engine.decoding import draw_by_blocks
from grpo_nb.engine.data import load_task
from grpo_nb.task import Query
from grpo_nb.run import build
from grpo_nb.run.build import build_models, checkpoint_layers
from helpers import VOCABULARY, character_tokenizer, reproducible, short_config
from test_rows import MODELS, SMALL, make, plain

PROMPTS = [Query("1+2="), Query("12+34="), Query("9"), Query("7+77=")]


def counted(model):
    "Tokens of each forward pass, at the input embedding."
    passes = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, arguments, output: passes.append(tuple(arguments[0].shape))
    )
    return passes


@pytest.mark.parametrize(
    "prompts", [PROMPTS, PROMPTS[1:2] * 3], ids=["unequal prompts", "equal prompts"]
)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "mixtral"])
def test_recorded_is_scored(name, prompts):
    """Log-probs collected with the cache are those of a pass without one, while rows
    end at different times and others move into their places."""
    model = make(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a model that cannot be batched
        rollout = sample(
            model,
            character_tokenizer(),
            prompts,
            16,
            12,
            generator=torch.Generator().manual_seed(0),
        )
    lengths = rollout.completion_mask.sum(1)
    assert len(set(lengths.tolist())) > 4 and rollout.logprobs.dtype == torch.float64
    torch.testing.assert_close(
        rollout.logprobs, plain(model, rollout)[0], rtol=0, atol=1e-6
    )  # some norms are float32 in a float64 model


def test_rows_that_ended_are_not_computed():
    """Each prompt passes once for its group, then each row once a token for as long
    as it lives; its last token never."""
    model = make("llama", torch.float32)
    sample(
        model, character_tokenizer(), PROMPTS, 2, 2
    )  # asks once what the model can do
    passes = counted(model)
    rollout = sample(
        model,
        character_tokenizer(),
        PROMPTS,
        16,
        12,
        generator=torch.Generator().manual_seed(0),
    )
    lengths = rollout.completion_mask.sum(1)
    assert (
        passes[0] == tuple(rollout.prompt_ids.shape)
        and sum(n for _, n in passes[1:]) == len(passes) - 1
    )
    assert [n for n, _ in passes[1:]] == [
        int((lengths > t).sum()) for t in range(1, int(lengths.max()))
    ]


def test_prompts_of_similar_length_are_read_together():
    model = make("llama", torch.float32)
    passes = counted(model)
    queries = [Query("1" * n) for n in (3, 40, 2, 38, 1)]
    sample(model, character_tokenizer(), queries, 2, 4)
    passes.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            decoding, "_by_length", lambda lengths: _by_length(lengths, padding=8)
        )
        rollout = sample(
            model,
            character_tokenizer(),
            queries,
            2,
            4,
            generator=torch.Generator().manual_seed(0),
        )
    assert passes[:2] == [(2, 40), (3, 3)]
    torch.testing.assert_close(
        rollout.logprobs, plain(model, rollout)[0], rtol=0, atol=2e-5
    )
    assert rollout.prompt_mask.sum(1).tolist() == [
        3,
        40,
        2,
        38,
        1,
    ]  # in the order that they were asked


@given(st.lists(st.integers(1, 600), min_size=1, max_size=30), st.integers(0, 300))
def test_by_length(lengths, padding):
    """Each prompt once, no piece with more padding than allowed, and a piece is
    closed only when the next would be too much."""
    pieces = _by_length(lengths, padding)
    assert sorted(i for piece in pieces for i in piece) == list(range(len(lengths)))

    def wasted(piece):
        return sum(lengths[piece[0]] - lengths[i] for i in piece)

    assert all(wasted(piece) <= padding for piece in pieces)
    assert all(
        wasted([*piece, after[0]]) > padding for piece, after in zip(pieces, pieces[1:])
    )


def test_room():
    """A token is written into its place and nothing else is touched; where a row
    leaves, one row moves."""
    layer = DynamicCache().layer_class_to_replicate()
    keys, values = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    layer.update(keys, values)
    room = _PreallocatedLayer(layer, N=6, P=6, T=4)
    room.fill(torch.arange(6), layer)
    assert room.keys.shape == (6, 3, 6, 5)
    assert not room.keys[:, :, :2].any()  # padded on the left
    for g in range(6):
        assert room.keys[g, :, 2:].equal(keys[g // 3]) and room.values[g, :, 2:].equal(
            values[g // 3]
        )
    places = room.all_keys.data_ptr(), room.all_values.data_ptr()
    new = torch.randn(6, 3, 1, 5)
    shown, _ = room.update(new, -new)
    assert (
        shown.shape[2] == room.get_seq_length() == 7
        and shown[:, :, -1:].equal(new)
        and room.values[:, :, -1:].equal(-new)
    )
    before = room.keys.clone()
    gaps, movers = _fill_gaps(6, [1, 3])
    room.move(torch.tensor(gaps), torch.tensor(movers), 4)
    assert room.keys.equal(before[[0, 4, 2, 5]])
    assert (room.all_keys.data_ptr(), room.all_values.data_ptr()) == places
    shown, _ = room.update(new[:4], new[:4])
    assert shown.shape == (4, 3, 8, 5) and shown[:, :, :7].equal(before[[0, 4, 2, 5]])


@pytest.mark.parametrize(
    "kind, warns",
    [
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
            lambda: MistralForCausalLM(
                MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=5)
            ),
            False,
        ),
    ],
    ids=["state space", "sliding window"],
)
def test_a_model_with_another_cache(kind, warns):
    """A state-space model reads the whole sequence for each token, with a warning; a
    sliding window keeps the cache of its own."""
    model = make(kind, torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        rollout = sample(
            model,
            character_tokenizer(),
            PROMPTS,
            8,
            10,
            generator=torch.Generator().manual_seed(0),
        )
    assert any("keeps no cache" in str(w.message) for w in caught) == warns
    assert len(set(rollout.completion_mask.sum(1).tolist())) > 2
    torch.testing.assert_close(
        rollout.logprobs, plain(model, rollout)[0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("V", [1, 2, 10, 1000])
def test_draw_by_blocks(V):
    """First a block, then a token of it: the frequencies are those of the
    distribution, whatever the size of the vocabulary (chi-squared, 5 sigma)."""
    p = torch.rand(V, generator=torch.Generator().manual_seed(V)).square().softmax(0)
    n = 400 * V
    seen = torch.bincount(
        draw_by_blocks(
            p.log().expand(n, V), generator=torch.Generator().manual_seed(0)
        ),
        minlength=V,
    )
    assert len(seen) == V
    chi = ((seen - n * p).square() / (n * p)).sum().item()
    assert abs(chi - (V - 1)) <= 5 * math.sqrt(2 * V)


def test_no_draw_of_what_was_cut():
    "What top-k cut off is never drawn, whichever block it shares with the rest."
    logprobs = torch.randn(
        1, 50, generator=torch.Generator().manual_seed(0)
    ).log_softmax(-1)
    drawn = draw_by_blocks(
        logprobs.expand(5000, 50), top_k=3, generator=torch.Generator().manual_seed(0)
    )
    assert set(drawn.tolist()) == set(logprobs[0].topk(3).indices.tolist())


def test_a_step_in_bfloat16_reaches_every_weight():
    """While sampling, rounded weights are kept; the update must not find them: they
    have no gradient."""
    config = short_config(
        dtype="bfloat16", num_prompts=4, num_generations=8, device="cpu"
    )
    task = load_task("add")
    models = build_models(config, task)
    rounded = []
    hook = models.policy.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda module, arguments, output: rounded.append(output.dtype)
    )
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        models.generator = torch.Generator().manual_seed(1)
        grpo_step(models, task.queries("train", 4), config)
        assert not torch.is_autocast_cache_enabled()
    hook.remove()
    assert torch.bfloat16 in rounded
    assert all(
        p.grad is not None and p.grad.any() and p.dtype == torch.float32
        for p in models.policy.parameters()
    )


def test_rounded_weights_are_kept_for_one_sampling(tiny):
    """In bfloat16 each weight is rounded once a sampling, not for each token; and
    the next sampling sees what the weights have become."""
    model, tokenizer = copy.deepcopy(tiny[0]).requires_grad_(True), tiny[1]
    queries, states = load_task("add").queries("train", 2), []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda *_: states.append(torch.is_autocast_cache_enabled())
    )

    def drawn():
        return sample(
            model, tokenizer, queries, 4, 6, generator=torch.Generator().manual_seed(0)
        ).logprobs

    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        first = drawn()
        hook.remove()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
        second = drawn()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        fresh = drawn()
    assert len(states) > 2 and all(states[-3:])
    assert second.equal(fresh) and not (
        second.shape == first.shape and second.equal(first)
    )


def test_an_interrupted_sampling_leaves_no_rounded_weights(tiny):
    model, tokenizer, calls = copy.deepcopy(tiny[0]).requires_grad_(True), tiny[1], []
    queries = load_task("add").queries("train", 2)

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    sample(model, tokenizer, queries, 4, 6)  # asks once what the model can do
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        hook = model.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            sample(model, tokenizer, queries * 4, 8, 8, temperature=3.0)
        hook.remove()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
        after = sample(
            model, tokenizer, queries, 4, 6, generator=torch.Generator().manual_seed(0)
        ).logprobs
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        fresh = sample(
            model, tokenizer, queries, 4, 6, generator=torch.Generator().manual_seed(0)
        ).logprobs
    assert after.equal(fresh)


def test_inside_an_autocast_of_ones_own(tiny):
    """With its cache on, as it is by default: scoring without a gradient leaves
    nothing that the update would trip over."""
    config, task = (
        short_config(algorithm="ppo", num_prompts=8, dtype="bfloat16", device="cpu"),
        load_task("add"),
    )
    models = build_models(config, task)
    with torch.autocast("cpu", torch.bfloat16):
        models.generator = torch.Generator().manual_seed(0)
        ppo_step(models, task.queries("train", 8), config)
    for model in (models.policy, models.value):
        assert all(p.grad is not None for p in model.parameters())


def test_a_float64_model_under_autocast():
    "Autocast leaves float64 as it is, and so does the cache."
    model = make("llama")
    with torch.autocast("cpu", torch.bfloat16):
        rollout = sample(
            model,
            character_tokenizer(),
            PROMPTS,
            4,
            6,
            generator=torch.Generator().manual_seed(0),
        )
    torch.testing.assert_close(
        rollout.logprobs, plain(model, rollout)[0], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("pattern", [1, 2])
def test_full_and_sliding_layers(pattern):
    "One cache with layers of both kinds; rows that move, move in both."
    model = make(
        lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(
                **SMALL,
                num_key_value_heads=2,
                head_dim=8,
                sliding_window=5,
                layer_types=["sliding_attention", "full_attention"][:: pattern * 2 - 3],
            )
        ),
        torch.float32,
    )
    rollout = sample(
        model,
        character_tokenizer(),
        PROMPTS,
        8,
        10,
        generator=torch.Generator().manual_seed(0),
    )
    assert len(set(rollout.completion_mask.sum(1).tolist())) > 2
    torch.testing.assert_close(
        rollout.logprobs, plain(model, rollout)[0], rtol=1e-4, atol=1e-4
    )


def test_the_reference_is_scored_in_pieces(tiny):
    """It keeps to max_tokens_per_micro_batch, tracks nothing, and gives the same
    numbers."""
    model, tokenizer = tiny
    rollout = sample(
        model,
        tokenizer,
        load_task("add", digits=1).queries("train", 3)
        + load_task("add").queries("train", 5),
        4,
        8,
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        whole = token_logprobs(model, rollout)
    torch.testing.assert_close(
        reference_logprobs(model, rollout), whole, rtol=0, atol=1e-5
    )
    passes = counted(model)
    cut = reference_logprobs(model, rollout, max_tokens=60)
    assert len(passes) > 3 and all(rows * length <= 60 for rows, length in passes)
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-5)
    assert not cut.is_inference() and not cut.requires_grad


def test_gradient_checkpointing(tiny):
    """The same step, with each layer computed twice; dropout stays off, and sampling
    is as before."""
    config, task, seen = (
        short_config(num_prompts=4, num_generations=8, device="cpu"),
        load_task("add"),
        {},
    )
    for lean in (False, True):
        models = build_models(replace(config, gradient_checkpointing=lean), task)
        calls = []
        models.policy.model.layers[0].mlp.register_forward_pre_hook(
            lambda *_: calls.append(torch.is_grad_enabled())
        )
        models.generator = torch.Generator().manual_seed(1)
        _, metrics = grpo_step(models, task.queries("train", 4), config)
        seen[lean] = (
            reproducible(metrics),
            sum(calls),
            [p.detach() for p in models.policy.parameters()],
        )
    assert seen[True][1] == 2 * seen[False][1] and seen[True][0] == pytest.approx(
        seen[False][0], abs=1e-5
    )
    for a, b in zip(seen[False][2], seen[True][2]):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_gradient_checkpointing_is_refused_where_it_is_not_known():
    with pytest.raises(
        ValueError, match="gradient_checkpointing is not available for Linear"
    ):
        checkpoint_layers(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_reference_dtype(algorithm):
    "The reference alone is rounded."
    models = build_models(
        short_config(algorithm=algorithm, reference_dtype="bfloat16", device="cpu"),
        load_task("add"),
    )
    assert {p.dtype for p in models.reference.parameters()} == {torch.bfloat16} and {
        p.dtype for p in models.policy.parameters()
    } == {torch.float32}
    loaded, _ = load_policy("tiny", "cpu", "bfloat16")
    assert {name: x.dtype for name, x in models.reference.named_buffers()} == {
        name: x.dtype for name, x in loaded.named_buffers()
    }  # rotary frequencies stay float32
    assert all(
        a.equal(b)
        for a, b in zip(
            models.reference.state_dict().values(), loaded.state_dict().values()
        )
    )


def test_a_rounded_reference_is_not_copied_in_float32_first():
    "Making it takes its own bytes, not those of another policy."
    config = short_config(reference_dtype="bfloat16", device="cpu")
    policy, _ = load_policy("tiny", "cpu")
    there = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    copied = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            for x in tree_leaves(result):
                if isinstance(x, torch.Tensor) and x.dim() == 2:
                    if x.untyped_storage().data_ptr() not in there:
                        copied.append((x.dtype, x.numel()))
            return result

    with Copies():
        reference = build._make_reference(config, policy, policy)
    matrices = [p.numel() for p in reference.parameters() if p.dim() == 2]
    half = sum(n for dtype, n in copied if dtype == torch.bfloat16)
    assert {dtype for dtype, _ in copied} == {torch.bfloat16}
    assert half == sum(matrices) > 500_000
