"The fast sampler is the simple one: every completion listed, both forced along all."

import copy

import pytest
import torch
from test_rows import MODELS, SMALL, make
from test_unusual_models import QUERIES, SPOILED, WITHOUT_CACHE
from test_unusual_models import make as make_unusual
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
)

from grpo_nb import sampling
from grpo_nb.engine import decoding
from grpo_nb.policy import token_logprobs
from grpo_nb.task import Query
from helpers import character_tokenizer

EOS = 1
SAMPLERS = {"simple": sampling.sample, "fast": decoding.sample}
PROMPTS = [Query("1+2="), Query("12+34="), Query("9"), Query("7+77=")]
WINDOWED = {
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=5)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SMALL,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
}
KINDS = [name for name in MODELS if name != "mixtral"]  # it has no float64 kernel


# Every completion ------------------------------------------------------------------


def every_completion(vocabulary, length, eos):
    "All completions of at most `length` tokens, [N, length], -1 behind their end."
    rows = [[]]
    for _ in range(length):
        longer = []
        for row in rows:
            ended = row and (row[-1] in eos or row[-1] < 0)
            following = [-1] if ended else range(vocabulary)
            longer += [[*row, token] for token in following]
        rows = longer
    return torch.tensor(rows)


class Forced:
    "In the place of a draw: hands out given tokens, and notes the distributions."

    def __init__(self, tokens, vocabulary, eos, rows_leave):
        self.tokens = tokens
        self.eos = eos
        self.rows_leave = rows_leave
        self.rows = list(range(len(tokens)))  # which completion each place holds
        self.distributions = torch.zeros(*tokens.shape, vocabulary)
        self.length = 0

    def __call__(self, logprobs, top_p, top_k, generator):
        token = self.tokens[self.rows, self.length]
        self.distributions[self.rows, self.length] = logprobs.float()
        self.length += 1
        if self.rows_leave:
            self.leave([i for i, x in enumerate(token.tolist()) if x in self.eos])
        return token.clamp(min=0)  # what an ended row draws is not looked at

    def leave(self, ended):
        "The last rows that go on take the places of those that have ended."
        left = len(self.rows) - len(ended)
        movers = [self.rows[i] for i in range(left, len(self.rows)) if i not in ended]
        for place in ended:
            if place < left:
                self.rows[place] = movers.pop(0)
        self.rows = self.rows[:left]


@pytest.mark.parametrize("eos", [[EOS], [EOS, 3]], ids=["one EOS", "two EOS"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_completion_has_its_probability(monkeypatch, sampler, kind, eos):
    "At each step the distribution of a forward pass without batch, padding or cache."
    V, T, temperature = 6, 3, 1.5
    model = make(WINDOWED.get(kind, kind), torch.float32)
    model.resize_token_embeddings(V)
    model.generation_config.eos_token_id = eos
    tokenizer = character_tokenizer()
    queries = [Query("12"), Query("0"), Query("2012")]
    completions = every_completion(V, T, eos)
    G = len(completions)
    tokens = completions.repeat(len(queries), 1)
    forced = Forced(tokens, V, eos, rows_leave=sampler == "fast")
    monkeypatch.setattr(sampling, "draw", forced)
    monkeypatch.setattr(decoding, "draw_by_blocks", forced)
    rollout = SAMPLERS[sampler](model, tokenizer, queries, G, T, temperature)

    mask = tokens >= 0
    assert rollout.completion_mask.equal(mask)
    assert rollout.completion_ids[mask].equal(tokens[mask])
    ended = torch.isin(tokens, torch.tensor(eos)).any(1)
    assert rollout.truncated.equal(~ended)
    assert not rollout.logprobs[~mask].any()
    for i in range(len(queries)):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]]
        rows = torch.cat([prompt.expand(G, -1), completions.clamp(min=0)], 1)
        with torch.no_grad():
            logits = model(rows, use_cache=False).logits[:, len(prompt) - 1 : -1]
        truth = (logits / temperature).log_softmax(-1)
        group = slice(i * G, (i + 1) * G)
        real = mask[group]
        ours = forced.distributions[group][real]
        torch.testing.assert_close(ours, truth[real], rtol=0, atol=1e-5)
        probability = rollout.logprobs[group].double().sum(1).exp()
        assert abs(probability.sum().item() - 1) < 1e-5  # one of them it must be


# The draw --------------------------------------------------------------------------


@pytest.mark.parametrize("V", [1, 2, 3, 7, 16, 20, 50])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.6}], ids=str)
def test_a_draw_by_blocks_has_the_same_distribution(monkeypatch, V, options):
    "Exactly: the probabilities handed to the random numbers, block times token."
    g = torch.Generator().manual_seed(V)
    logprobs = torch.randn(1, V, generator=g, dtype=torch.float64).log_softmax(-1)
    handed = []

    def keep(probabilities, n, generator=None):
        "In the place of torch.multinomial: each choice once."
        shares = probabilities / probabilities.sum(1, keepdim=True)
        handed.append(shares)
        return wanted[len(handed) - 1][:, None]

    monkeypatch.setattr(torch, "multinomial", keep)
    wanted = [torch.zeros(1, dtype=torch.long)]
    sampling.draw(logprobs, **options)
    simple = handed.pop()[0]
    size = int(V**0.5)
    kept = simple.nonzero().flatten()
    wanted = [kept // size, kept % size]
    token = decoding.draw_by_blocks(logprobs.expand(len(kept), V), **options)
    assert token.equal(kept)
    block, inside = handed
    places = torch.arange(len(kept))
    fast = block[places, wanted[0]] * inside[places, wanted[1]]
    torch.testing.assert_close(fast, simple[kept], rtol=1e-12, atol=0)
    assert abs(fast.sum() - 1) < 1e-12  # and nothing else can be drawn


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"top_k": 1}], ids=str)
def test_where_the_random_numbers_are_the_same(options):
    "A vocabulary of three makes blocks of one token: the same seed, the same tokens."
    g = torch.Generator().manual_seed(0)
    logprobs = torch.randn(200, 3, generator=g).log_softmax(-1)
    simple, fast = (
        f(logprobs, generator=torch.Generator().manual_seed(1), **options)
        for f in (sampling.draw, decoding.draw_by_blocks)
    )
    assert simple.equal(fast)
    assert len(set(simple.tolist())) == 3


# The samplers ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, *WINDOWED])
def test_greedy_completions_are_the_same(kind):
    "Token for token, with prompts of different lengths."
    model = make(WINDOWED.get(kind, kind), torch.float32)
    simple, fast = (
        f(model, character_tokenizer(), PROMPTS, 3, 12, 0.7, top_k=1)
        for f in SAMPLERS.values()
    )
    assert fast.completion_ids.equal(simple.completion_ids)
    assert fast.completion_mask.equal(simple.completion_mask)
    assert fast.truncated.equal(simple.truncated)
    assert fast.completions == simple.completions
    torch.testing.assert_close(fast.logprobs, simple.logprobs, rtol=0, atol=1e-5)


OPTIONS = [{}, {"temperature": 0.6}, {"temperature": 1.5, "top_p": 0.9, "top_k": 5}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_simple_sampler_and_the_trainer_agree(kind, options):
    "Log-probs within 1e-5, although the model comes in training mode."
    model = make(kind).train()
    g = torch.Generator().manual_seed(0)
    rollout = sampling.sample(
        model, character_tokenizer(), PROMPTS, 8, 10, generator=g, **options
    )
    assert not model.training
    if "top_k" not in options:  # which may cut EOS off
        assert len(set(rollout.completion_mask.sum(1).tolist())) > 2
    with torch.no_grad():
        scored = token_logprobs(model, rollout, options.get("temperature", 1.0))
    assert rollout.logprobs.dtype == torch.float64
    torch.testing.assert_close(rollout.logprobs, scored, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    "The simple sampler takes rounded weights; its log-probs are float32."
    model = make("llama", dtype)
    rollout = sampling.sample(model, character_tokenizer(), PROMPTS, 2, 4)
    assert rollout.logprobs.dtype == torch.float32
    assert rollout.logprobs[rollout.completion_mask].lt(0).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [*SPOILED, *WITHOUT_CACHE])
def test_unusual_models_are_refused(family):
    "Before anything is drawn, and with the name of the sampler that takes them."
    model = make_unusual(family)
    g = torch.Generator().manual_seed(0)
    state = g.get_state()
    with pytest.raises(ValueError, match=type(model).__name__) as error:
        sampling.sample(model, character_tokenizer(), QUERIES, 2, 3, generator=g)
    assert "grpo_nb.engine.decoding.sample" in str(error.value)
    assert g.get_state().equal(state)


def test_the_simple_sampler_reads_each_prompt_once():
    "One pass over the prompts for the whole group, then one token of each row."
    model = make("llama", torch.float32)
    passes = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, arguments, output: passes.append(tuple(arguments[0].shape))
    )
    rollout = sampling.sample(model, character_tokenizer(), PROMPTS, 5, 6)
    T = rollout.completion_ids.shape[1]
    prompts, *tokens = passes[-T:]
    assert prompts == tuple(rollout.prompt_ids.shape)
    assert tokens == [(20, 1)] * (T - 1)


def test_the_samplers_leave_the_model_as_it_is():
    "No weight moves, and no gradient is kept."
    model = make("llama", torch.float32)
    weights = copy.deepcopy(model.state_dict())
    for sampler in SAMPLERS.values():
        rollout = sampler(model, character_tokenizer(), PROMPTS, 2, 4)
        assert not rollout.logprobs.requires_grad
    assert all(p.equal(weights[name]) for name, p in model.state_dict().items())
