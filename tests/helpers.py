"""Small models and rollouts to check the library against: random weights, float64,
nothing loaded from disk."""

import ast
import itertools
import json
import multiprocessing
import math
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from grpo_nb.run.options import make_config
from grpo_nb.engine.packing import token_logprobs
from grpo_nb.policy import encode_prompts
from grpo_nb.rollout import Rollout
from grpo_nb.task import Query
from grpo_nb.run.checkpoint import checkpoints
from grpo_nb.run.training import train

ROOT = Path(__file__).resolve().parent.parent
CHARACTERS = "0123456789+-*()=:"
VOCABULARY = ["<pad>", "<eos>", "<unk>", *CHARACTERS]
PAD, EOS = 0, 1


def character_tokenizer(pad="<pad>", eos="<eos>"):
    "One token a character; `pad` may be None, or the same as `eos`."
    core = Tokenizer(
        models.WordLevel(
            {token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"
        )
    )
    core.pre_tokenizer, core.decoder = (
        pre_tokenizers.Split(Regex("."), "isolated"),
        decoders.Fuse(),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, eos_token=eos, unk_token="<unk>"
    )


def ids_of(text):
    return [VOCABULARY.index(character) for character in text]


def random_model(
    kind="llama",
    dropout=0.1,
    dtype=torch.float64,
    vocabulary=len(VOCABULARY),
    seed=0,
    context=64,
):
    """A Llama or a GPT-2 with random weights, large enough that its distributions
    are far from uniform."""
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=context,
            attention_dropout=dropout,
            pad_token_id=PAD,
            eos_token_id=EOS,
            bos_token_id=None,
        )
        model = LlamaForCausalLM(config)
    else:
        config = GPT2Config(
            vocab_size=vocabulary,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=context,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            pad_token_id=PAD,
            eos_token_id=EOS,
            bos_token_id=None,
        )
        model = GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def with_logits(model, table):
    """The model, made to answer with `table[last token]` ([V, V]) at every position:
    a Markov chain."""

    def replaced(module, arguments, keywords, output):
        ids = arguments[0] if arguments else keywords["input_ids"]
        output.logits = table.to(output.logits)[ids][:, -output.logits.shape[1] :]
        return output

    model.register_forward_hook(replaced, with_kwargs=True)
    return model


def random_rollout(
    model,
    tokenizer,
    num_generations=3,
    T=6,
    prompts=("1+2=", "34+5=", "678+9="),
    seed=0,
    off_policy=0.3,
):
    """Every field filled, groups and rows of different lengths.

    `logprobs` are those of `model`, moved by up to `off_policy`, so that rho is not
    1 and the bounds are reached."""
    generator, dtype = torch.Generator().manual_seed(seed), model.dtype
    queries = [Query(prompt, {"answer": "3"}, key=prompt) for prompt in prompts]
    prompt_ids, prompt_mask = encode_prompts(tokenizer, queries)
    N = len(prompts) * num_generations
    lengths = torch.randint(1, T + 1, (N,), generator=generator)
    lengths[0] = T
    mask = torch.arange(T) < lengths[:, None]
    ids = torch.randint(3, len(VOCABULARY), (N, T), generator=generator).masked_fill(
        ~mask, PAD
    )
    rollout = Rollout(
        queries,
        prompt_ids,
        prompt_mask,
        ids,
        mask,
        ["?"] * N,
        torch.zeros(N, dtype=torch.bool),
        num_generations,
    )

    def noise(scale):
        return scale * (2 * torch.rand(N, T, generator=generator).to(dtype) - 1) * mask

    with torch.no_grad():
        logprobs = token_logprobs(model, rollout)
    return replace(
        rollout,
        logprobs=logprobs + noise(off_policy),
        ref_logprobs=logprobs + noise(1.0),
        rewards=torch.rand(N, generator=generator).to(dtype),
        scored=torch.ones(N, dtype=torch.bool),
        values=noise(1.0),
        advantages=torch.randn(N, generator=generator).to(dtype),
        returns=noise(1.0),
    )


def standard_deviation(numbers):
    "With ddof 1, in plain Python; 0 of fewer than two."
    if len(numbers) < 2:
        return 0.0
    mean = math.fsum(numbers) / len(numbers)
    squares = math.fsum((x - mean) ** 2 for x in numbers)
    return math.sqrt(squares / (len(numbers) - 1))


def advantages_by_definition(groups, scale="group", baseline="mean", eps=1e-4):
    """DeepSeekMath, section 4.1.2, in plain Python: a list for each group of rewards.

    NaN is not scored; a group without two different rewards gets 0."""
    scored = [[r for r in group if not math.isnan(r)] for group in groups]
    all_scored = list(itertools.chain.from_iterable(scored))
    distances = []
    for rewards in scored:
        distances += [r - math.fsum(rewards) / len(rewards) for r in rewards]
    results = []
    for group, rewards in zip(groups, scored):
        divisor = {
            "group": lambda: standard_deviation(rewards) + eps,
            "batch": lambda: standard_deviation(all_scored) + eps,
            "batch_centred": lambda: standard_deviation(distances) + eps,
            "none": lambda: 1.0,
        }[scale]
        result = []
        for r in group:
            if math.isnan(r) or len(set(rewards)) < 2:
                result.append(0.0)
            elif baseline == "mean":
                result.append((r - math.fsum(rewards) / len(rewards)) / divisor())
            else:
                others = (math.fsum(rewards) - r) / (len(rewards) - 1)
                result.append((r - others) / divisor())
        results.append(result)
    return results


def process_advantages_by_definition(steps, num_generations, T, **options):
    """DeepSeekMath, section 4.1.3, in plain Python: a list of T for each completion.

    `steps`: for each completion a list of (end, reward); those that end at one token
    are one step."""
    at_token = []
    for completion in steps:
        rewards = {}
        for end, reward in completion:
            rewards[end] = rewards.get(end, 0.0) + reward
        at_token.append(rewards)
    groups = [
        at_token[i : i + num_generations] for i in range(0, len(steps), num_generations)
    ]
    pools = [[r for rewards in group for r in rewards.values()] for group in groups]
    results = []
    for group, scores in zip(groups, advantages_by_definition(pools, **options)):
        score = iter(scores)
        for rewards in group:
            at = {end: next(score) for end in rewards}
            results.append(
                [math.fsum(at[end] for end in at if end >= t) for t in range(T)]
            )
    return results


def dense_steps(steps, T, dtype=torch.float64):
    "Steps, a list of (end, reward) a completion, as a rollout holds them: [N, T]."
    result = torch.full((len(steps), T), torch.nan, dtype=dtype)
    for row, completion in zip(result, steps):
        for end, reward in completion:
            row[end] = reward if row[end].isnan() else row[end] + reward
    return result


def padded(rollout, left=3, right=4, junk=7.0):
    """The same rollout with more padding: columns of junk on the left of the prompts
    and on the right of the completions, of each field another, so that none cancels."""
    of_each_field = itertools.count(junk)

    def wider(x, n, side):
        if x.dtype == torch.bool:
            fill = torch.zeros(len(x), n, dtype=x.dtype)
        else:
            fill = torch.full((len(x), n), next(of_each_field)).to(x.dtype)
        return torch.cat([fill, x] if side == "left" else [x, fill], 1)

    changed = {
        name: wider(getattr(rollout, name), left, "left")
        for name in ("prompt_ids", "prompt_mask")
    }
    for name in (
        "completion_ids",
        "completion_mask",
        "logprobs",
        "ref_logprobs",
        "values",
        "advantages",
        "returns",
    ):
        x = getattr(rollout, name)
        if x is not None and x.dim() == 2:
            changed[name] = wider(x, right, "right")
    return replace(rollout, **changed)


def gradient(model):
    "All gradients of a model as one vector."
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
            for p in model.parameters()
        ]
    )


def short_config(**options):
    "A run of seconds on the embedded model."
    small = {
        "num_prompts": 4,
        "max_steps": 1,
        "eval_size": 5,
        "max_completion_length": 8,
        "device": "cpu",
    }
    if options.get("algorithm", "grpo") == "grpo" and "recipe" not in options:
        small["num_generations"] = 4
    return make_config(**small | options)


def tagged(cells):
    "The places of the cells with the tag `parameters`, which papermill looks for."
    tags = [cell.metadata.get("tags", []) for cell in cells]
    return [i for i, names in enumerate(tags) if "parameters" in names]


def read_metrics(directory):
    "The lines of metrics.jsonl; a NaN or an infinity is not JSON, and refused."

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return [
        json.loads(line, parse_constant=refuse)
        for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()
    ]


def reproducible(metrics):
    "What must not differ between two runs with the same seed."
    return {
        name: x
        for name, x in metrics.items()
        if not any(word in name for word in ("time", "seconds", "memory"))
    }


def run(directory, functions=None, **options):
    "Train in this directory: see short_config."
    return train(
        short_config(output_dir=str(directory), **options),
        reward_funcs=functions,
        progress=False,
    )


def same_run(a, b):
    """Bit for bit: metrics (no line twice, none missing), completions, model, and
    the last checkpoint (optimisers, sampler, schedule, beta)."""
    assert [reproducible(line) for line in read_metrics(a)] == [
        reproducible(line) for line in read_metrics(b)
    ]
    last = checkpoints(b)[-1][1].name
    for name in (
        "completions.parquet",
        "model/model.safetensors",
        f"{last}/state.safetensors",
        f"{last}/trainer.json",
    ):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["pytest", "accelerate.tracking", "grpo_nb.run.training"]
)


def start_process(function, *arguments, cwd=None, log=os.devnull, **environment):
    """Call a function of a module in a process of its own, of one thread.

    Forked from a process that has imported the library and done nothing else, so
    that it starts at once; it can be killed like any other. What it prints is in the
    file `log`."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    plain = os.environ.copy()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    try:
        process = PROCESSES.Process(
            target=_in_a_process, args=(function, arguments, cwd, log, environment)
        )
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(plain)
    return process


def _in_a_process(function, arguments, cwd, log, environment):
    torch.set_num_threads(1)  # with two, the last bits are others
    os.environ.update(environment)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    if cwd is not None:
        os.chdir(cwd)
    function(*arguments)


def python(*arguments, cwd, stdin="", path=None, timeout=120):
    """Run this Python in another process; standard output and error are captured as
    text."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        input=stdin,
        env=environment,
        timeout=timeout,
        capture_output=True,
        text=True,
    )


def parse(source):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def imports(source, package="grpo_nb"):
    "Full names of what a module in `package` imports, also inside of its functions."
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level]
            start = ".".join(base) if node.level else ""
            if node.module:
                yield ".".join(filter(None, [start, node.module]))
            else:
                yield from (f"{start}.{alias.name}" for alias in node.names)
