"""What people bring and take away: LoRA adapters as models, chats in parts, special
tokens in answers, checkpoints and merged models to use elsewhere."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_nb.engine.adapters import find_adapter, load_model
from grpo_nb.engine.data import as_task
from grpo_nb.engine.decoding import sample
from grpo_nb.loading import TINY
from grpo_nb.policy import encode_prompts, load_policy, token_logprobs
from grpo_nb.reward import process_reward, reward_arguments, text_of
from grpo_nb.run import command_line
from grpo_nb.run.build import build_models
from grpo_nb.run.checkpoint import checkpoints
from grpo_nb.run.command_line import main
from grpo_nb.run.training import export, open_policy, open_run, train
from grpo_nb.sampling import decode_completions
from grpo_nb.sampling import sample as simple_sample
from grpo_nb.task import Query, load_task
from helpers import character_tokenizer, ids_of, random_model, run, short_config

IDS = torch.tensor([[5, 6, 7, 8, 4, 9]])
ADAPTERS = {
    "a list of layers": {"target_modules": ["q_proj", "up_proj"]},
    "a regular expression": {"target_modules": r".*\.1\.mlp\.(up|down)_proj"},
    "every linear layer": {"target_modules": "all-linear"},
    "ranks of their own": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {r"model.layers.0.self_attn.v_proj": 3},
    },
    "rsLoRA": {"target_modules": ["q_proj"], "use_rslora": True},
    "DoRA": {"target_modules": ["o_proj"], "use_dora": True},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "a whole layer beside": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["norm"],
    },
    "biases": {"target_modules": ["q_proj"], "bias": "lora_only"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "The embedded policy, in a directory of its own."
    path = tmp_path_factory.mktemp("models") / "base"
    shutil.copytree(TINY, path)
    return path


def plain(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def make_adapter(base, path, seed=0, tokens=(), **options):
    "An adapter as PEFT saves it, as if it had been trained."
    torch.manual_seed(seed)
    model = plain(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if tokens:
        tokenizer.add_tokens(list(tokens), special_tokens=True)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        tokenizer.save_pretrained(path)
    options = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(model, LoraConfig(**options))
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, 0.5 if "norm" in name else 0.0, 0.05)
    model.save_pretrained(path)
    return str(path)


def settings(path, **changes):
    "Change an adapter's adapter_config.json."
    file = os.path.join(path, "adapter_config.json")
    with open(file) as f:
        saved = json.load(f)
    with open(file, "w") as f:
        json.dump(saved | changes, f)


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


# LoRA adapters as models --------------------------------------------------------------


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_merged_as_peft_merges(base, tmp_path, kind):
    "Bit for bit, and it is another model than the base."
    path = make_adapter(base, tmp_path / "adapter", **ADAPTERS[kind])
    expected = PeftModel.from_pretrained(plain(base), path).merge_and_unload()
    policy, tokenizer = load_model(path, "cpu")
    assert logits(policy).equal(logits(expected))
    assert (logits(policy) - logits(plain(base))).abs().max() > 0.01
    assert type(policy) is type(plain(base)) and not hasattr(policy, "peft_config")
    assert all(p.requires_grad for p in policy.parameters())
    assert tokenizer("12+34=")["input_ids"] == ids_in(base, "12+34=")


def ids_in(path, text):
    return AutoTokenizer.from_pretrained(path)(text)["input_ids"]


def test_tokens_that_were_added(base, tmp_path):
    """The adapter's own tokenizer is taken, and its embedding, which has a row more;
    so it is when such a model is trained, saved and opened."""
    target = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    path = make_adapter(base, tmp_path / "adapter", tokens=["<think>"], **target)
    policy, tokenizer = load_model(path, "cpu")
    rows = plain(base).get_input_embeddings().weight.shape[0]
    assert policy.get_input_embeddings().weight.shape[0] == rows + 1
    assert tokenizer("<think>")["input_ids"] == [rows]
    larger = plain(base)
    larger.resize_token_embeddings(rows + 1, mean_resizing=False)
    expected = PeftModel.from_pretrained(larger, path).merge_and_unload()
    assert logits(policy).equal(logits(expected))
    assert logits(policy).shape[-1] == rows + 1
    found = train(short_config(model=path, output_dir=str(tmp_path / "run")))
    opened = open_run(found.directory)
    assert logits(opened.policy).equal(logits(found.policy))
    assert len(opened.tokenizer) == rows + 1


def test_a_run_from_an_adapter_trains_a_plain_model(base, tmp_path, capsys):
    """A directory with a slash at its end: the line says what was done; every weight
    is trained, and what is saved is a plain model."""
    path = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    output = str(tmp_path / "run")
    flags = "--max_steps 1 --num_prompts 8 --num_generations 8 --eval_size 2 "
    flags += f"--device cpu --model {path}/ --output_dir {output}"
    main(["train", *flags.split()])
    said = capsys.readouterr().out.splitlines()[0]
    assert f"'{path}/' is a LoRA adapter on '{base}': merged into it" in said
    names = {p.name for p in (tmp_path / "run/model").iterdir()}
    assert "model.safetensors" in names and "adapter_config.json" not in names
    start, end = load_model(path, "cpu")[0], plain(tmp_path / "run/model")
    moved = (logits(start) - logits(end)).abs().max()
    assert 0 < moved < (logits(start) - logits(plain(base))).abs().max()


@pytest.mark.parametrize("algorithm, every", [("grpo", 0), ("ppo", 0), ("grpo", 2)])
def test_an_adapter_is_continued(base, tmp_path, capsys, algorithm, every):
    """The same A and B go on; the reference is what the run began with, not the base,
    also if it is renewed later; so is a value model that is a copy."""
    path = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    config = short_config(
        algorithm=algorithm,
        model=path,
        use_peft=True,
        lora_r=4,
        lora_alpha=8,
        lora_target_modules=["v_proj", "q_proj"],
        ref_model_sync_steps=every,
        output_dir=str(tmp_path / "run"),
    )
    models = build_models(config, load_task("add"))
    assert "continued, as an adapter" in capsys.readouterr().out
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    trained = {k: p for k, p in models.policy.named_parameters() if p.requires_grad}
    assert len(trained) == len(saved)
    for name, tensor in saved.items():
        name = name.removeprefix("base_model.model.").replace(".weight", "")
        assert trained[f"{name}.default.weight"].equal(tensor)
    merged, tokenizer = load_model(path, "cpu")
    queries = load_task("add").queries("train", 2)
    rollout = sample(merged, tokenizer, queries, 2, 6)
    with torch.no_grad():
        right = token_logprobs(merged, rollout)
        off = token_logprobs(plain(base), rollout)
    ours = models.reference_logprobs(rollout, config)
    assert torch.allclose(ours, right, atol=1e-5)
    assert not torch.allclose(ours, off, atol=1e-2)
    if algorithm == "ppo":
        trunk = models.value.trunk.state_dict()
        whole = merged.base_model.state_dict()
        assert all(trunk[name].equal(whole[name]) for name in whole)
    found = train(config, progress=False)
    assert abs(found.metrics["kl"][1]) < 1e-6
    opened = PeftModel.from_pretrained(plain(base), found.directory / "model")
    assert logits(opened).equal(logits(found.policy))
    assert not logits(opened).equal(logits(merged))


@pytest.mark.parametrize(
    "options",
    [{"lora_r": 2}, {"lora_alpha": 16}, {"lora_target_modules": ["q_proj", "k_proj"]}],
)
def test_an_adapter_that_does_not_fit_is_merged_below_new_ones(
    base, tmp_path, capsys, options
):
    """What is saved stands on the first adapter: it opens as it was, and leaves as a
    plain model."""
    path = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    lora = {"lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj"]}
    found = train(
        short_config(
            model=path,
            use_peft=True,
            output_dir=str(tmp_path / "run"),
            learning_rate=1e-2,
            **lora | options,
        ),
        progress=False,
    )
    assert "merged into it" in capsys.readouterr().out
    start = load_model(path, "cpu")[0]
    assert not torch.allclose(logits(start), logits(found.policy), atol=1e-3)
    assert logits(open_run(found.directory).policy).equal(logits(found.policy))
    out = export(found.directory, tmp_path / "out")
    assert torch.allclose(logits(plain(out)), logits(found.policy), atol=1e-5)


def test_the_base_is_found(base, tmp_path, monkeypatch):
    "By a path from where the run starts, beside the adapter, from home, or by a name."
    path = make_adapter(base, tmp_path / "there/adapter", target_modules=["q_proj"])
    right = logits(load_model(path, "cpu")[0])
    shutil.copytree(base, tmp_path / "there/model")
    shutil.copytree(base, tmp_path / "here/base")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "there"))
    for named in ("base", "./base/", "../model", "~/model", "tiny", str(base)):
        settings(path, base_model_name_or_path=named)
        for name in (path, path + "/", "../there/adapter", "~/adapter"):
            assert logits(load_model(name, "cpu")[0]).equal(right), (named, name)
    monkeypatch.chdir(tmp_path / "there/adapter")
    assert logits(load_model(".", "cpu")[0]).equal(right)


def no_weights(path):
    os.remove(f"{path}/adapter_model.safetensors")
    with open(f"{path}/adapter_model.bin", "wb") as f:
        f.write(b"a pickle")


def without_a_tensor(path):
    file = f"{path}/adapter_model.safetensors"
    tensors = load_file(file)
    tensors.popitem()
    save_file(tensors, file, {"format": "pt"})


def of_a_deeper_model(path):
    file = f"{path}/adapter_model.safetensors"
    tensors = load_file(file)
    deeper = {k.replace("layers.1", "layers.7"): x.clone() for k, x in tensors.items()}
    save_file(tensors | deeper, file, {"format": "pt"})


def of_a_wider_model(path):
    file = f"{path}/adapter_model.safetensors"
    tensors = {k: x.repeat(1, 2) for k, x in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


def damaged(path):
    with open(f"{path}/adapter_config.json", "w") as f:
        f.write("[1]")


@pytest.mark.parametrize(
    "damage, says",
    [
        (dict(base_model_name_or_path="/gone/llama"), "its base model '/gone/llama'"),
        (dict(base_model_name_or_path="some/model"), "its base model 'some/model'"),
        (dict(base_model_name_or_path=None), "does not name its base model"),
        (dict(base_model_name_or_path="."), "does not name|on top of itself"),
        (dict(peft_type="IA3"), "peft_type = 'IA3'"),
        (dict(task_type="SEQ_CLS"), "task_type = 'SEQ_CLS'"),
        (dict(megatron_config={"a": 1}), "megatron_config"),
        (dict(target_modules=["nothing"]), "does not fit its base"),
        (no_weights, "without adapter_model.safetensors"),
        (without_a_tensor, "does not fit its base .*missing adapter keys"),
        (of_a_deeper_model, "does not fit its base .*no place for .*layers.7"),
        (of_a_wider_model, "does not fit its base .*size"),
        (damaged, "adapter_config.json is damaged"),
    ],
)
def test_an_adapter_that_cannot_be_used(base, tmp_path, monkeypatch, damage, says):
    "It is named, and what is missing; nothing is written."
    path = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    damage(path) if callable(damage) else settings(path, **damage)
    monkeypatch.chdir(path)
    for use_peft in (False, True):
        config = short_config(
            model=path, output_dir=str(tmp_path / "no"), use_peft=use_peft
        )
        with pytest.raises(ValueError, match=f"adapter.*({says})"):
            train(config, progress=False)
    assert not (tmp_path / "no").exists()
    assert os.listdir(path).count("model.safetensors") == 0


def test_a_model_is_no_adapter(base):
    for name in ("tiny", "smollm2", str(base), "no/such/place", "/no/such/place", ""):
        assert find_adapter(name) is None


# Checkpoints and merged models --------------------------------------------------------

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-2}
SHORT = {
    "save_steps": 1,
    "save_total_limit": 0,
    "learning_rate": 1e-3,
    "num_prompts": 8,
    "num_generations": 8,
}


@pytest.mark.parametrize("options", [{}, LORA], ids=["weights", "LoRA"])
def test_any_checkpoint_opens_as_a_model(tmp_path, capsys, monkeypatch, options):
    """Each is the model that a run of so many steps ends with; from a finished run
    and from one that was interrupted; also as an export, and in a chat."""
    steps = SHORT | options
    long = run(tmp_path / "long", max_steps=3, **steps)
    ended = [run(tmp_path / f"run{n}", max_steps=n, **steps) for n in (1, 2)]
    assert [n for n, _ in checkpoints(long.directory)] == [1, 2, 3]
    stopped = tmp_path / "stopped"
    shutil.copytree(long.directory, stopped)
    shutil.rmtree(stopped / "model")
    for directory in (long.directory, stopped):
        for n, other in enumerate(ended, 1):
            policy, tokenizer = open_policy(directory, n)
            assert logits(policy).equal(logits(other.policy))
            assert not logits(policy).equal(logits(long.policy))
            opened = open_run(directory, step=n)
            assert logits(opened.policy).equal(logits(other.policy))
            assert opened.metrics.index.tolist() == [*range(1, n + 1)]
            assert len(tokenizer) == len(long.tokenizer)
    target = tmp_path / "out"
    main(["export", str(stopped), "--merge", str(target), "--step", "2"])
    assert str(target) in capsys.readouterr().out
    assert torch.allclose(logits(plain(target)), logits(ended[1].policy), atol=1e-5)
    talks = []
    monkeypatch.setattr(command_line, "chat", talks.append)
    main(["chat", f"{stopped}/", "--step", "1"])
    assert logits(talks[0].policy).equal(logits(ended[0].policy))


def test_a_checkpoint_that_is_not_there(tmp_path):
    found = run(tmp_path / "run", max_steps=3, save_steps=1)
    assert [n for n, _ in checkpoints(found.directory)] == [2, 3]
    for call in (open_run, open_policy):
        with pytest.raises(ValueError, match="no checkpoint of step 1; allowed: 2, 3"):
            call(found.directory, step=1)
    with pytest.raises(SystemExit, match="no checkpoint of step 7"):
        main(["chat", str(found.directory), "--step", "7"])
    with pytest.raises(SystemExit, match="no checkpoint of step 0"):
        main(["export", str(found.directory), "--merge", "x", "--step", "0"])
    state = found.directory / "checkpoint-2/state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="checkpoint-2 is damaged"):
        open_run(found.directory, step=2)
    shutil.rmtree(found.directory / "model")
    with pytest.raises(ValueError, match="no model; steps with a checkpoint: 2, 3"):
        open_run(found.directory)


def test_a_learned_reward_of_a_checkpoint(tmp_path):
    "It judges as it did then: as in a run that ended there."
    options = {
        "reward_funcs": ["learned"],
        "reward_model_prompts": 6,
        "reward_model_steps": 2,
        "ref_model_sync_steps": 1,
    }
    long = run(tmp_path / "long", max_steps=2, **SHORT | options)
    short = run(tmp_path / "short", max_steps=1, **SHORT | options)
    asked = {"prompts": ["12+34=", "5+6="], "completions": ["46", "12"]}
    right = short.rewards[0](**asked)
    assert right != long.rewards[0](**asked)
    assert open_run(long.directory, step=1).rewards[0](**asked) == right
    shutil.rmtree(long.directory / "model")
    shutil.rmtree(long.directory / "reward_model")
    assert open_run(long.directory, step=1).rewards[0](**asked) == right


@pytest.mark.parametrize("limit, kept", [(1, [5]), (2, [4, 5]), (3, [3, 4, 5])])
def test_so_many_checkpoints_are_kept(tmp_path, limit, kept):
    "Also when a run goes on with another limit: it changes no number."
    options = {"save_steps": 1, "num_prompts": 2}
    found = run(tmp_path / "run", max_steps=4, save_total_limit=0, **options)
    assert [n for n, _ in checkpoints(found.directory)] == [1, 2, 3, 4]
    shutil.rmtree(found.directory / "model")
    more = {"max_steps": 5, "save_total_limit": limit, "resume": True}
    found = run(tmp_path / "run", **options | more)
    assert [n for n, _ in checkpoints(found.directory)] == kept


@pytest.mark.parametrize("options", [{}, LORA], ids=["weights", "LoRA"])
def test_an_export_is_a_plain_model(tmp_path, capsys, monkeypatch, options):
    "transformers alone opens it, with its tokenizer; a directory in use is refused."
    found = run(tmp_path / "run", max_steps=1, **options)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for target in ("new/model/", "empty", "~/other"):
        monkeypatch.setenv("HOME", str(tmp_path))
        main(["export", str(found.directory), "--merge", target])
        place = tmp_path / target.replace("~/", "")
        names = {path.name for path in place.iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
        assert not any("adapter" in name for name in names)
        assert torch.allclose(logits(plain(place)), logits(found.policy), atol=1e-5)
        assert ids_in(place, "1+2=") == found.tokenizer("1+2=")["input_ids"]
        assert load_policy(str(place), "cpu")
    if not options:
        assert logits(plain(place)).equal(logits(found.policy))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep me")
    for taken in ("mine", "mine/notes.txt", str(found.directory)):
        with pytest.raises(SystemExit, match="is taken"):
            main(["export", str(found.directory), "--merge", taken])
    assert (tmp_path / "mine/notes.txt").read_text() == "keep me"
    with pytest.raises(SystemExit, match="not a finished run"):
        main(["export", "mine", "--merge", "free"])
    assert not (tmp_path / "free").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


# Chats --------------------------------------------------------------------------------

PARTS = [{"type": "text", "text": "1+"}, {"type": "text", "text": "2="}]


def chat_tokenizer(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


@pytest.mark.parametrize(
    "content",
    [
        PARTS,
        tuple(PARTS),
        [{"type": "text", "text": "1+2=", "image": None}],
        [{"text": "1+2="}],
        ["1+", "2="],
        np.array(PARTS, dtype=object),
    ],
)
def test_a_content_in_parts_is_its_text(base, content):
    "In prompts, in rewards and in tables, alone and among texts."
    one = [{"role": "system", "content": ""}, {"role": "user", "content": content}]
    other = [{"role": "system", "content": ""}, {"role": "user", "content": "1+2="}]
    query, same = Query(one, {"answer": "3"}), Query(other, {"answer": "3"})
    assert query == same and query.text == "1+2=" and query.prompt == other
    assert query.is_heldout == Query("1+2=").is_heldout
    tokenizer = chat_tokenizer(base)
    assert encode_prompts(tokenizer, [query])[0].equal(
        encode_prompts(tokenizer, [Query("1+2=")])[0]
    )
    task = as_task([{"prompt": one, "answer": "3"}] * 5)
    assert task.query(0).prompt == other
    rollout = simple_sample(plain(base), tokenizer, [query], 2, 4)
    assert reward_arguments(rollout)["prompts"] == [other, other]
    assert one[1]["content"] is content  # what was passed stays as it was


def test_a_completion_in_parts_is_its_text():
    assert text_of([{"role": "assistant", "content": PARTS}]) == "1+2="


def test_parts_that_are_no_text():
    "They are refused by the name of their type, in queries and in rows."
    for part, named in [
        ({"type": "image"}, "'image'"),
        ({"type": "image_url", "image_url": {"url": "x"}}, "'image_url'"),
        ({"type": "input_audio", "text": "x"}, "'input_audio'"),
        ({"type": "text", "text": None}, "'text'"),
        (7, "'int'"),
    ]:
        chat = [{"role": "user", "content": [*PARTS, part]}]
        with pytest.raises(ValueError, match=f"part of type {named}; allowed.*'text'"):
            Query(chat)
        with pytest.raises(ValueError, match=f"row 2.*part of type {named}"):
            as_task([{"prompt": "1+1="}, {"prompt": chat}])


def test_an_empty_system_message(base):
    "It may be empty, a question may not."
    system = {"role": "system", "content": ""}
    for empty in ("", [], [{"type": "text", "text": ""}]):
        rows = [{"prompt": [system | {"content": empty}, {"role": "user", **USER}]}]
        query = as_task(rows * 5).query(0)
        assert query.prompt == [system, {"role": "user", "content": "1+2="}]
        ids, _ = encode_prompts(chat_tokenizer(base), [query])
        assert ids[0].tolist() == ids_in(base, "1+2=")
        for chat in (
            [system, {"role": "user", "content": empty}],
            [system],
            [{"role": "user", "content": empty}],
        ):
            with pytest.raises(ValueError, match="row 1 .*role, content"):
                as_task([{"prompt": chat}])


USER = {"content": "1+2="}

# Special tokens in answers ------------------------------------------------------------


def thinking(pad="<pad>"):
    "A tokenizer and a model with <think> and </think> as special tokens."
    tokenizer = character_tokenizer(pad=pad)
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    return tokenizer, random_model(vocabulary=len(tokenizer), dtype=torch.float32)


def test_special_tokens_stay_in_the_text_if_asked():
    "All but those that end it; as ids they were there all the time."
    tokenizer, _ = thinking()
    think, close = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    rows = [
        [think, *ids_of("12"), close, *ids_of("3"), eos, pad],
        [*ids_of("12"), close, close, eos, pad, pad],
        [*ids_of("1"), eos, *ids_of("2"), think, think, think],
        [eos, pad, pad, pad, pad, pad, pad],
    ]
    rows = [(row + [pad])[:7] for row in rows]
    ids = torch.tensor(rows)
    mask = torch.ones_like(ids, dtype=torch.bool)
    kept = decode_completions(tokenizer, ids, mask, skip_special_tokens=False)
    assert kept == [
        "<think>12</think>3",
        "12</think></think>",
        "1<eos>2<think><think><think>",
        "",
    ]
    assert decode_completions(tokenizer, ids, mask) == ["123", "12", "12", ""]
    ended = decode_completions(tokenizer, ids, mask, False, [close])
    assert ended == ["<think>12</think>3", "12", "1<eos>2<think><think><think>", ""]


@pytest.mark.parametrize("draw", [simple_sample, sample])
def test_samplers_keep_special_tokens(draw):
    tokenizer, model = thinking()
    seeded = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    queries = [Query("1+2="), Query("3=")]
    one = draw(model, tokenizer, queries, 8, 12, generator=seeded())
    other = draw(
        model, tokenizer, queries, 8, 12, generator=seeded(), skip_special_tokens=False
    )
    assert other.completion_ids.equal(one.completion_ids)
    assert not any("think>" in text for text in one.completions)
    assert any("<think>" in text for text in other.completions)
    for text, row, mask in zip(
        other.completions, other.completion_ids, other.completion_mask
    ):
        assert not text.endswith(("<eos>", "<pad>"))
        whole = tokenizer.decode(row[mask])
        assert whole.startswith(text)
        assert (
            set(whole[len(text) :].replace("<eos>", "").replace("<pad>", "")) == set()
        )


def test_rewards_see_special_tokens(tmp_path):
    """The step's and the evaluation's, the table, and a person who asks; without the
    option nobody does, and the tokens are the same."""
    tokenizer, model = thinking()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    def trained(name, **options):
        seen = []

        def judge(prompts, completions, **columns):
            seen.extend(completions)
            return [float("<think>" in text) for text in completions]

        task = as_task([{"prompt": f"{a}+{b}="} for a in range(5) for b in range(5)])
        config = short_config(
            model=str(tmp_path / "model"),
            output_dir=str(tmp_path / name),
            max_completion_length=12,
            **options,
        )
        found = train(config, task, [judge], progress=False)
        return found, seen

    found, seen = trained("kept", skip_special_tokens=False)
    table = found.completions
    assert any("<think>" in text for text in table["completion"])
    assert not any(text.endswith(("<eos>", "<pad>")) for text in seen)
    assert len(seen) == len(table) + 2 * 5  # evaluated before and after
    assert set(table["completion"]) <= set(seen)
    answers = found.answers("1+2=", 64, torch.Generator().manual_seed(0))
    assert any("<think>" in text for text in answers["answer"])
    plain_one, others = trained("skipped")
    assert not any("think>" in text for text in others)
    assert plain_one.completions["tokens"].equals(table["tokens"])


def test_steps_of_a_text_with_special_tokens():
    "A step that ends behind <think> ends at its token, in either text."
    tokenizer, _ = thinking()
    think, close = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    ids = [think, *ids_of("12"), close, *ids_of("3"), tokenizer.eos_token_id]
    for text, end, token in [
        ("<think>12</think>3", len("<think>12</think>"), 3),
        ("<think>12</think>3", len("<think>"), 0),
        ("123", 1, 1),
        ("123", 2, 2),
    ]:
        task = load_task("add")
        object.__setattr__(task, "steps", lambda text, query: [(end, 1.0)])
        judge = process_reward(task, tokenizer)
        asked = {"prompts": ["1+2="], "completions": [text], "completion_ids": [ids]}
        assert judge(**asked) == [[(token, 1.0)]]
