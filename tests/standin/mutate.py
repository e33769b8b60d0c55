"""Take each `device=…` and `.to(device)` out of the library, one at a time: does a run
on the stand-in notice? It does if it raises, or waits more often.

python tests/standin/mutate.py                     # all of them, some minutes
python tests/standin/mutate.py --sample 3 --seed 0
python tests/standin/mutate.py --list

Each mutant runs in a forked child over its own copy of the library. The exit status is
1 if fewer than nine in ten are noticed."""

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ["TQDM_DISABLE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import accelerate  # noqa: F401  all that the library imports, once for every child
import jaxtyping  # noqa: F401
import pandas  # noqa: F401
import peft  # noqa: F401
import pydantic  # noqa: F401
import standin  # noqa: F401
import torch
from transformers import LlamaForCausalLM, MistralForCausalLM  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
# needs several processes or vLLM, is about the CPU, or is no code of a run
LEFT_OUT = {"attention", "distributed", "vllm_sampler"}
LEFT_OUT |= {"ledger", "oracles", "trl_oracles"}
NAME = r"(?:self\.)?[\w.]+"
PATTERNS = {  # of what is taken out: what stands there then
    rf", device={NAME}(?=[,)])": "",
    rf"\.to\((?:{NAME}\.)?device\)": "",
    rf"\.to\({NAME}\.device, (?!non_blocking)": ".to(",
    r"\.to\(resolve_device\(device\)\)": "",
    rf"(?<=torch\.Generator\(){NAME}(?=\))": "",
    rf"\.to\((?:{NAME}\.)?device, non_blocking=True\)": "",
}


@dataclass
class Mutant:
    "A place of the library, and what is taken out there."

    path: Path
    start: int
    end: int
    instead: str

    def __str__(self):
        text = self.path.read_text()
        line = text.count("\n", 0, self.start) + 1
        name = self.path.relative_to(ROOT / "grpo_nb")
        return f"{name}:{line} {text[self.start : self.end]}"

    def apply(self, root: Path):
        "Write it into the copy of the library in `root`."
        text = self.path.read_text()
        text = text[: self.start] + self.instead + text[self.end :]
        (root / self.path.relative_to(ROOT)).write_text(text)


def mutants() -> list[Mutant]:
    "Find every place, in the order of files and lines."
    found = []
    for path in sorted((ROOT / "grpo_nb").rglob("[a-z]*.py")):
        if path.stem in LEFT_OUT:
            continue
        text = path.read_text()
        for pattern, instead in PATTERNS.items():
            for match in re.finditer(pattern, text):
                begin = text.rfind("\n", 0, match.start()) + 1
                if text[begin:].lstrip().startswith(("def ", "#", "from ")):
                    continue
                found.append(Mutant(path, match.start(), match.end(), instead))
    return sorted(found, key=lambda mutant: (mutant.path, mutant.start))


def attempt(root: Path) -> tuple[str, int]:
    "In a child, work with the library in `root`: what it raised, and the waits."
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        error = ""
        try:
            sys.path.insert(0, str(root))
            from work import work

            work("standin")
        except BaseException as raised:
            error = f"{type(raised).__name__}: {raised}"
        os.write(writer, json.dumps([error[:2000], standin.syncs()]).encode())
        os._exit(0)
    os.close(writer)
    outcome = os.read(reader, 8192)
    os.close(reader)
    os.waitpid(child, 0)
    return json.loads(outcome) if outcome else ("the process died", 0)


def outcome_of(mutant: Mutant | None) -> tuple[str, int]:
    "Run one mutant (None: the library as it is)."
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "grpo_nb", Path(folder, "grpo_nb"))
        if mutant is not None:
            mutant.apply(Path(folder))
        return attempt(Path(folder))


def main():
    "Run the mutants of the command line."
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--sample", type=int, help="only so many, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="those whose place contains this text")
    arguments = parser.parse_args()
    chosen = mutants()
    if arguments.only:
        chosen = [x for x in chosen if arguments.only in str(x)]
    if arguments.sample:
        chosen = random.Random(arguments.seed).sample(chosen, arguments.sample)
    if arguments.list:
        print(*chosen, sep="\n")
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    error, expected = outcome_of(None)
    assert not error, f"the library as it is: {error}"
    caught = 0
    for mutant in chosen:
        error, waits = outcome_of(mutant)
        if not error and waits > expected:
            error = f"{waits - expected} more waits"
        caught += bool(error)
        shown = " ".join(error.split())[:100] or "NOT NOTICED"
        print(f"{mutant}: {shown}", flush=True)
    print(f"noticed: {caught} of {len(chosen)}")
    sys.exit(caught < 0.9 * len(chosen))


if __name__ == "__main__":
    main()
