"""Attention in parts: what a softmax over the whole square gives, and its gradient,
for rows of every shape; and wherever the parts would not be exact, the square."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_nb.engine import attention
from grpo_nb.engine.attention import (
    RowMask,
    attend_in_parts,
    find_parts,
    merge,
    row_mask,
)
from grpo_nb.engine.packing import shared_rows, token_logprobs
from grpo_nb.run.build import checkpoint_layers
from helpers import VOCABULARY, character_tokenizer, gradient, random_rollout

ROWS = {
    "even": ([4, 4], [[3, 3], [3, 3]]),
    "ragged": ([7, 3, 5], [[5, 2, 0], [0, 0, 3], [4, 4, 6]]),
    "long and short": ([40, 3], [[1, 30, 2, 60], [70, 1, 0, 1]]),
    "one prompt token": ([1, 2], [[2, 1], [1, 3]]),
    "one completion": ([3], [[9]]),
}
HEADS = {"as many": (4, 4), "fewer keys": (6, 2), "one key": (3, 1)}


def owners(prompts, completions):
    "Whose each token of a row is: 0 the prompt's, then by completion; -1 padding."
    rows = []
    for prompt, lengths in zip(prompts, completions):
        row = [0] * prompt
        for number, length in enumerate(lengths, 1):
            row += [number] * length
        rows.append(row)
    L = max(map(len, rows))
    return torch.tensor([row + [-1] * (L - len(row)) for row in rows])


def block_mask(owner):
    "Token i of a row sees token j: of its prompt or its own, and not behind it."
    R, L = owner.shape
    mask = torch.zeros(R, 1, L, L, dtype=torch.bool)
    for r in range(R):
        for i in range(L):
            for j in range(i + 1):
                mask[r, 0, i, j] = owner[r, j] in (0, owner[r, i])
    return mask


def written_out(query, key, value, mask, scale=None):
    "Attention by its definition: a softmax over the whole square."
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * query @ key.transpose(2, 3)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value


def tensors(owner, heads=(4, 4), d=8, dtype=torch.float64):
    "Random queries, keys, values, and weights of what comes out, 0 on padding."
    generator = torch.Generator().manual_seed(0)
    R, L = owner.shape
    made = [
        torch.randn(R, L, h, d, generator=generator, dtype=torch.float64)
        for h in (heads[0], heads[1], heads[1], heads[0])
    ]
    *inputs, weights = [x.transpose(1, 2).to(dtype) for x in made]
    weights = weights * (owner >= 0)[:, None, :, None]
    return [x.requires_grad_() for x in inputs], weights


def slopes(out, inputs, weights):
    return torch.autograd.grad((out * weights).sum(), inputs)


def both_ways(prompts, completions, heads=(4, 4), dtype=torch.float64, scale=None):
    "What comes out and the gradients, in parts and written out in float64."
    owner = owners(prompts, completions)
    inputs, weights = tensors(owner, heads, dtype=dtype)
    real = (owner >= 0)[:, None, :, None]
    parts = find_parts(torch.tensor(prompts), torch.tensor(completions))
    out = attend_in_parts(*inputs, parts, scale)
    assert not out.masked_select(~real).any() and out.dtype == dtype
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = written_out(*exact, block_mask(owner), scale) * real
    ours = [out, *slopes(out, inputs, weights)]
    return ours, [truth, *slopes(truth, exact, weights.double())]


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_parts_are_the_square(rows, heads):
    for a, b in zip(*both_ways(*rows, heads)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


LENGTHS = st.lists(st.integers(0, 6), min_size=6, max_size=6)


@given(st.lists(st.integers(1, 7), min_size=3, max_size=3), LENGTHS)
def test_parts_of_all_shapes(prompts, lengths):
    lengths[0] = max(1, lengths[0])  # somewhere there is a token
    completions = [lengths[:2], lengths[2:4], lengths[4:]]
    for a, b in zip(*both_ways(prompts, completions, (2, 1))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_the_scale_of_scores(scale):
    for a, b in zip(*both_ways(*ROWS["ragged"], scale=scale)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "dtype, allowed",
    [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.01)],
    ids=str,
)
def test_narrower_numbers(dtype, allowed):
    "Against float64: off by what their digits allow."
    for a, b in zip(*both_ways(*ROWS["long and short"], (6, 2), dtype)):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=allowed, atol=allowed)


def test_the_gradient_is_that_of_finite_differences():
    owner = owners(*ROWS["ragged"])
    inputs, weights = tensors(owner, (2, 1), d=4)
    parts = find_parts(*map(torch.tensor, ROWS["ragged"]))

    def loss(*inputs):
        return (attend_in_parts(*inputs, parts) * weights).sum()

    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


def test_large_scores():
    "A part whose scores are a thousand above the other's has all of the attention."
    out, other = torch.ones(1, 2), torch.zeros(1, 2)
    for difference, share in ((1000.0, 1.0), (-1000.0, 0.0)):
        lse = torch.tensor([difference])
        merged, both = merge(out, lse, other, torch.zeros(1))
        assert merged.tolist() == [[share, share]] and both.item() == max(difference, 0)


# The mask -----------------------------------------------------------------------------


def mask_of(prompts, completions):
    "A mask that knows its parts, whatever its size."
    mask = block_mask(owners(prompts, completions))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "GAIN", 0.0)
        return row_mask(mask, torch.tensor(prompts), torch.tensor(completions))


@pytest.fixture
def in_parts(monkeypatch):
    "All that is computed in parts is noted here; small rows are, too."
    seen = []

    def noted(query, *arguments):
        seen.append(query.dtype)
        return attend_in_parts(query, *arguments)

    monkeypatch.setattr(attention, "attend_in_parts", noted)
    monkeypatch.setattr(attention, "GAIN", 0.0)
    return seen


def test_a_mask_attends_in_parts(in_parts):
    "By the call that models make, and by position."
    owner = owners(*ROWS["ragged"])
    (q, k, v), weights = tensors(owner, (4, 2))
    mask = mask_of(*ROWS["ragged"])
    assert type(mask) is RowMask and torch.equal(mask, block_mask(owner))
    for out in (
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3),
        F.scaled_dot_product_attention(q, k, v, mask, 0.0, False, scale=0.3),
    ):
        truth = written_out(q, k, v, mask, 0.3)
        torch.testing.assert_close(out * weights, truth * weights, rtol=0, atol=1e-12)
    assert len(in_parts) == 2


def other_masks(mask):
    "What models make of a mask; none of these is a mask of rows any more."
    return {
        "slice": mask[..., : mask.shape[-1]],
        "bias": torch.where(mask, 0.5, -torch.inf).double(),
        "inverse": ~mask,
        "and": mask & torch.ones_like(mask),
        "copy": mask.clone(),
    }


@pytest.mark.parametrize("change", other_masks(torch.ones(1, 1, 2, 2).bool()))
def test_a_changed_mask_is_an_ordinary_one(in_parts, change):
    mask = other_masks(mask_of(*ROWS["ragged"]))[change]
    assert type(mask) is torch.Tensor
    inputs, _ = tensors(owners(*ROWS["ragged"]))
    F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    assert in_parts == []


def test_what_does_not_fit_is_computed_as_a_square(in_parts):
    "Dropout, narrower values, other lengths, and a causal mask besides are refused."
    owner = owners(*ROWS["even"])
    (q, k, v), _ = tensors(owner)
    mask = mask_of(*ROWS["even"])
    attend = F.scaled_dot_product_attention
    narrow = attend(q, k, v[..., :5], attn_mask=mask)
    truth = written_out(q, k, v, mask)[..., :5]
    torch.testing.assert_close(narrow, truth, rtol=0, atol=1e-12)
    one = attend(q[:, :, -1:], k, v, attn_mask=mask[:, :, -1:])
    torch.testing.assert_close(one, written_out(q, k, v, mask)[:, :, -1:])
    attend(q, k, v, attn_mask=mask, dropout_p=0.5)
    with pytest.raises(RuntimeError):  # two rows of masks, one of tokens
        attend(q[:1], k[:1], v[:1], attn_mask=mask)
    attend(q, k, v, attn_mask=mask, is_causal=True)
    with pytest.raises(RuntimeError):
        attend(q, k.float(), v, attn_mask=mask)
    assert in_parts == []


def test_under_autocast(in_parts):
    "Inputs are rounded as PyTorch rounds them, float64 is not."
    (q, k, v), _ = tensors(owners(*ROWS["even"]), dtype=torch.float32)
    mask = mask_of(*ROWS["even"])
    with torch.autocast("cpu", torch.bfloat16):
        ours = F.scaled_dot_product_attention(q, k.bfloat16(), v, attn_mask=mask)
        plain = mask.as_subclass(torch.Tensor)
        theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=plain)
        wide = [x.double() for x in (q, k, v)]
        F.scaled_dot_product_attention(*wide, attn_mask=mask)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert in_parts == [torch.bfloat16, torch.float64]
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "P, k, T, cut",
    [
        (128, 16, 32, True),
        (96, 8, 48, True),
        (512, 64, 16, True),
        (6, 16, 8, False),
        (8, 8, 5, False),
        (512, 2, 16, False),
        (512, 2, 0, False),
    ],
)
def test_a_mask_is_cut_where_it_pays(P, k, T, cut):
    mask = torch.ones(1, 1, P + k * T, P + k * T, dtype=torch.bool)
    found = row_mask(mask, torch.tensor([P]), torch.full((1, k), T))
    assert isinstance(found, RowMask) == cut


def test_on_other_devices_it_is_the_square():
    mask = torch.ones(1, 1, 640, 640, dtype=torch.bool, device="meta")
    assert row_mask(mask, torch.tensor([128]), torch.full((1, 16), 32)) is mask


# Models -------------------------------------------------------------------------------


def llama(dtype=torch.float64):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def scored(model, rollout):
    "Log-probs and the gradient of their weighted sum."
    model.zero_grad()
    logprobs = token_logprobs(model, rollout)
    (logprobs * rollout.values).sum().backward()
    return logprobs.detach(), gradient(model)


def test_a_model_is_left_as_it_was(in_parts):
    "Its config, its modules, and what transformers knows of attention."
    model = llama()
    rollout = random_rollout(model, character_tokenizer(), num_generations=4)
    token_logprobs(model, rollout)
    in_parts.clear()
    config, names = copy.deepcopy(model.config), [set(vars(m)) for m in model.modules()]
    token_logprobs(model, rollout)
    assert len(in_parts) == 2  # layers
    assert model.config.to_dict() == config.to_dict()
    assert model.config._attn_implementation == config._attn_implementation == "sdpa"
    assert [set(vars(m)) for m in model.modules()] == names


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_layers_that_are_computed_again(monkeypatch, in_parts, autocast):
    "Gradient checkpointing: the backward pass meets the same mask."
    model = llama(torch.float32)
    rollout = random_rollout(model, character_tokenizer(), num_generations=4)
    rollout = replace(rollout, values=rollout.values.float())
    token_logprobs(model, rollout)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        once = scored(model, rollout)
        in_parts.clear()
        checkpoint_layers(model)
        again = scored(model, rollout)
    assert len(in_parts) == 4  # two layers, twice
    assert once[0].equal(again[0])
    torch.testing.assert_close(once[1], again[1], rtol=1e-4, atol=1e-5)


def test_no_square_is_kept(monkeypatch):
    "For the backward pass a layer keeps nothing as large as its square."
    model = llama(torch.float32)
    rollout = random_rollout(
        model, character_tokenizer(), num_generations=8, T=40, prompts=("1+2=",)
    )
    rollout = replace(rollout, values=rollout.values.float())
    L = shared_rows(rollout, 10**6)[0]["input_ids"].shape[1]
    monkeypatch.setattr("grpo_nb.engine.packing.completions_per_row", lambda *_: 8)

    def kept(gain):
        "How many tensors of L x L numbers or more are kept."
        sizes = []

        def keep(x):
            sizes.append(x.untyped_storage().nbytes() / 4)
            return x

        monkeypatch.setattr(attention, "GAIN", gain)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            token_logprobs(model, rollout)
        return sum(size >= L * L for size in sizes)

    token_logprobs(model, rollout)
    assert L > 100 and kept(torch.inf) > 0 and kept(0.0) == 0
