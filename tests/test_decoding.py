"The fast sampler is the simple one: every completion listed, both forced along all."

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_rows import MODELS, SMALL, make
from test_unusual_models import QUERIES, SPOILED, WITHOUT_CACHE
from test_unusual_models import make as make_unusual
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
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
WAYS = SAMPLERS | {"fast, prompts once": decoding.sample}
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
@pytest.mark.parametrize("sampler", WAYS)
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
    forced = Forced(tokens, V, eos, rows_leave=sampler != "simple")
    monkeypatch.setattr(sampling, "draw", forced)
    monkeypatch.setattr(decoding, "draw_by_blocks", forced)
    if sampler == "fast, prompts once":
        monkeypatch.setattr(decoding, "SPARED", 0)
    rollout = WAYS[sampler](model, tokenizer, queries, G, T, temperature)

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


# A prompt kept once -----------------------------------------------------------------


@pytest.fixture
def grouped(monkeypatch):
    """Prompts are kept once however little that spares, and where a model fails the
    trial its warning is an error; each reader that was made."""
    made = []
    start = decoding._Grouped.__init__

    def noted(self, *arguments):
        made.append(self)
        start(self, *arguments)

    monkeypatch.setattr(decoding._Grouped, "__init__", noted)
    monkeypatch.setattr(decoding, "SPARED", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield made


def drawn(model, queries=PROMPTS, G=16, T=12, **options):
    g = torch.Generator().manual_seed(0)
    tokenizer = character_tokenizer()
    return decoding.sample(model, tokenizer, queries, G, T, generator=g, **options)


def with_copies(monkeypatch, *arguments, **options):
    "The same draw, with a copy of the prompt's keys and values for each completion."
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "SPARED", float("inf"))
        return drawn(*arguments, **options)


@pytest.mark.parametrize(
    "prompts, limit",
    [(PROMPTS, None), (PROMPTS[1:2] * 3, None), (PROMPTS, 7)],
    ids=["unequal prompts", "equal prompts", "parts of a group"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_kept_once_is_a_copy_each(monkeypatch, grouped, kind, prompts, limit):
    "The same random numbers, the same tokens; log-probs of a pass without a cache."
    model = make(kind)
    once = drawn(model, prompts, max_num_seqs=limit)
    assert grouped
    copies = with_copies(monkeypatch, model, prompts, max_num_seqs=limit)
    assert once.completion_ids.equal(copies.completion_ids)
    assert once.truncated.equal(copies.truncated)
    torch.testing.assert_close(once.logprobs, copies.logprobs, rtol=0, atol=1e-10)
    truth = token_logprobs(model, once)
    torch.testing.assert_close(once.logprobs, truth, rtol=0, atol=1e-6)
    lengths = once.completion_mask.sum(1)
    assert len(set(lengths.tolist())) > 4  # rows have left at different times


def test_the_other_kernel(monkeypatch, grouped):
    "Where no kernel returns the log-sum-exp, two products and a softmax do the same."
    model = make("qwen2", torch.float32)
    by_kernel = drawn(model)
    monkeypatch.setattr(decoding, "_attend", decoding._attend_by_products)
    by_products = drawn(model)
    assert by_products.completion_ids.equal(by_kernel.completion_ids)
    torch.testing.assert_close(
        by_products.logprobs, by_kernel.logprobs, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("way", ["_attend", "_attend_by_products"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_log_sum_exp(way, dtype):
    "Against a softmax that is written out; at least in float32."
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, L, 8, dtype=dtype) for L in (4, 6, 6))
    bias = torch.zeros(2, 1, 1, 6, dtype=dtype)
    bias[0, ..., :2] = -torch.inf
    out, lse = getattr(decoding, way)(q, k, v, 0.3, bias)
    scores = 0.3 * q.double() @ k.double().mT + bias.double()
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    truth = scores.softmax(-1) @ v.double()
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=tolerance)
    truth = scores.logsumexp(-1)
    torch.testing.assert_close(lse.double(), truth, rtol=0, atol=tolerance)
    assert lse.dtype == torch.promote_types(dtype, torch.float32)


def test_the_cache_holds_each_prompt_once(grouped):
    "P + G T places for a group, and prompts leave with the last row that reads them."
    B, G, T = len(PROMPTS), 2, 40
    model = make("llama", torch.float32)
    rollout = drawn(model, PROMPTS, G, T)
    truth = token_logprobs(model, rollout)
    torch.testing.assert_close(rollout.logprobs, truth, rtol=0, atol=1e-5)
    reader = grouped[-1]  # the first one was a trial
    (prompts, *_), (own, *_) = reader.prompts.layers, reader.own.layers
    P = max(len(query.prompt) for query in PROMPTS)
    assert prompts.all_keys.shape == prompts.all_values.shape == (B, 2, P, 8)
    assert own.all_keys.shape == own.all_values.shape == (B * G, 2, T, 8)

    left = sorted({*reader.groups})
    assert left == list(range(len(prompts.keys)))
    assert len(left) < B  # some group has ended before the others


@pytest.mark.parametrize("kind", WINDOWED)
def test_a_window_keeps_its_own_cache(grouped, kind):
    "Layers that forget cannot share; the others of such a model do not either."
    model = make(WINDOWED[kind], torch.float32)
    rollout = drawn(model)
    assert not grouped
    truth = token_logprobs(model, rollout)
    torch.testing.assert_close(rollout.logprobs, truth, rtol=0, atol=1e-5)


def test_attention_of_another_kind_keeps_copies(grouped):
    "Where attention is not PyTorch's it may be anything."
    model = make("llama", torch.float32)
    model.set_attn_implementation("eager")
    with pytest.warns(UserWarning, match="a group in one row"):  # of the trainer's
        drawn(model)
    assert not grouped


class OwnWords(LlamaForCausalLM):
    "A model that passes no other keywords on to its attention."

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        logits_to_keep=0,
    ):
        known = {name: x for name, x in locals().items() if name not in NOT_ITS_OWN}
        return super().forward(**known)


NOT_ITS_OWN = {"self", "__class__"}


def test_a_model_that_fails_the_trial_is_warned_of_once(grouped):
    "Its completions are right, with a copy each."
    config = LlamaConfig(**SMALL, num_key_value_heads=2)
    model = make(lambda: OwnWords(config), torch.float32)
    with pytest.warns(UserWarning, match="each completion keeps a copy") as caught:
        rollout = drawn(model)
        drawn(model)
    assert len([w for w in caught if "a copy" in str(w.message)]) == 1
    truth = token_logprobs(model, rollout)
    torch.testing.assert_close(rollout.logprobs, truth, rtol=0, atol=1e-5)


def test_a_few_bytes_are_not_worth_it(monkeypatch, grouped):
    "4 MiB of a layer must be spared, counted as they would be stored."
    model = make("llama", torch.float32)
    spared = 15 * 4 * 6 * 2 * 2 * 8 * 4  # rows, prompts, tokens; k and v, heads, width
    for bound, count in ((spared + 1, 0), (spared, 2)):  # a trial, and a batch
        monkeypatch.setattr(decoding, "SPARED", bound)
        drawn(model)
        assert len(grouped) == count


def test_attention_is_the_models_own_again(grouped):
    "Also where a sampling has been interrupted."
    model = make("llama", torch.float32)
    drawn(model)
    assert model.config._attn_implementation == "sdpa"

    def interrupt(*_):
        if len(grouped) > 2 and grouped[-1].own.get_seq_length():
            raise KeyboardInterrupt

    hook = model.lm_head.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        drawn(model)
    hook.remove()
    assert model.config._attn_implementation == "sdpa"


def test_half_precision_in_groups(monkeypatch, grouped):
    "Under autocast, and in rounded weights: as near to the truth as with copies."
    for dtype, rounded in ((torch.float32, True), (torch.bfloat16, False)):
        model = make("llama", dtype)
        exact = copy.deepcopy(model).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            rollouts = drawn(model), with_copies(monkeypatch, model)
        once, copies = (
            (r.logprobs - token_logprobs(exact, r)).abs().mean().item()
            for r in rollouts
        )
        assert 0 < once < 1.2 * copies
    assert grouped


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_places(groups):
    "Each row has a place of its own, within its group's."
    places, widest = decoding._places(groups)
    assert len(set(places)) == len(places)
    assert [place // widest for place in places] == groups
    assert widest == max(groups.count(group) for group in groups)


# The simple sampler ----------------------------------------------------------------

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
