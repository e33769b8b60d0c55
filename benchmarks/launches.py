"""What a GPU is asked to do in a training step: operations that are launched, and times
that the host waits for the device.

python benchmarks/launches.py  # writes benchmarks/results/launches.json

Counted on the stand-in of tests/standin with the default settings, so that no GPU is
needed; of its time that says nothing. Chapter "What each box costs" reads the file."""

import json
import os
import platform
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/standin")]

import torch
from counting import count_steps

RESULTS = ROOT / "benchmarks/results/launches.json"
KINDS = {"launches": "launch", "syncs": "sync"}


def counted(algorithm: str) -> dict:
    "Count a step of one algorithm, by stage."
    stages, _, metrics = count_steps(algorithm=algorithm)
    lengths = [line["completions/mean_length"] for line in metrics]
    found = {"mean_length": sum(lengths) / len(lengths)}
    for name, kind in KINDS.items():
        found[name] = {stage: n for (of, stage), n in stages.items() if of == kind}
    return found


def main():
    "Count both algorithms, and write the file."
    torch.set_num_threads(1)
    results = {
        "torch": torch.__version__.split("+")[0],
        "python": platform.python_version(),
        "device": "stand-in",
    }
    for algorithm in ("ppo", "grpo"):
        results[algorithm] = counted(algorithm)
        print(algorithm, results[algorithm])
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
