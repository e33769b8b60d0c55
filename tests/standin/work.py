"A little of everything on a device, with a look at where the results are."

import shutil
import tempfile
import warnings
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertConfig, BertModel, MistralConfig, MistralForCausalLM

from grpo_nb import reward
from grpo_nb.algorithm import STEPS
from grpo_nb.engine import decoding, judging, packing
from grpo_nb.evidence.statistics import probe
from grpo_nb.loading import check_causal, load_policy, resolve_device
from grpo_nb.models import Models
from grpo_nb.objective import aggregate
from grpo_nb.policy import as_rollout
from grpo_nb.run.build import build_models, load_value_model
from grpo_nb.run.options import make_config
from grpo_nb.run.training import open_policy, open_run, train
from grpo_nb.sampling import sample
from grpo_nb.task import load_task
from grpo_nb.value import ValueModel, value_loss

SMALL = {"num_prompts": 4, "eval_size": 3, "max_completion_length": 8}
GROUPS = {"num_generations": 4}


def check_device(x: Tensor, device: str):
    "Refuse a tensor, or a model's weight, that is elsewhere."
    assert x.device.type == device, f"on {x.device}, not {device}"


def check_rollout(rollout, device: str):
    "Refuse a rollout with a tensor elsewhere."
    for field in fields(rollout):
        x = getattr(rollout, field.name)
        if isinstance(x, Tensor):
            check_device(x, device)


def check_refused(device: str):
    "A device that is not there, and a model that sees later tokens."
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    encoder = BertModel(config).to(device)
    for refuse in (
        lambda: resolve_device(f"{device}:7"),
        lambda: check_causal(encoder),
    ):
        try:
            refuse()
        except ValueError:
            continue
        raise AssertionError("not refused")


def check_figure(device: str):
    "A step of each half with the simple boxes, the reward by steps."
    task = load_task("sums")
    for algorithm, step in STEPS.items():
        policy, tokenizer = load_policy("tiny", device)
        check_device(policy.lm_head.weight, device)
        value = ValueModel(policy)
        check_device(value.head.weight, device)
        config = make_config(
            algorithm=algorithm,
            device=device,
            max_completion_length=24,
            **(GROUPS if algorithm == "grpo" else {}),
        )
        learned = reward.RewardModel.from_policy(policy, tokenizer)
        check_device(learned.model.score.weight, device)
        models = Models(
            policy,
            tokenizer,
            torch.optim.SGD(policy.parameters(), 1e-3),
            [reward.process_reward(task, tokenizer), learned],
            reference=load_policy("tiny", device)[0],
            value=value if algorithm == "ppo" else None,
            value_optimizer=torch.optim.SGD(value.parameters(), 1e-3),
            generator=torch.Generator(device).manual_seed(0),
            beta=0.1,
        )
        rollout, _ = step(models, task.queries("train", 4), config)
        check_rollout(rollout, device)
        check_rollout(rollout.select([2, 0]), device)


def check_formulas(device: str):
    "Numbers of the host beside tensors of the device."
    policy, tokenizer = load_policy("tiny", device)
    queries = load_task("add").queries("train", 2)
    rollout = as_rollout(tokenizer, queries, ["46", "4", "7", "777"], device)
    check_rollout(rollout, device)
    mask = rollout.completion_mask
    x = torch.ones(mask.shape, device=device)
    check_device(aggregate(x, mask, num_sequences=4, num_tokens=8), device)
    check_device(value_loss(x, x, x, mask, num_tokens=8), device)
    check_device(packing.first_of_equal(rollout), device)
    check_device(packing.token_logprobs(policy, rollout), device)
    check_device(packing.shared_rows(rollout, 10**6)[1], device)
    scores = torch.ones(4, 2, device=device)
    check_device(judging.combine(scores, [0.5, 2.0]), device)
    probe(policy, tokenizer, load_task("add"), n=2, k=4)


def check_samplers(device: str):
    "Prompts of different lengths, and completions that end one after the other."
    policy, tokenizer = load_policy("tiny", device)
    queries = load_task("add").queries("train", 4)
    queries += load_task("add", digits=3).queries("train", 4)
    for draw in (sample, decoding.sample):
        generator = torch.Generator(device).manual_seed(0)
        inputs = (policy, tokenizer, queries, 4, 8)
        rollout = draw(*inputs, top_p=0.9, top_k=5, generator=generator)
        check_rollout(rollout, device)
        packing.token_logprobs(policy, rollout).sum().backward()
    window = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=64,
        pad_token_id=0,
    )
    model = MistralForCausalLM(window).to(device)
    check_rollout(decoding.sample(model, tokenizer, queries, 4, 4), device)


def check_saved(device: str, folder: Path):
    "What is opened is on the device that is named, whatever the run was made on."
    run = train(
        make_config(
            device="cpu",
            max_steps=1,
            save_steps=1,
            output_dir=folder,
            **SMALL,
            **GROUPS,
        ),
        progress=False,
    )
    learned = judging.RewardModel.from_policy(run.policy, run.tokenizer)
    learned.model.save_pretrained(folder / "reward")
    run.tokenizer.save_pretrained(folder / "reward")
    opened = open_run(folder, device)
    check_device(opened.policy.lm_head.weight, device)
    assert opened.config.device == device
    shutil.rmtree(folder / "model")  # as if the run had not come to its end
    check_device(open_policy(folder, 1, device)[0].lm_head.weight, device)
    config = make_config(
        device=device,
        reward_funcs=[str(folder / "reward"), "learned"],
        **SMALL,
        **GROUPS,
    )
    models = build_models(config, load_task("add"))
    assert len(models.rewards) == 2
    for judge in models.rewards:
        check_device(judge.model.score.weight, device)
    value = load_value_model(str(folder / "reward"), models.policy)
    check_device(value.head.weight, device)


def check_runs(device: str, folder: Path):
    "Steps of every kind."
    cases = [
        GROUPS | {"dynamic_sampling": 2, "digits": 1, "max_tokens_per_micro_batch": 60},
        {"algorithm": "ppo", "num_prompts": 8, "max_tokens_per_micro_batch": 60},
        GROUPS | {"task": "sums", "reward_funcs": ["process"], "loss_type": "dapo"},
        GROUPS
        | {"reward_funcs": ["learned"], "reward_model_prompts": 32}
        | {"reward_model_steps": 2},
    ]
    for i, options in enumerate(cases):
        options = {"device": device, "max_steps": 1, **SMALL} | options
        config = make_config(output_dir=str(folder / str(i)), **options)
        run = train(config, progress=False)
        check_device(run.policy.lm_head.weight, device)


def work(device: str):
    "All of it; raises where something is on another device."
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        check_refused(device)
        check_formulas(device)
        check_samplers(device)
        check_figure(device)
        check_saved(device, Path(folder, "saved"))
        check_runs(device, Path(folder))
