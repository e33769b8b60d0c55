"""Reward models: what they read is what their own tokenizer writes, and their score
is the model's own for that row alone."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    FNetConfig,
    GPT2Config,
    LlamaConfig,
)

from grpo_nb import reward
from grpo_nb.policy import as_rollout
from grpo_nb.engine.data import task_from_rows
from grpo_nb.engine.judging import RewardModel, score
from grpo_nb.run.build import load_rewards
from grpo_nb.run.iterative import preference_pairs
from grpo_nb.run.training import train
from grpo_nb.run.iterative import train_reward_model
from grpo_nb.engine.data import load_task
from grpo_nb.task import Query
from helpers import EOS, PAD, VOCABULARY, character_tokenizer, ids_of, short_config

SMALL = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
}
CHAT = [
    ([{"role": "user", "content": "1+2="}], "3"),
    ([{"role": "user", "content": "34+5="}], " 39 "),
    (
        [
            {"role": "system", "content": "0"},
            {"role": "user", "content": "678+9="},
            {"role": "assistant", "content": "68"},
        ],
        "7",
    ),
]
PLAIN = [("1+2=", "3"), ("345+678=", "1023"), ("9:", "3*3"), ("1+2=", "")]
# the end of a turn is no EOS; something follows it; replies are trimmed
TEMPLATES = {
    "another end": "{% for m in messages %}({{ m['content'] }}){% endfor %}",
    "a tail": "{% for m in messages %}({{ m['content'] }}<eos>:{% endfor %}",
    "trimmed": "{% for m in messages %}({{ m['content'] | trim }})=:{% endfor %}",
    "ends in padding": "{% for m in messages %}{{ m['content'] }}<pad>{% endfor %}",
}


def classifier(config, dtype=torch.float32, seed=0):
    "With random weights that are large enough for scores to be far apart."
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(0.4 * torch.randn(p.shape, generator=generator))
    return model.to(dtype).eval()


def saved(model, tokenizer, directory):
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@torch.no_grad()
def alone(path, row):
    "The truth: one row of token ids, through the model as transformers loads it."
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    return model.eval()(torch.tensor([row])).logits.item()


def close(scores, truth):
    torch.testing.assert_close(
        torch.tensor(scores), torch.tensor(truth), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("pad", [PAD, EOS, None, 19, -1])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_conversation_is_read_as_its_template_writes_it(tmp_path, template, pad):
    """Whatever the pad token of the file: another one, EOS, none, or one that the
    embedding lacks."""
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATES[template]
    model = classifier(LlamaConfig(**SMALL | {"pad_token_id": None}))
    model.config.pad_token_id = pad
    path = saved(model, tokenizer, tmp_path)
    conversations = [
        [*CHAT[0][0], {"role": "assistant", "content": "3"}],
        [*CHAT[1][0], {"role": "assistant", "content": " 39 "}],
        [*CHAT[2][0][:2], {"role": "assistant", "content": "687"}],
    ]
    truth = [
        alone(path, tokenizer.apply_chat_template(c, return_dict=True)["input_ids"])
        for c in conversations
    ]
    judge = RewardModel.from_pretrained(path, "cpu")
    replies = [[{"role": "assistant", "content": text}] for _, text in CHAT]
    close(judge([prompt for prompt, _ in CHAT], replies), truth)
    queries = [Query(prompt) for prompt, _ in CHAT]
    close(judge.scores(queries, [text for _, text in CHAT]).tolist(), truth)
    assert judge.model.config.pad_token_id == pad  # as in its file
    assert max(truth) - min(truth) > 0.01


@pytest.mark.parametrize("eos", ["<eos>", None])
@pytest.mark.parametrize("pad", [PAD, EOS, None])
@pytest.mark.parametrize("make", [LlamaConfig, GPT2Config])
def test_a_plain_prompt_and_its_completion(tmp_path, make, pad, eos):
    """Prompt, completion and EOS in one row; in a batch each has the score that it
    has alone."""
    tokenizer = character_tokenizer(eos=eos)
    model = classifier(make(**SMALL | {"pad_token_id": pad}))
    path = saved(model, tokenizer, tmp_path)
    end = [EOS] if eos else []
    truth = [alone(path, ids_of(a + b) + end) for a, b in PLAIN]
    judge = RewardModel.from_pretrained(path, "cpu")
    assert judge.padding_side == "left"
    close(judge(*zip(*PLAIN)), truth)
    queries = [Query(prompt) for prompt, _ in PLAIN]
    close(judge.scores(queries, [b for _, b in PLAIN]).tolist(), truth)


@pytest.mark.parametrize("make", [LlamaConfig, GPT2Config, BertConfig])
def test_the_simple_one_gives_the_same_scores_and_gradients(make):
    "The figure's reward model, padded on the right, beside this one; plain and chat."
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATES["another end"]
    model = classifier(make(**SMALL)).requires_grad_(True)
    simple, robust = reward.RewardModel(model, tokenizer), RewardModel(model, tokenizer)
    for pairs in (PLAIN, CHAT[:2]):
        queries = [Query(prompt) for prompt, _ in pairs]
        answers = [answer for _, answer in pairs]
        grads = []
        for judge in (simple, robust):
            model.zero_grad()
            judge.scores(queries, answers).square().sum().backward()
            found = [p.grad for p in model.parameters() if p.grad is not None]
            grads.append(torch.cat([grad.flatten() for grad in found]))
        close(simple(*zip(*PLAIN)), robust(*zip(*PLAIN)))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    truth = model(torch.tensor([ids_of("345+678=1023") + [EOS]])).logits.item()
    close(simple(["345+678="], ["1023"]), [truth])


ENCODERS = ["bert", "roberta", "distilbert", "electra", "deberta-v2", "albert", "mpnet"]


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders(tmp_path, kind):
    """Pooled at the first column, positions from the left or from the ids: padded on
    the right."""
    small = SMALL | {"embedding_size": 16, "position_biased_input": True}
    small |= {"pad_token_id": 2 if kind in ("roberta", "mpnet") else PAD}
    small |= {"relative_attention": True} if kind == "deberta-v2" else {}
    if kind == "distilbert":
        small = SMALL | {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}
    tokenizer = character_tokenizer()
    path = saved(classifier(AutoConfig.for_model(kind, **small)), tokenizer, tmp_path)
    truth = [alone(path, ids_of(a + b) + [EOS]) for a, b in PLAIN]
    judge = RewardModel.from_pretrained(path, "cpu")
    assert judge.padding_side == "right"
    close(judge(*zip(*PLAIN)), truth)


@pytest.mark.parametrize(
    "kind", ["qwen2", "gemma", "gpt_neox", "bloom", "opt", "mistral"]
)
def test_decoders(tmp_path, kind):
    small = SMALL | {"num_key_value_heads": 2, "head_dim": 8, "word_embed_proj_dim": 16}
    if kind == "opt":
        small |= {"ffn_dim": 32}
    tokenizer = character_tokenizer()
    path = saved(classifier(AutoConfig.for_model(kind, **small)), tokenizer, tmp_path)
    truth = [alone(path, ids_of(a + b) + [EOS]) for a, b in PLAIN]
    close(RewardModel.from_pretrained(path, "cpu")(*zip(*PLAIN)), truth)


def test_a_model_that_reads_its_padding_is_refused():
    "FNet mixes all columns and knows no mask."
    model = classifier(FNetConfig(**SMALL, type_vocab_size=2))
    with pytest.raises(ValueError, match="FNetForSequenceClassification.*than alone"):
        RewardModel(model, character_tokenizer())


def test_a_file_in_bfloat16_is_computed_in_float32(tmp_path):
    "In bfloat16 scores have three digits: of 200 answers many would tie."
    tokenizer = character_tokenizer()
    path = saved(classifier(LlamaConfig(**SMALL), torch.bfloat16), tokenizer, tmp_path)
    load = AutoModelForSequenceClassification.from_pretrained
    model, truth = load(path), load(path, dtype=torch.float32)
    assert model.dtype == torch.bfloat16
    answers = [str(i) for i in range(200)]
    with torch.no_grad():
        expected = [
            truth(torch.tensor([ids_of("1+2=" + a) + [EOS]])).logits.item()
            for a in answers
        ]
    for judge in (
        RewardModel.from_pretrained(path, "cpu"),
        RewardModel(model, tokenizer),
    ):
        scores = judge(["1+2="] * 200, answers)
        close(scores, expected)
        assert judge.model.dtype == torch.float32 and len(set(scores)) > 190
    assert model.dtype == torch.bfloat16  # what was passed is as it was


def test_a_reward_model_of_a_policy_in_bfloat16(tiny):
    policy = copy.deepcopy(tiny[0]).bfloat16()
    judge = RewardModel.from_policy(policy, tiny[1])
    assert {p.dtype for p in judge.model.parameters()} == {torch.float32}


def test_the_learned_one_reads_in_the_same_way(tiny):
    """A conversation once more: what training fits is what the saved model says of
    that row alone."""
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}="
    torch.manual_seed(0)
    judge = RewardModel.from_policy(tiny[0], tokenizer)
    chat = Query([{"role": "user", "content": "12+34="}])
    pairs = [(chat, "46", "4"), (chat, "46", "47")]
    train_reward_model(judge, pairs, steps=3, batch_size=4)
    for text in ("46", "4", "47777"):
        ids = tokenizer(f"12+34={text}=", add_special_tokens=False)["input_ids"]
        truth = judge.model(torch.tensor([ids])).logits.item()
        close(judge([chat.prompt, chat.prompt], [text, "1"])[:1], [truth])


POLICY = {"num_prompts": 2, "num_generations": 2, "max_completion_length": 6}


def refused(tmp_path, words, task=None, **options):
    "Before anything is written."
    out = tmp_path / "run"
    with pytest.raises(ValueError) as caught:
        train(short_config(output_dir=str(out), **POLICY | options), task)
    for word in words:
        assert word in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize("make", [LlamaConfig, BertConfig])
@pytest.mark.parametrize("context, fits", [(12, True), (11, False)])
def test_a_context_that_is_too_short(tmp_path, make, context, fits):
    "12+34= has 6 tokens, EOS is one, a completion has 5 at most: 12."
    config = make(**SMALL | {"max_position_embeddings": context})
    path = saved(classifier(config), character_tokenizer(), tmp_path / "judge")
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(10, 60)]
    task, options = task_from_rows("sums", rows), {"max_completion_length": 5}
    if fits:
        out = str(tmp_path / "run")
        train(
            short_config(output_dir=out, reward_funcs=[path], **POLICY | options), task
        )
    else:
        words = ["judge", "7 tokens + max_completion_length 5", "context of 11"]
        refused(tmp_path, words, task, reward_funcs=[path], **options)


def test_positions_of_roberta_begin_behind_padding(tmp_path):
    "Of 14 positions with padding 2 it has 11: 0, 1 and 2 are never used."
    config = transformers.RobertaConfig(
        **SMALL | {"max_position_embeddings": 14, "pad_token_id": 2}
    )
    judge = RewardModel(classifier(config), character_tokenizer())
    assert judge.context == 11
    assert len(judge(["1+2="], ["345678"])) == 1
    with pytest.raises(
        ValueError, match="too long: 12 tokens exceed its context of 11"
    ):
        judge(["1+2="], ["3456789"])


def test_a_chat_for_a_reward_model_without_a_template(tmp_path):
    path = saved(
        classifier(LlamaConfig(**SMALL)), character_tokenizer(), tmp_path / "j"
    )
    with pytest.raises(ValueError, match="'j'.*no chat template"):
        RewardModel.from_pretrained(path, "cpu").check([Query(CHAT[0][0])], 4)


def test_what_a_template_raises_names_the_query():
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    judge = RewardModel(classifier(LlamaConfig(**SMALL)), tokenizer)
    with pytest.raises(ValueError, match="begins '1.2='.*no system role"):
        judge([CHAT[0][0]], [[{"role": "assistant", "content": "3"}]])


def test_tokens_that_the_embedding_lacks():
    judge = RewardModel(
        classifier(LlamaConfig(**SMALL | {"vocab_size": 10})), character_tokenizer()
    )
    with pytest.raises(ValueError, match="token 18 of its tokenizer.*has 10 rows"):
        judge(["1+2="], ["3"])


def test_the_run_asks_before_it_begins(tmp_path):
    """Functions passed to `train` are bound to a state; a reward model among them is
    found all the same."""
    judge = RewardModel(
        classifier(LlamaConfig(**SMALL | {"max_position_embeddings": 9})),
        character_tokenizer(),
    )
    with pytest.raises(ValueError, match="reward_model.*context of 9"):
        train(
            short_config(output_dir=str(tmp_path / "run")),
            reward_funcs=[judge],
            progress=False,
        )
    assert not (tmp_path / "run").exists()


def test_named_after_their_directories(tmp_path):
    "As in TRL; two of one name have two metrics."
    names = []
    for seed, name in enumerate(["one/judge", "other/judge", "third"]):
        model = classifier(LlamaConfig(**SMALL), seed=seed)
        names.append(saved(model, character_tokenizer(), tmp_path / name))
    judges = load_rewards(names, load_task("add"), "cpu")
    rollout = as_rollout(character_tokenizer(), [Query("1+2=")], ["3", "4"])
    metrics = score(rollout, judges)
    assert metrics == {
        f"rewards/{name}/mean": pytest.approx(sum(judge(["1+2="] * 2, ["3", "4"])) / 2)
        for name, judge in zip(["judge", "judge_2", "third"], judges)
    }


def test_a_column_called_self():
    judge = RewardModel(classifier(LlamaConfig(**SMALL)), character_tokenizer())
    rollout = as_rollout(
        character_tokenizer(), [Query("1+2=", {"self": 1, "call": 2})], ["3"]
    )
    assert score(rollout, [judge]).keys() == {"rewards/reward_model/mean"}


def test_the_judge_of_preferences_has_its_own_query(tokenizer):
    "One that takes a column out changes neither the query nor what it sees next."
    query = Query("1+2=", {"answer": ["3"]})
    rollout = as_rollout(tokenizer, [query], ["3", "4", "5"])
    pairs = preference_pairs(rollout, lambda o, q: o == q.columns["answer"].pop())
    assert pairs == [(query, "3", "4"), (query, "3", "5")]
    assert query.columns == {"answer": ["3"]}
    assert json.dumps(replace(query).columns) == '{"answer": ["3"]}'
