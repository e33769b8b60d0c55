"""A step of GRPO here and in TRL, side by side: seconds, tokens, memory, on one
machine in one run.

make bench                                  # every setting that this machine can run
make bench ARGS="--settings a,b --pairs 3"

Both sides get the same weights, prompts, reward function, number and length of
completions, KL price, optimiser and dtype; TRL generates with transformers, its
default. Steps alternate in one process (a step of TRL, then one of ours, from a
callback of its trainer), so that a machine that slows down slows both. What is
reported are medians over pairs after a warm-up. TRL's gradient checkpointing, on by
default, is off where time is compared: it computes the forward pass twice, and ours
does not unless it is asked to; memory is reported without it and with it, for both.
Results go into benchmarks/results/, one file a machine; a setting that is measured
again replaces only itself."""

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(
    0, str(ROOT)
)  # the library beside this file, wherever the command is run

import torch
import transformers
from tqdm.auto import tqdm

from grpo_nb.engine.packing import first_of_equal
from grpo_nb.engine.precision import precision
from grpo_nb.loading import TINY, cache_directory, resolve_device
from grpo_nb.policy import load_policy
from grpo_nb.task import Query, load_task

# grpo_nb.algorithm, grpo_nb.run, trl and pandas are imported where they are used: what
# one side loads is no memory of the other

COMMON = {
    "beta": 0.01,
    "learning_rate": 1e-5,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "loss_type": "grpo",
    "scale_rewards": "group",
    "num_iterations": 1,
    "epsilon": 0.2,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "seed": 0,
}
PHASES = ("sampling", "scoring", "update")
NO_EOS = "EOS is never drawn, so both sides sample the full length"


@dataclass(frozen=True)
class Setting:
    model: str  # tiny, tiny_1024, tiny_random, smollm2, qwen or qwen_small
    what: str
    num_prompts: int
    num_generations: int
    prompt_length: int  # tokens; of smollm2 about
    max_completion_length: int
    dtype: str = "float32"
    # in which TRL cuts the update; ours cuts by max_tokens_per_micro_batch, at its
    # default
    passes: int = 1
    accelerator: bool = False  # only there

    @property
    def options(self):
        return COMMON | {
            "num_generations": self.num_generations,
            "max_completion_length": self.max_completion_length,
        }


SMOLLM2 = Setting(
    "smollm2",
    f"SmolLM2-135M, 4 chats of about 96 tokens x 8 completions of 48 tokens; {NO_EOS}",
    4,
    8,
    96,
    48,
)
SETTINGS = {
    "a": Setting(
        "tiny",
        "the embedded model, 16 sums of 2 digits x 16 completions of at most 8 "
        "tokens, many of them equal (here these are computed once)",
        16,
        16,
        6,
        8,
    ),
    "b": Setting(
        "tiny_1024",
        "the embedded model with a longer context, 4 prompts of 128 tokens x 16 "
        f"completions of 32 tokens; {NO_EOS}",
        4,
        16,
        128,
        32,
    ),
    "c": SMOLLM2,
    "c_bf16": replace(
        SMOLLM2, what=SMOLLM2.what + "; bfloat16 autocast", dtype="bfloat16"
    ),
    "d": Setting(
        "qwen",
        "shape of Qwen2.5-0.5B, random weights, 4 prompts of 512 tokens x 16 "
        f"completions of 256 tokens; {NO_EOS}; bfloat16 autocast; TRL in 4 passes",
        4,
        16,
        512,
        256,
        "bfloat16",
        passes=4,
        accelerator=True,
    ),
}
GROWTH = [
    Setting(
        "tiny_random",
        f"1 prompt of {P} tokens x {G} completions of 16 tokens",
        1,
        G,
        P,
        16,
    )
    for P in (32, 128, 512)
    for G in (2, 4, 16, 64)
]
NAMES = [*SETTINGS, "growth"]


# ---- what both sides are given: a saved model, queries, a reward function

NEVER = "<never>"  # the EOS token of a tokenizer whose model has no logit for it


def without_eos(model, tokenizer):
    """The same model, which now never ends a completion: EOS becomes an id beyond
    its vocabulary."""
    pad = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.add_special_tokens({"eos_token": NEVER})
    tokenizer.pad_token = pad
    if tokenizer.eos_token_id < model.config.vocab_size:
        raise ValueError(
            f"{NEVER} got the id {tokenizer.eos_token_id}, which can be drawn"
        )
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return model, tokenizer


def byte_tokenizer(vocab_size):
    """Qwen's tokenizer with a token a byte and fillers above: a text is as long as
    it has characters, and every id can be decoded."""
    from tokenizers.pre_tokenizers import ByteLevel

    words = sorted(ByteLevel.alphabet()) + ["<|endoftext|>"]
    words += [f"w{i}" for i in range(len(words), vocab_size)]
    return transformers.Qwen2Tokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[]
    )


QWEN_SHAPES = {
    "qwen": {  # that of Qwen2.5-0.5B
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
    },
    "qwen_small": {  # for tests
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "vocab_size": 500,
    },
}


def qwen_shape(name, device):
    "Random weights in one of Qwen's shapes, with a tokenizer for its ids."
    config = transformers.Qwen2Config(
        **QWEN_SHAPES[name],
        max_position_embeddings=4096,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.Qwen2ForCausalLM(config)
    return model, byte_tokenizer(config.vocab_size)


def save_model(name, directory, device):
    """The directory that both sides load: that of the embedded model, or
    `directory`, written here."""
    if name == "tiny":
        return TINY
    model, tokenizer = (
        qwen_shape(name, device)
        if name in QWEN_SHAPES
        else load_policy("tiny" if name.startswith("tiny") else name, "cpu")
    )
    if name == "tiny_random":
        torch.manual_seed(0)
        model = type(model)(
            model.config
            # where it was never trained, the embedded model says the same again and
            # again
        )
    if name.startswith("tiny"):
        model.config.max_position_embeddings = tokenizer.model_max_length = (
            1024  # rotary positions: no weight depends on it
        )
    for part in without_eos(model, tokenizer):
        part.save_pretrained(directory)
    return Path(directory)


SENTENCES = """The harbour was quiet in the morning, and the boats lay still on the grey water.
She had kept every letter that her brother wrote from the mountains.
A train leaves the station at nine and arrives in the capital before noon.
The recipe asks for two eggs, a cup of flour, some milk and a little salt.
In winter the lake freezes, and children walk across it to the island.
The engineer measured the bridge twice and wrote the numbers into a notebook.
Bees find their way home by the position of the sun.
His grandfather repaired clocks in a small shop behind the old market hall.
The museum opens late on Thursdays, when a pianist plays in the entrance.
After the storm a tall tree had fallen across the road to the village.""".splitlines()


def make_queries(setting, n, seed):
    "Queries of the setting's length."
    rng = random.Random(seed)
    if setting.model == "tiny":
        return load_task("add", digits=2).queries("train", n, seed)
    if setting.model != "smollm2":
        return [
            Query("".join(rng.choices("0123456789", k=setting.prompt_length)))
            for _ in range(n)
        ]  # a token a character

    def chat():
        return [
            {
                "role": "user",
                "content": "Continue this story: " + " ".join(rng.sample(SENTENCES, 3)),
            }
        ]

    return [Query(chat()) for _ in range(n)]


def variety(prompts, completions, **columns):
    """A reward that differs within a group, whatever was drawn: the share of
    different characters."""
    texts = [o if isinstance(o, str) else o[-1]["content"] for o in completions]
    return [len(set(text)) / max(1, len(text)) for text in texts]


def reward_of(setting):
    "The reward function that both sides call."
    from grpo_nb.reward import accuracy_reward

    return (
        accuracy_reward(load_task("add", digits=2))
        if setting.model == "tiny"
        else variety
    )


# ---- the two sides


class Meter:
    """Seconds and tokens of a step by phase; what belongs to no other phase is the
    update."""

    def __init__(self, device):
        self.device, self.phase = device, "update"

    def clock(self):
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def start(self):
        self.seconds, self.tokens, self.completion, self.prompt, self.began = (
            Counter(),
            Counter(),
            0,
            0,
            self.clock(),
        )

    def stop(self):
        total = self.clock() - self.began
        split = {
            "sampling": self.seconds["sampling"],
            "scoring": self.seconds["scoring"],
            "update": total - self.seconds["sampling"] - self.seconds["scoring"],
        }
        return {
            "seconds": total,
            "split": split,
            "tokens": {phase: self.tokens[phase] for phase in PHASES},
            "completion": self.completion,
            "prompt": self.prompt,
            "distinct": self.completion,
        }

    def watch(self, model):
        "Count every id that enters the model."

        def count(module, inputs):
            self.tokens[self.phase] += inputs[0].numel()

        model.get_input_embeddings().register_forward_pre_hook(count)

    def timed(self, phase, f):
        "`f`, with its time and tokens counted in a phase."

        def measured(*args, **kwargs):
            began, self.phase = self.clock(), phase
            try:
                return f(*args, **kwargs)
            finally:
                self.seconds[phase], self.phase = (
                    self.seconds[phase] + self.clock() - began,
                    "update",
                )

        return measured


class Ours:
    "`grpo_step`, as `train` calls it."

    def __init__(self, setting, directory, device, checkpointing=False):
        from grpo_nb.algorithm import grpo_step
        from grpo_nb.run.build import build_models
        from grpo_nb.run.options import make_config

        self.step, self.meter = grpo_step, Meter(device)
        self.config = make_config(
            algorithm="grpo",
            model=str(directory),
            num_prompts=setting.num_prompts,
            dtype=setting.dtype,
            device=str(device),
            gradient_checkpointing=checkpointing,
            **setting.options,
        )
        rewards = [reward_of(setting)]
        self.models = build_models(self.config, load_task("add"), rewards)
        self.policy, self.reference = self.models.policy, self.models.reference
        for model in (self.policy, self.reference):
            self.meter.watch(model)
        self._time_phases()

    def _time_phases(self):
        "Time the verbs that a step asks of its models."
        phases = {
            "sample": "sampling",
            "score": "scoring",
            "reference_logprobs": "scoring",
        }
        for verb, phase in phases.items():
            timed = self.meter.timed(phase, getattr(self.models, verb))
            setattr(self.models, verb, timed)

    def run(self, queries):
        "One step, and what it took."
        with precision(self.config, self.policy.device):
            self.meter.start()
            rollout, _ = self.step(self.models, queries, self.config)
            record = self.meter.stop()
        lengths, first = rollout.completion_mask.sum(1), first_of_equal(rollout)
        return record | {
            "completion": lengths.sum().item(),
            "prompt": rollout.prompt_mask.sum().item(),
            "distinct": lengths[first.unique()].sum().item(),
        }


def trl_arguments(setting, device, steps, scratch, checkpointing):
    """TRL's options: those of COMMON, all completions in one step of the optimiser,
    nothing written."""
    import trl

    # Accelerate goes by it where it does not know the kind of device
    os.environ["ACCELERATE_TORCH_DEVICE"] = device.type
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # transformers renames gradient_checkpointing, TRL has not yet
        return trl.GRPOConfig(
            output_dir=str(scratch),
            max_steps=steps,
            per_device_train_batch_size=setting.num_prompts
            * setting.num_generations
            // setting.passes,
            gradient_accumulation_steps=setting.passes,
            use_cpu=device.type == "cpu",
            bf16=setting.dtype == "bfloat16",
            shuffle_dataset=False,
            gradient_checkpointing=checkpointing,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **setting.options,
        )


class TRL:
    """Its GRPOTrainer, with the phases of a step timed; `after` is called after each
    step."""

    def __init__(
        self, setting, directory, device, queries, scratch, after, checkpointing=False
    ):
        import trl
        from datasets import Dataset

        steps, self.meter = len(queries) // setting.num_prompts, Meter(device)
        rows = Dataset.from_list(
            [{"prompt": query.prompt, **query.columns} for query in queries]
        )
        self.trainer = trl.GRPOTrainer(
            model=str(directory),
            reward_funcs=[reward_of(setting)],
            train_dataset=rows,
            args=trl_arguments(setting, device, steps, scratch, checkpointing),
        )
        self.policy, self.reference = self.trainer.model, self.trainer.ref_model
        for model in (self.policy, self.reference):
            self.meter.watch(model)
        self._time_phases()
        self.trainer.remove_callback(transformers.PrinterCallback)
        self.trainer.add_callback(self._callback(after))

    def _time_phases(self):
        trainer, meter = self.trainer, self.meter
        generate, logprobs = (
            meter.timed("sampling", trainer._generate),
            trainer._get_per_token_logps_and_entropies,
        )
        without_gradient = meter.timed("scoring", logprobs)

        def counted(prompts):
            result = generate(prompts)
            meter.prompt, meter.completion = (
                sum(map(len, result[0])),
                sum(map(len, result[1])),
            )
            return result

        def scored(*args, **kwargs):
            return (logprobs if torch.is_grad_enabled() else without_gradient)(
                *args, **kwargs
            )  # with gradient it is the update

        trainer._generate, trainer._get_per_token_logps_and_entropies = counted, scored
        trainer._calculate_rewards = meter.timed("scoring", trainer._calculate_rewards)

    def _callback(self, after):
        meter = self.meter

        class Steps(transformers.TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                meter.start()

            def on_step_end(self, args, state, control, **kwargs):
                after(state.global_step - 1, meter.stop())

        return Steps()

    def run(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.trainer.train()


def alternate(setting, directory, device, pairs, warmup, tick=lambda: None):
    "Steps of the two sides in turn: ([of ours], [of TRL], weights of the model)."
    n, ours, theirs = setting.num_prompts, [], []
    queries = make_queries(setting, n * (pairs + warmup), seed=1)
    side = Ours(setting, directory, device)

    def after(i, record):
        theirs.append(record)
        ours.append(side.run(queries[n * i : n * (i + 1)]))
        if record["prompt"] != ours[-1]["prompt"] * setting.num_generations:
            raise RuntimeError(f"step {i}: the prompts of the two sides differ")
        tick()

    with tempfile.TemporaryDirectory() as scratch:
        TRL(setting, directory, device, queries, scratch, after).run()
    return ours[warmup:], theirs[warmup:], weights(side.policy)


# ---- what the numbers mean


def weights(model):
    """(weights that every token passes, weights of the projection onto the
    vocabulary, which only completion tokens need)"""
    inputs, outputs = (
        model.get_input_embeddings().weight,
        model.get_output_embeddings().weight,
    )
    tables = {
        p.data_ptr(): p.numel() for p in (inputs, outputs)
    }  # one if they are tied
    return sum(p.numel() for p in model.parameters()) - sum(
        tables.values()
    ), outputs.numel()


def flops(size, tokens, completion, factor):
    """Of the matrix products with weights: 2 a weight and token forward, 6 forward
    and backward."""
    return factor * (size[0] * tokens + size[1] * completion)


def matmul_rate(device, dtype, n=None):
    "FLOP/s of a large matrix product, [n, n] by [n, n]: the best of five."
    n = n or (2048 if device.type == "cpu" else 8192)
    a, meter, best = (
        torch.randn(n, n, device=device, dtype=getattr(torch, dtype)),
        Meter(device),
        float("inf"),
    )
    for _ in range(6):
        began = meter.clock()
        a @ a
        best = min(best, meter.clock() - began)
    return 2 * n**3 / best


def middle(records, name, phase=None):
    "The median over steps of one number."
    return median(
        record[name] if phase is None else record[name][phase] for record in records
    )


def summary(ours, theirs, size, rate, rows):
    """The figures of a setting from the records of its steps; `rows`: completions of
    a step."""
    result = {
        "speedup": median(t["seconds"] / o["seconds"] for o, t in zip(ours, theirs)),
        "pairs": [[o["seconds"], t["seconds"]] for o, t in zip(ours, theirs)],
    }
    for side, records in (("ours", ours), ("trl", theirs)):
        tokens, completion = (
            {phase: middle(records, "tokens", phase) for phase in PHASES},
            middle(records, "completion"),
        )
        if tokens["sampling"] < completion - rows:
            raise RuntimeError(
                f"{side}: {tokens['sampling']} tokens were seen while {completion} "
                "were sampled: the model is not called through its embedding"
            )
        split = {phase: middle(records, "split", phase) for phase in PHASES}
        result |= {
            f"seconds_{side}": middle(records, "seconds"),
            f"split_{side}": split,
            f"tokens_{side}": sum(tokens.values()),
            f"tokens_split_{side}": tokens,
            f"completion_tokens_{side}": completion,
            f"completion_tokens_per_second_{side}": median(
                r["completion"] / r["seconds"] for r in records
            ),
            f"update_share_of_matmul_rate_{side}": flops(
                size, tokens["update"], middle(records, "distinct"), 6
            )
            / split["update"]
            / rate,
        }
    completion, distinct = middle(ours, "completion"), middle(ours, "distinct")
    needed = (
        middle(ours, "prompt") + completion - rows
    )  # each prompt once a group; nothing follows the last token of a completion
    return result | {
        "update_share_of_matmul_rate": result["update_share_of_matmul_rate_ours"],
        "matmul_tflops": rate / 1e12,
        "distinct_completion_tokens": distinct,
        "floor_tokens": 3 * needed,
        "floor_seconds": flops(size, needed, completion, 2 + 2 + 6) / rate,
    }  # sampling, reference, update; of completions that all differ


def best_of(settings):
    """For each side the faster of its float32 and bfloat16, of what has been
    measured in both."""
    best = {}
    for name in [name for name in settings if f"{name}_bf16" in settings]:
        dtypes = {"float32": settings[name], "bfloat16": settings[f"{name}_bf16"]}
        for side in ("ours", "trl"):
            dtype = min(dtypes, key=lambda d: dtypes[d][f"seconds_{side}"])
            best.setdefault(name, {}).update(
                {
                    f"dtype_{side}": dtype,
                    f"seconds_{side}": dtypes[dtype][f"seconds_{side}"],
                }
            )
        best[name]["speedup"] = best[name]["seconds_trl"] / best[name]["seconds_ours"]
    return best


# ---- memory: each side alone, in a process of its own

ALONE = ("ours", "trl", "ours_checkpointing", "trl_checkpointing")


def resident(peak=False):
    "Bytes of this process in memory, now or at most."
    status = Path(
        "/proc/self/status"
        # not getrusage: its maximum begins with that of the process that started this
        # one
    )
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
    line = next(
        line
        for line in status.read_text().splitlines()
        if line.startswith("VmHWM:" if peak else "VmRSS:")
    )
    return 1024 * int(line.split()[1])


def allocated_on_device(peak=False):
    "Bytes of tensors on the accelerator, now or at most."
    if peak:
        return torch.accelerator.max_memory_allocated()
    return torch.accelerator.memory_allocated()


def reset_resident():
    "Let the peak of this process begin here."
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def reset_device():
    "Let the peak of the accelerator begin here."
    torch.accelerator.empty_cache()
    torch.accelerator.reset_peak_memory_stats()


def memory_of(device):
    "(what counts the bytes of a device, what lets their peak begin)"
    if device.type == "cpu":
        return resident, reset_resident
    return allocated_on_device, reset_device


def steps_alone(which, setting, directory, device, steps):
    "A few steps of one side. Returns it."
    queries = make_queries(setting, setting.num_prompts * steps, seed=1)
    if which.startswith("ours"):
        side = Ours(
            setting, directory, device, checkpointing=which == "ours_checkpointing"
        )
        for i in range(steps):
            side.run(queries[setting.num_prompts * i : setting.num_prompts * (i + 1)])
        return side
    with tempfile.TemporaryDirectory() as scratch:
        side = TRL(
            setting,
            directory,
            device,
            queries,
            scratch,
            lambda i, record: None,
            checkpointing=which == "trl_checkpointing",
        )
        side.run()
    return side


def own_memory(which, setting, directory, device):
    """Bytes at the peak of a few steps: all, the model's own state, and what is
    above it.

    The state is weights, gradients, two moments and the reference. Above it is what
    the peak has more than the state and than the process had before a model of this
    setting was loaded, but with every import done: after a small step of the
    embedded model."""
    steps_alone(
        which,
        replace(
            SETTINGS["a"],
            num_prompts=1,
            num_generations=2,
            max_completion_length=2,
            dtype=setting.dtype,
        ),
        TINY,
        device,
        1,
    )
    gc.collect()
    allocated, reset_peak = memory_of(device)
    reset_peak()
    before = allocated()
    side = steps_alone(
        which, setting, directory, device, 2
    )  # the second has the moments of the first
    peak = allocated(peak=True)
    state = 4 * sum(p.nbytes for p in side.policy.parameters()) + sum(
        p.nbytes for p in side.reference.parameters()
    )
    return {"peak": peak, "state": state, "above_state": peak - before - state}


def measure_memory(name, directory, device, threads):
    """`own_memory` of both sides, without and with gradient checkpointing, in
    processes alike: malloc gives large blocks back at once."""
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "131072",
        "MALLOC_TRIM_THRESHOLD_": "131072",
    }
    found = {}
    for which in ALONE:
        command = [
            sys.executable,
            __file__,
            "--memory",
            which,
            "--settings",
            name,
            "--directory",
            str(directory),
            "--device",
            str(device),
            "--threads",
            str(threads),
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(
                f"memory of {which} in setting {name}: {done.stderr.strip()[-2000:]}"
            )
        found[which] = json.loads(done.stdout.splitlines()[-1])
    return {
        "memory": found,
        "memory_ratio": memory_ratio(found, "above_state"),
        "memory_ratio_checkpointing": memory_ratio(
            found, "above_state", "_checkpointing"
        ),
        "peak_memory_ratio": memory_ratio(found, "peak"),
    }


def memory_ratio(found, key, suffix=""):
    "Ours by TRL's; None where one of them is too small to be measured."
    ours, theirs = (found[side + suffix][key] for side in ("ours", "trl"))
    return ours / theirs if min(ours, theirs) > 0 else None


# ---- the run


def measure(setting, device, directory, label, pairs, warmup, rate):
    "One setting: its summary, without memory."
    with tqdm(total=pairs + warmup, desc=label, unit="pair") as bar:
        ours, theirs, size = alternate(
            setting, directory, device, pairs, warmup, bar.update
        )
    return {"what": setting.what} | summary(
        ours, theirs, size, rate, setting.num_prompts * setting.num_generations
    )


def measure_growth(device, arguments, scratch):
    """Short runs over prompt length and size of the group. No group of one: neither
    side takes it."""
    directory, rate, points = (
        save_model("tiny_random", scratch, device),
        matmul_rate(device, "float32"),
        [],
    )
    for s in GROWTH:
        found = measure(
            s,
            device,
            directory,
            f"growth: {s.what}",
            min(arguments.pairs, 3),
            min(arguments.warmup, 1),
            rate,
        )
        points.append(
            {
                "prompt_length": s.prompt_length,
                "num_generations": s.num_generations,
                "completion_length": s.max_completion_length,
            }
            | {
                key: found[key]
                for key in (
                    "speedup",
                    "seconds_ours",
                    "seconds_trl",
                    "floor_seconds",
                    "floor_tokens",
                    "tokens_ours",
                    "tokens_trl",
                    "completion_tokens_ours",
                    "distinct_completion_tokens",
                    "pairs",
                )
            }
        )
    return {
        "what": "the shape of the embedded model with random weights, 1 prompt, "
        f"completions of 16 tokens; {NO_EOS}. G = 2 stands for the smallest "
        "group: neither side takes 1",
        "matmul_tflops": rate / 1e12,
        "points": points,
    }


def measure_setting(name, device, arguments):
    "One setting with its memory, or growth."
    with tempfile.TemporaryDirectory() as scratch:
        if name == "growth":
            return measure_growth(device, arguments, scratch)
        setting = SETTINGS[name]
        directory = save_model(setting.model, scratch, device)
        found = measure(
            setting,
            device,
            directory,
            name,
            arguments.pairs,
            arguments.warmup,
            matmul_rate(device, setting.dtype),
        )
        gc.collect()
        if device.type != "cpu":
            # the processes that measure memory need the room
            torch.accelerator.empty_cache()
        return found | (
            {}
            if arguments.skip_memory
            else measure_memory(name, directory, device, torch.get_num_threads())
        )


def machine(device):
    "What was measured on, without a name of its own."
    cpu = (
        next(
            (
                line.split(":", 1)[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ),
            None,
        )
        if Path("/proc/cpuinfo").exists()
        else None
    )
    found = {
        "cpu": cpu or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        ),
    }
    if device.type != "cpu":
        found |= {
            "gpu": torch.get_device_module(device).get_device_name(device),
            "gpu_memory_gib": round(torch.accelerator.get_memory_info()[1] / 2**30),
        }
    return found


def commit():
    "The commit that was measured; `+` after it if the library differs from it."

    def git(*words):
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (
        "+" if git("status", "--porcelain", "--", "grpo_nb", "benchmarks/*.py") else ""
    )


def opened(path, device, measured="settings"):
    """The record to add to: what the file holds, if it comes from this machine and
    these versions; else an error, before anything is measured."""
    from grpo_nb import __version__

    versions = {
        name: version(name)
        for name in ("torch", "transformers", "trl", "accelerate", "datasets")
    }
    here = {
        "machine": machine(device),
        "versions": versions
        | {"grpo_nb": __version__, "python": platform.python_version()},
    }
    record = json.loads(path.read_text()) if path.exists() else here | {measured: {}}
    for key, value in here.items():
        if record[key] != value:
            raise ValueError(
                f"{path} was measured with other {key} ({record[key]}; here "
                f"{value}): give another --output, or remove it"
            )
    return record


def not_here(device):
    "The settings that cannot be measured on this machine: why."
    missing = {
        name: "it needs an accelerator"
        for name, setting in SETTINGS.items()
        if setting.accelerator and device.type == "cpu"
    }
    if not (cache_directory() / "smollm2" / "config.json").exists():
        missing |= dict.fromkeys(
            ("c", "c_bf16"),
            "SmolLM2 is not here; fetch it once: python -m grpo_nb fetch smollm2",
        )
    return missing


def chosen(names, device):
    "The settings that were asked for; all that can run here if none were."
    missing = not_here(device)
    wanted = [name.strip() for name in names.split(",")] if names else NAMES
    unknown = [name for name in wanted if name not in NAMES]
    if unknown:
        raise ValueError(
            f"settings must be of {', '.join(NAMES)}; got {', '.join(unknown)}"
        )
    for name in wanted:
        if name in missing:
            print(f"setting {name} is left out: {missing[name]}", file=sys.stderr)
    if not set(wanted) - missing.keys():
        raise ValueError(
            f"nothing to measure: none of {', '.join(wanted)} can run here"
        )
    return [name for name in wanted if name not in missing]


HEADINGS = {
    "prompt_length": "P",
    "num_generations": "G",
    "completion_length": "T",
    "speedup": "speedup",
    "seconds_ours": "s ours",
    "seconds_trl": "s TRL",
    "tokens_ours": "tokens ours",
    "tokens_trl": "tokens TRL",
    "memory_ratio": "memory",
    "memory_ratio_checkpointing": "same, ckpt",
    "peak_memory_ratio": "peak",
    "floor_seconds": "s floor",
    "floor_tokens": "tokens floor",
}


def table(record):
    "The settings as a table, a line each, and the points of growth."
    import pandas as pd

    settings = {
        name: found for name, found in record["settings"].items() if name != "growth"
    } | {f"best of {name}": found for name, found in record["best"].items()}
    columns = [
        c
        for c in HEADINGS
        if c
        not in ("prompt_length", "num_generations", "completion_length", "floor_tokens")
    ]
    parts = (
        [
            pd.DataFrame(
                {
                    name: {c: found.get(c) for c in columns}
                    for name, found in settings.items()
                }
            ).T.astype(float)
        ]
        if settings
        else []
    )
    if "growth" in record["settings"]:
        parts.append(
            pd.DataFrame(record["settings"]["growth"]["points"]).drop(
                columns=[
                    "pairs",
                    "completion_tokens_ours",
                    "distinct_completion_tokens",
                ]
            )
        )
    return "\n\n".join(
        part.rename(columns=HEADINGS).to_string(float_format="{:.4g}".format, na_rep="")
        for part in parts
    )


def parse(words):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "--settings", help=f"of {','.join(NAMES)} (default: all that can run here)"
    )
    parser.add_argument(
        "--pairs",
        type=int,
        default=7,
        help="measured steps of each side (growth: at most 3)",
    )
    parser.add_argument(
        "--warmup", type=int, default=2, help="pairs before them that are not counted"
    )
    parser.add_argument("--threads", type=int, help="of torch (default: all cores)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/<device>.json"
    )
    parser.add_argument("--skip-memory", action="store_true", help="time only")
    parser.add_argument(
        "--memory", choices=ALONE, help=argparse.SUPPRESS
    )  # the processes of `measure_memory`
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.pairs < 1 or arguments.warmup < 0:
        parser.error("--pairs must be at least 1, --warmup at least 0")
    return arguments


def run(arguments):
    """Measure, and write after every setting: what is measured is not lost if a
    later one fails."""
    from grpo_nb.run.run_directory import write_atomically

    device = resolve_device(arguments.device)
    path = arguments.output or ROOT / "benchmarks" / "results" / f"{device.type}.json"
    names, record = chosen(arguments.settings, device), opened(path, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        when = {"commit": commit(), "date": datetime.date.today().isoformat()}
        if device.type == "cpu":
            # a virtual machine's processor changes under the same name
            when["instructions"] = torch.backends.cpu.get_cpu_capability()
        record |= when
        record["settings"][name] = measure_setting(name, device, arguments) | when
        record["best"] = best_of(record["settings"])
        write_atomically(path, json.dumps(record, indent=1) + "\n")
    return record


def main(words=None):
    arguments = parse(words)
    torch.set_num_threads(arguments.threads or os.cpu_count())
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.memory:
        return print(
            json.dumps(
                own_memory(
                    arguments.memory,
                    SETTINGS[arguments.settings],
                    arguments.directory,
                    resolve_device(arguments.device),
                )
            )
        )
    try:
        import trl  # noqa: F401
    except ImportError:
        sys.exit("error: TRL is not installed: pip install -e '.[bench]'")
    try:
        record = run(arguments)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    if record["settings"]:
        print(table(record))


if __name__ == "__main__":
    main()
