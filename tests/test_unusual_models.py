"""Models, tokenizers and prompts that are not as one expects: read rightly, or
refused by name before anything is written.

The truth for log-probs is one forward pass over a prompt and its completion,
unpadded, with nothing else in it."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from grpo_nb.engine import adapters, decoding
from grpo_nb.run import build
from grpo_nb.run.options import make_config
from grpo_nb.engine.packing import (
    shares_prompt,
    takes_padding,
    token_logprobs,
    values,
)
from grpo_nb.policy import as_rollout, check_tokens, encode_prompts, load_policy
from grpo_nb.engine.adapters import reference_logprobs
from grpo_nb.engine.decoding import sample
from grpo_nb.engine.data import load_task
from grpo_nb.task import Query
from grpo_nb.run.build import load_value_model
from grpo_nb.run.training import evaluate, open_run, train
from grpo_nb.value import ValueModel
from helpers import EOS, PAD, VOCABULARY, character_tokenizer, random_model

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
}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
SPOILED = {  # by padding on the left, whatever the mask says
    "rwkv": {"attention_hidden_size": 16},
    "recurrent_gemma": {
        "lru_width": 16,
        "num_hidden_layers": 3,
        "attention_window_size": 32,
        "num_key_value_heads": 2,
    },
    "xlstm": {"num_heads": 2},
    "bart": {},
    "bigbird_pegasus": {},
    "blenderbot-small": {},
    "marian": {},
    "mbart": {},
    "mvp": {},
    "pegasus": {},
    "trocr": {},
    "roberta": {"is_decoder": True},
}
WITHOUT_CACHE = {  # of keys and values alone; the first has absolute positions
    "openai-gpt": GPT,
    "falcon_mamba": {"state_size": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "jamba": {
        "num_experts": 2,
        "mamba_d_state": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "use_mamba_kernels": False,
    },
}
ORDINARY = {"llama": {}, "gpt2": GPT, "bert": {"is_decoder": True}, "bloom": {}}
QUERIES = [Query("1+2="), Query("345+678="), Query("7=")]


def make(family, scale=0.4, **changes):
    "A causal language model of this family with random weights."
    settings = SMALL | (SPOILED | WITHOUT_CACHE | ORDINARY)[family] | changes
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters() if scale else []:
            if p.dim() > 1 and p.shape[0] > 1:
                p.copy_(scale * torch.randn(p.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def alone(model, rollout, temperature=1.0):
    "Log-probs [N, T]: a forward pass for each completion, without padding."
    result = torch.zeros(rollout.completion_ids.shape)
    for i in range(len(rollout)):
        g = i // rollout.num_generations
        prompt = rollout.prompt_ids[g][rollout.prompt_mask[g]]
        completion = rollout.completion_ids[i][rollout.completion_mask[i]]
        row = torch.cat([prompt, completion])[None]
        logits = model(row, use_cache=False).logits[0, len(prompt) - 1 : -1]
        every = (logits / temperature).log_softmax(-1)
        result[i, : len(completion)] = every.gather(1, completion[:, None])[:, 0]
    return result


def drawn(model, queries=QUERIES, G=4, T=6, **how):
    "Completions of prompts of different lengths, the warnings apart."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generator = torch.Generator().manual_seed(0)
        return sample(
            model, character_tokenizer(), queries, G, T, generator=generator, **how
        )


# Padding ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scale", [0.4, None], ids=["large", "as made"])
@pytest.mark.parametrize("family", [*SPOILED, *WITHOUT_CACHE, *ORDINARY])
def test_the_ratio_is_one_before_any_update(family, scale):
    """Sampler, trainer and reference give a token the log-prob that it has in a row
    alone."""
    model = make(family, scale)
    rollout = drawn(model)
    truth = alone(model, rollout)
    assert (rollout.logprobs - truth).abs().max() < 2e-5
    with torch.no_grad():
        assert (token_logprobs(model, rollout) - truth).abs().max() < 2e-5
    reference = reference_logprobs(copy.deepcopy(model), rollout, 1.0, 24)
    assert (reference - truth).abs().max() < 2e-5


@pytest.mark.parametrize("family", SPOILED)
def test_padding_that_spoils_is_noticed_once(family):
    model = make(family)
    with pytest.warns(UserWarning, match="does not read a padded prompt"):
        assert not takes_padding(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not takes_padding(model)


@pytest.mark.parametrize("family", [*WITHOUT_CACHE, *ORDINARY])
def test_padding_that_does_no_harm(family):
    assert takes_padding(make(family))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["rwkv", "recurrent_gemma", "roberta"])
def test_a_value_does_not_depend_on_the_padding(family):
    "A completion's values beside a longer prompt are those of its row alone."
    model = make(family)
    value_model = ValueModel(model)
    torch.nn.init.normal_(value_model.head.weight)
    rollout = as_rollout(character_tokenizer(), QUERIES, ["12", "3", "45"])
    together = values(value_model, rollout)
    for i, query in enumerate(QUERIES):
        text = rollout.completions[i]
        one = values(value_model, as_rollout(character_tokenizer(), [query], [text]))
        ours = together[i, : one.shape[1]]
        torch.testing.assert_close(ours, one[0], rtol=0, atol=1e-5)
    row = torch.cat([rollout.prompt_ids[1], rollout.completion_ids[1, :1]])[None]
    with torch.no_grad():
        state = model.base_model(row, use_cache=False)[0][0, -2]
    truth = value_model.head(state)
    torch.testing.assert_close(together[1, :1], truth, rtol=0, atol=1e-5)


def test_a_gradient_through_rows_of_their_own():
    "RWKV cannot share rows: its gradient is that of a pass for each completion."
    model = make("rwkv")
    rollout = drawn(model)
    slopes = []
    for logprobs in (
        lambda: token_logprobs(model, rollout).sum(),
        lambda: alone.__wrapped__(model, rollout).sum(),
    ):
        model.zero_grad()
        logprobs().backward()
        slopes.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (slopes[0] - slopes[1]).norm() < 1e-4 * slopes[1].norm()


def test_a_small_difference_is_one():
    """A model as it is made, with weights of 0.02: a shared row is off by 3e-4, and
    refused."""
    settings = SMALL | {
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 4,
        "mamba_chunk_size": 4,
        "mamba_d_ssm": 32,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model("falcon_h1", **settings)
    with pytest.warns(UserWarning, match="does not compute a group in one row"):
        assert not shares_prompt(AutoModelForCausalLM.from_config(config), 20)


def test_nothing_is_written_on_the_model():
    model = make("llama")
    names = set(vars(model))
    drawn(model)
    assert set(vars(model)) == names


def test_rwkv_is_saved_as_it_was_loaded(tmp_path):
    """Its code halves weights in place when it is only run, every sixth layer: what
    is saved would be halved twice."""
    save(make("rwkv", num_hidden_layers=8), tmp_path / "one")
    ids = torch.tensor([[3, 4, 5, 6]])
    model, _ = load_policy(str(tmp_path / "one"), "cpu")
    logits = model(ids, use_cache=False).logits
    save(model, tmp_path / "two")
    again, _ = load_policy(str(tmp_path / "two"), "cpu")
    torch.testing.assert_close(again(ids, use_cache=False).logits, logits)
    stored = [load_file(tmp_path / x / "model.safetensors") for x in ("one", "two")]
    assert all(torch.equal(x, stored[1][name]) for name, x in stored[0].items())


# Weights ---------------------------------------------------------------------------


def save(model, path, tokenizer=True):
    model.save_pretrained(path)
    if tokenizer:
        character_tokenizer().save_pretrained(path)
    return path


def llama(path, kind=LlamaForCausalLM, **changes):
    return save(kind(LlamaConfig(**SMALL | {"num_key_value_heads": 2} | changes)), path)


def rewrite(path, name):
    "The weights of a directory, under other names."
    weights = load_file(path / "model.safetensors")
    renamed = {name(old): x for old, x in weights.items()}
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})


def configure(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def config_of(path, output, **options):
    return make_config(
        **{
            "model": str(path),
            "output_dir": str(output),
            "num_prompts": 2,
            "num_generations": 2,
            "max_steps": 1,
            "eval_size": 2,
            "max_completion_length": 4,
            "save_steps": 0,
            "device": "cpu",
        }
        | options
    )


WRONG_WEIGHTS = {
    "compiled": (lambda p: rewrite(p, "_orig_mod.{}".format), ["'_orig_mod.'", "lm_h"]),
    "in a wrapper": (
        lambda p: rewrite(p, "module.{}".format),
        ["'module.'", "wrapper"],
    ),
    "one layer more": (
        lambda p: configure(p, num_hidden_layers=3),
        ["lacks model.layers.2.", "6 more"],
    ),
    "one layer less": (
        lambda p: configure(p, num_hidden_layers=1),
        ["fewer layers", "model.layers.1."],
    ),
    "another size": (
        lambda p: configure(p, intermediate_size=48),
        ["mlp", "[16, 32]", "[16, 48]"],
    ),
    "no tokenizer": (
        lambda p: [file.unlink() for file in p.glob("token*")],
        ["no tokenizer that can be read", "tokenizer.save_pretrained", "tokenizers"],
    ),
}


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("fault", WRONG_WEIGHTS)
def test_weights_that_do_not_fit_are_refused(tmp_path, fault, tied):
    "By their names, before anything is written."
    spoil, names = WRONG_WEIGHTS[fault]
    spoil(llama(tmp_path / "model", tie_word_embeddings=tied))
    with pytest.raises(ValueError, match="model must be") as error:
        train(config_of(tmp_path / "model", tmp_path / "run"))
    assert all(name in str(error.value) for name in [*names, "model'"])
    assert not (tmp_path / "run").exists()


def test_a_classifier_is_no_policy(tmp_path):
    path = llama(tmp_path, AutoModelForSequenceClassification.from_config)
    with pytest.raises(ValueError, match="lacks lm_head.weight, and has score.weight"):
        load_policy(str(path), "cpu")


def test_a_tied_classifier_is_warned_of(tmp_path):
    "It has every weight of a policy, and one more."
    kind = AutoModelForSequenceClassification.from_config
    path = llama(tmp_path, kind, tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="left out: score.weight"):
        load_policy(str(path), "cpu")


@pytest.mark.parametrize("family", ["bert", "electra", "roformer", "xlm-roberta"])
def test_an_encoder_is_no_policy(tmp_path, family):
    "It has all weights, and sees what it is to predict."
    settings = SMALL | {"embedding_size": 16, "is_decoder": False}
    config = AutoConfig.for_model(family, **settings)
    torch.manual_seed(0)
    save(AutoModelForMaskedLM.from_config(config), tmp_path)
    with pytest.raises(ValueError, match="sees tokens that come later"):
        load_policy(str(tmp_path), "cpu")


def test_an_encoder_is_no_value_model(tmp_path):
    "Its value of a token would be made from the tokens after it."
    config = AutoConfig.for_model("bert", **SMALL, num_labels=1)
    save(AutoModelForTokenClassification.from_config(config), tmp_path)
    with pytest.raises(ValueError, match="value_model.*sees tokens that come later"):
        load_value_model(str(tmp_path), random_model(dtype=torch.float32))


def test_what_fits_is_loaded_in_silence(tmp_path):
    for name, family in (("a", "gpt2"), ("b", "bert")):
        model = make(family)
        save(model, tmp_path / name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded, _ = load_policy(str(tmp_path / name), "cpu")
        for (key, x), y in zip(
            loaded.state_dict().items(), model.state_dict().values()
        ):
            assert torch.equal(x, y), key


# Prompts ---------------------------------------------------------------------------


def adding(before="", after="", bos=None):
    "A tokenizer that puts special tokens around a text."
    tokenizer = character_tokenizer()
    if bos:
        tokenizer.add_special_tokens({"bos_token": bos})
    parts = [*before.split(), "$A", *after.split()]
    special = [x for x in parts if x != "$A"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(parts),
        special_tokens=[(x, tokenizer.convert_tokens_to_ids(x)) for x in set(special)],
    )
    return tokenizer


def prompt_ids(tokenizer, prompt):
    ids, mask = encode_prompts(tokenizer, [Query("1+1+1+1="), Query(prompt)])
    return tokenizer.convert_ids_to_tokens(ids[1][mask[1]].tolist())


@pytest.mark.parametrize("after", ["<eos>", "<pad> <eos>", "<eos> <eos>"])
@pytest.mark.parametrize("before", ["", "<unk>"])
def test_a_prompt_does_not_end_with_eos(before, after):
    "Also where the tokenizer puts it there; what stands before the text stays."
    tokenizer = adding(before, after)
    assert tokenizer("1+2=")["input_ids"][-1] == EOS
    assert prompt_ids(tokenizer, "1+2=") == [*before.split(), *"1+2="]
    rollout = as_rollout(tokenizer, [Query("1+2=")], ["3"])
    assert rollout.prompt_mask.sum() == 4 + len(before.split())
    assert rollout.completion_ids[0].tolist() == [VOCABULARY.index("3"), EOS]
    with pytest.raises(ValueError, match="query 0 is empty"):
        encode_prompts(adding("", after), [Query("")])


def test_eos_that_is_a_part_of_the_text_stays():
    "An earlier turn, written out by the user."
    for tokenizer in (character_tokenizer(), adding(after="<eos>")):
        assert prompt_ids(tokenizer, "1<eos>") == ["1", "<eos>"]
        assert prompt_ids(tokenizer, "1<eos>2") == ["1", "<eos>", "2"]


def test_a_second_bos_is_warned_of_once():
    tokenizer = adding("<bos>", bos="<bos>")
    assert prompt_ids(tokenizer, "1+2=") == ["<bos>", *"1+2="]
    assert prompt_ids(tokenizer, "") == ["<bos>"]
    with pytest.warns(UserWarning, match="begins with '<bos>'.*adds another"):
        assert prompt_ids(tokenizer, "<bos>1=") == ["<bos>", "<bos>", "1", "="]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # Python's own: once for each place
        for _ in range(3):
            prompt_ids(tokenizer, "<bos>1=")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompt_ids(adding(bos="<bos>"), "<bos>1=")  # it adds none


TURNS = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
STRIPS = TURNS.replace("m.content", "m.content.strip()")


def chatty(template):
    tokenizer = character_tokenizer()
    tokenizer.add_tokens([*"uas "])
    tokenizer.chat_template = template
    return tokenizer


def message(role, content):
    return {"role": role, "content": content}


ASK = message("user", "1+2=")
HALF = message("assistant", "1+2")


@pytest.mark.parametrize(
    ("template", "chat", "text"),
    [
        (TURNS, [ASK], "u:1+2=<eos>a:"),
        (TURNS, [ASK, HALF], "u:1+2=<eos>a:1+2"),
        (STRIPS, [ASK, HALF], "u:1+2=<eos>a:1+2"),
        (STRIPS, [ASK, message("assistant", "1+2 ")], "u:1+2=<eos>a:1+2"),
        (TURNS, [ASK, message("assistant", "1+2 ")], "u:1+2=<eos>a:1+2 "),
        (TURNS, [ASK, HALF, ASK], "u:1+2=<eos>a:1+2<eos>u:1+2=<eos>a:"),
        (TURNS, [ASK, message("assistant", "")], "u:1+2=<eos>a:"),
        (STRIPS, [HALF], "a:1+2"),
    ],
)
def test_the_assistants_last_message_goes_on(template, chat, text):
    tokenizer = chatty(template)
    ids, _ = encode_prompts(tokenizer, [Query(chat)])
    assert tokenizer.decode(ids[0], clean_up_tokenization_spaces=False) == text


def written(path, prompts):
    "A file of such prompts, as a task."
    rows = [json.dumps({"prompt": prompt, "answer": "3"}) + "\n" for prompt in prompts]
    path.write_text("".join(rows))
    return str(path)


STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}"
    "{% endif %}{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "chat", "reason"),
    [
        (STRICT, [message("system", "1+1"), ASK], "System role not supported"),
        (STRICT, [ASK, ASK], "roles must alternate"),
        ("{{ messages[0].content + 1 }}", [ASK], "concatenate"),
        ("{{ messages[7].content.x }}", [ASK], "no element 7"),
        ("{% for m in messages %}{{ m.text }}", [ASK], "endfor"),
        (TURNS.replace("m.content", "'1'"), [ASK, HALF], "continue_final_message"),
    ],
)
def test_a_chat_that_its_template_refuses(tmp_path, template, chat, reason):
    """The query, its roles and beginning, and the template's own words, before
    anything is written."""
    tokenizer = chatty(template)
    queries = [Query([ASK]), Query(chat)] if reason[0] in "Sr" else [Query(chat)]
    i = len(queries) - 1
    with pytest.raises(ValueError, match=f"query {i} does not fit.*{reason}") as error:
        encode_prompts(tokenizer, queries)
    assert "roles: " in str(error.value) and "'1+" in str(error.value)
    assert error.value.__suppress_context__  # no traceback of jinja2
    llama(tmp_path / "model", vocab_size=32)
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [[message("user", f"{n}+2=")] for n in range(30)] + [chat]
    with pytest.raises(ValueError, match=f"does not fit the chat template.*{reason}"):
        task = written(tmp_path / "rows.jsonl", rows)
        train(config_of(tmp_path / "model", tmp_path / "run", task=task))
    assert not (tmp_path / "run").exists()


# Tokens beyond the embedding -------------------------------------------------------


def larger(pad=None):
    "A tokenizer with one token more than the models here have."
    tokenizer = character_tokenizer(pad=pad or "<pad>")
    tokenizer.add_tokens(["?"])
    if pad:
        assert tokenizer.pad_token_id == len(VOCABULARY)
    return tokenizer


@pytest.mark.parametrize("family", ["llama", "rwkv", "falcon_mamba"])
@pytest.mark.filterwarnings("ignore")
def test_as_padding_such_a_token_does_no_harm(family):
    "The same completions and log-probs as with a padding token that the model has."
    model, results = make(family), []
    for tokenizer in (character_tokenizer(), larger(pad="<more>")):
        generator = torch.Generator().manual_seed(0)
        rollout = sample(model, tokenizer, QUERIES, 3, 5, generator=generator)
        with torch.no_grad():
            scored = token_logprobs(model, rollout)
        drawn_ids = rollout.completion_ids.masked_fill(~rollout.completion_mask, -1)
        results.append((drawn_ids, rollout.logprobs, scored))
    for ours, theirs in zip(*results):
        assert torch.equal(ours, theirs)


def test_in_a_text_it_is_refused(tmp_path):
    "With the token and both sizes, before anything is written."
    model, tokenizer = make("llama"), larger()
    match = r"query 1 has token 20 \('\?'\).*only 20 rows.*has 21 tokens"
    with pytest.raises(ValueError, match=match):
        sample(model, tokenizer, [Query("1="), Query("1?=")], 2, 4)
    save(model, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [f"{n}+2=" for n in range(30)] + ["1?2="]
    with pytest.raises(ValueError, match=r"has token 20 \('\?'\).*only 20 rows"):
        task = written(tmp_path / "rows.jsonl", rows)
        train(config_of(tmp_path / "model", tmp_path / "run", task=task))
    assert not (tmp_path / "run").exists()


def test_the_embedding_alone_decides():
    "A model with more rows than its tokenizer has tokens is common, and all right."
    model, mask = make("llama", vocab_size=64), torch.ones(1, 3, dtype=torch.bool)
    known = model, character_tokenizer(), [Query("1+2", source="a.jsonl, line 7")]
    check_tokens(*known, torch.tensor([[3, 4, 63]]), mask)
    mask[0, 2] = False
    check_tokens(*known, torch.tensor([[3, 4, 64]]), mask)
    mask[0, 2] = True
    with pytest.raises(ValueError, match="a.jsonl, line 7 has token 64 .*64 rows"):
        check_tokens(*known, torch.tensor([[3, 4, 64]]), mask)


# Memory ----------------------------------------------------------------------------


@pytest.fixture
def widest(monkeypatch):
    "How many rows each pass through the decoding loop has."
    seen, decode = [], decoding._decode

    def noted(model, prompts, mask, G, *rest):
        seen.append(len(prompts) * G)
        return decode(model, prompts, mask, G, *rest)

    monkeypatch.setattr(decoding, "_decode", noted)
    return seen


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 8, 9, 11])
def test_no_more_are_decoded_at_once(widest, limit):
    """Groups stay whole as long as one fits; each token has the log-prob of its row
    alone."""
    model = make("llama")
    rollout = drawn(model, max_num_seqs=limit, temperature=1.5)
    assert max(widest) <= limit and sum(widest) == len(rollout) == 12
    assert limit < 4 or all(n % 4 == 0 for n in widest)
    assert (rollout.logprobs - alone(model, rollout, 1.5)).abs().max() < 2e-5
    ended = (rollout.completion_ids == EOS).any(1)
    assert torch.equal(rollout.truncated, ~ended) and rollout.num_generations == 4


@pytest.mark.parametrize("limit", [12, 13, 10**9])
def test_a_limit_that_is_not_reached_changes_nothing(limit):
    model = make("gpt2")
    ours, theirs = drawn(model, max_num_seqs=limit), drawn(model)
    assert torch.equal(ours.logprobs, theirs.logprobs)
    assert ours.completions == theirs.completions


def test_greedy_answers_do_not_depend_on_the_limit(widest):
    model, task = make("llama"), load_task("add")
    every = [
        evaluate(model, character_tokenizer(), task, 20, 4, None, n) for n in (None, 7)
    ]
    assert every[0] == every[1] and widest[1:] == [7] * (widest[0] // 7) + [
        x for x in [widest[0] % 7] if x
    ]


@pytest.mark.parametrize("wrong", [0, -1])
def test_a_limit_of_no_rows_is_refused(wrong):
    with pytest.raises(
        ValueError, match=f"max_num_seqs must be >= 1 or None, got {wrong}"
    ):
        drawn(make("llama"), max_num_seqs=wrong)
    with pytest.raises(ValueError, match="max_num_seqs"):
        make_config(max_num_seqs=wrong)


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
]


def full(monkeypatch, error, when):
    "A model whose forward pass finds no memory, from `when(keywords)` on."
    forward = LlamaForCausalLM.forward

    def failing(self, *arguments, **keywords):
        if when(keywords):
            raise error
        return forward(self, *arguments, **keywords)

    monkeypatch.setattr(LlamaForCausalLM, "forward", failing)


@pytest.mark.parametrize("error", NO_MEMORY, ids=["GPU", "CPU"])
def test_out_of_memory_while_sampling(tmp_path, monkeypatch, error):
    "The advice is the limit that helps there: in a call, in an evaluation, in a step."
    passes = []

    def when(keywords):
        passes.append(1)
        return keywords.get("use_cache") and len(passes) > limit

    full(monkeypatch, error, when)
    model, limit = make("llama"), 3
    text = "out of memory with 12 completions decoded at once: try max_num_seqs = 6"
    with pytest.raises(MemoryError, match=text):
        drawn(model)
    passes.clear()
    with pytest.raises(MemoryError, match="with 5 .* try max_num_seqs = 2"):
        drawn(model, [Query("1=")], 8, max_num_seqs=5)
    passes.clear()
    with pytest.raises(MemoryError, match="decoded at once: try max_num_seqs = 3"):
        evaluate(model, character_tokenizer(), load_task("add"), 30, 4, max_num_seqs=7)
    passes.clear()
    limit = 60
    config = config_of("tiny", tmp_path / "run", max_steps=50)
    with pytest.raises(MemoryError, match="try max_num_seqs = ") as caught:
        train(config, progress=False)
    assert "max_tokens_per_micro_batch" not in str(caught.value)


def test_out_of_memory_while_scoring(tmp_path, monkeypatch):
    "There the other limit helps."

    def fails(*arguments, **keywords):
        raise NO_MEMORY[0]

    monkeypatch.setattr("grpo_nb.engine.micro_batch.token_logprobs", fails)
    text = "step 1 with max_tokens_per_micro_batch = 8192: try 4096"
    with pytest.raises(MemoryError, match=text) as caught:
        train(config_of("tiny", tmp_path / "run"), progress=False)
    assert "max_num_seqs" not in str(caught.value)


# Adapters --------------------------------------------------------------------------

LORA = {"use_peft": True, "lora_r": 2, "lora_alpha": 4}


@pytest.mark.parametrize(
    "names", [["embed_tokens", "lm_head"], ["lm_head", "model.embed_tokens"]]
)
def test_adapters_on_tied_layers_are_refused(tmp_path, names):
    pytest.importorskip("peft")
    path = llama(tmp_path / "model", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head.*share one weight"):
        train(config_of(path, tmp_path / "run", lora_target_modules=names, **LORA))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "names", [["embed_tokens"], ["lm_head", "q_proj"], ["embed_tokens", "lm_head"]]
)
def test_what_can_be_saved_is_opened_again(tmp_path, names, tied):
    pytest.importorskip("peft")
    if tied and len(names) == 2 and "q_proj" not in names:
        pytest.skip("refused, above")
    path = llama(tmp_path / "model", tie_word_embeddings=tied)
    options = LORA | {"lora_target_modules": names, "learning_rate": 0.1}
    run = train(config_of(path, tmp_path / "run", beta=0.5, **options), progress=False)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        logits = [m(ids).logits for m in (run.policy, open_run(run.directory).policy)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("names", [["q_proj", "w_pack"], ["proj"], ["mlp.q_proj"]])
def test_a_name_that_fits_no_layer_is_refused(tmp_path, names):
    "Also beside names that fit."
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=f"no layer {names[-1]}"):
        train(config_of("tiny", tmp_path / "run", lora_target_modules=names, **LORA))
    assert not (tmp_path / "run").exists()


def test_too_old_a_peft_is_named(tmp_path, monkeypatch):
    "What is found, what is needed, and for which transformers; no word of layers."
    pytest.importorskip("peft")
    monkeypatch.setattr(adapters.peft_integration, "MIN_PEFT_VERSION", "99.1")
    monkeypatch.setattr(build, "load_policy", lambda *_: pytest.fail("loaded"))
    match = r"use_peft = True needs PEFT >= 99.1 for transformers \d.*found \d.*pip"
    with pytest.raises(ImportError, match=match) as error:
        train(config_of("tiny", tmp_path / "run", **LORA))
    assert "lora_target_modules" not in str(error.value)
    assert not (tmp_path / "run").exists()
