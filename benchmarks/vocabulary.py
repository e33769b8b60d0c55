"""Peak memory of a forward and backward pass over completions, as the vocabulary
grows.

python benchmarks/vocabulary.py        # writes benchmarks/results/vocabulary.json

Three ways to the same log-probs, entropies and gradients: a row for each completion
with its logits whole; a row for each group, logits still whole; and
`token_logprobs`, whose logits exist in pieces that are computed again in the
backward pass. Each is measured in a process of its own, above weights and gradients."""

import argparse
import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from vs_trl import ROOT, machine, resident
from grpo_nb.engine import packing
from grpo_nb.engine.packing import token_logprobs
from grpo_nb.policy import model_inputs
from grpo_nb.rollout import Rollout
from grpo_nb.run.run_directory import write_atomically

VOCABULARIES = (1024, 8192, 49152, 151936)  # the last two: SmolLM2, Qwen2.5
B, G, P, T = (
    4,
    8,
    96,
    48,
)  # prompts, completions of each, their tokens: setting c of vs_trl.py
WAYS = {
    "rows": "a row for each completion, logits whole",
    "shared": "a row for each group, logits whole",
    "pieces": "a row for each group, logits in pieces",
}


def small_trunk(vocabulary):
    "A Llama of 4 layers, 256 wide, tied: what grows with the vocabulary is one table."
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
        )
    ).eval()


def rollout_of(vocabulary):
    "Random tokens."
    ids, yes = (
        torch.randint(0, vocabulary, (B, P)),
        lambda *shape: torch.ones(*shape, dtype=torch.bool),
    )
    return Rollout(
        [None] * B,
        ids,
        yes(B, P),
        torch.randint(0, vocabulary, (B * G, T)),
        yes(B * G, T),
        [""] * B * G,
        yes(B * G),
        G,
    )


def each_row(model, rollout):
    """The plain way: a row for each completion, and every logit of its completion at
    once."""
    every = (
        model(**model_inputs(rollout), logits_to_keep=T + 1)
        .logits[:, :-1]
        .log_softmax(-1)
    )
    return every.gather(-1, rollout.completion_ids[..., None]).squeeze(-1), -(
        every.exp() * every
    ).sum(-1)


def peak(way, vocabulary):
    "Bytes above weights and gradients, of the second of two passes."
    if way == "shared":
        packing.LOGITS = 2**62

    def step(model, rollout):
        logprobs, entropy = (
            each_row(model, rollout)
            if way == "rows"
            else token_logprobs(model, rollout, return_entropy=True)
        )
        (logprobs.mean() - 0.01 * entropy.mean()).backward()

    step(small_trunk(64), rollout_of(64))  # late imports, thread pools
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = resident()
    model = small_trunk(vocabulary)
    for _ in range(2):
        step(model, rollout_of(vocabulary))
    return resident(peak=True) - before - 2 * sum(p.nbytes for p in model.parameters())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "vocabulary.json",
    )
    parser.add_argument(
        "--one", nargs=2, metavar=("WAY", "VOCABULARY"), help=argparse.SUPPRESS
    )  # the processes that measure
    arguments = parser.parse_args()
    if arguments.one:
        return print(peak(arguments.one[0], int(arguments.one[1])))
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "131072",
        "MALLOC_TRIM_THRESHOLD_": "131072",
    }  # large blocks are given back at once
    found = {way: [] for way in WAYS}
    for way, vocabulary in tqdm(
        [(way, v) for v in VOCABULARIES for way in WAYS], unit="process"
    ):
        done = subprocess.run(
            [sys.executable, __file__, "--one", way, str(vocabulary)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            check=True,
        )
        found[way].append(int(done.stdout.split()[-1]))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        arguments.output,
        json.dumps(
            {
                "machine": machine(torch.device("cpu")),
                "torch": torch.__version__.split("+")[0],
                "ways": WAYS,
                "vocabularies": VOCABULARIES,
                "what": f"{B} prompts of {P} tokens x {G} completions of {T}, a "
                "Llama of "
                "4 layers, 256 wide, float32; bytes above weights and gradients",
                "bytes": found,
            },
            indent=1,
        )
        + "\n",
    )
    for way, sizes in found.items():
        print(f"{WAYS[way]:45}", *(f"{size / 2**20:9,.0f} MiB" for size in sizes))


if __name__ == "__main__":
    main()
