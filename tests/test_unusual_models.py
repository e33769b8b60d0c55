"""Models, tokenizers and prompts that are not as one expects: read rightly, or refused by name before anything is written.

The truth for log-probs is one forward pass over a prompt and its completion, unpadded, with nothing else in it."""

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

from grpo_nb import sampling, training
from grpo_nb.algorithm import make_config
from grpo_nb.policy import (
    as_rollout,
    check_tokens,
    encode_prompts,
    load_policy,
    shares_prompt,
    takes_padding,
    token_logprobs,
)
from grpo_nb.reference import reference_logprobs
from grpo_nb.sampling import sample
from grpo_nb.task import Query, load_task
from grpo_nb.training import evaluate, load_value_model, open_run, train
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
    "Sampler, trainer and reference give a token the log-prob that it has in a row alone."
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
    together = value_model(rollout)
    for i, query in enumerate(QUERIES):
        text = rollout.completions[i]
        one = value_model(as_rollout(character_tokenizer(), [query], [text]))
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
    "A model as it is made, with weights of 0.02: a shared row is off by 3e-4, and refused."
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
    "Its code halves weights in place when it is only run, every sixth layer: what is saved would be halved twice."
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
