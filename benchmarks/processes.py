"""Seconds a step by one process and by two, the same queries a step:
benchmarks/results/processes.json.

Each pair is two runs of the command line, one after the other (the order changes
from pair to pair), with one thread a process; compared are the medians of their
steps, without the first ones. `python benchmarks/processes.py [--pairs 5] [--steps
10]`."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
WARM = 2  # steps that are not counted
SETTINGS = {
    "grpo": {"num_prompts": 64, "num_generations": 16},
    "ppo": {"num_prompts": 256},
}


def seconds(algorithm, processes, steps, fsdp=False):
    "Median seconds of a step."
    with tempfile.TemporaryDirectory() as scratch:
        options = SETTINGS[algorithm] | {
            "algorithm": algorithm,
            "max_steps": steps,
            "eval_steps": steps,
            "eval_size": 2,
            "save_steps": 0,
            "device": "cpu",
            "output_dir": f"{scratch}/run",
        }
        launcher = (
            [
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={processes}",
            ]
            if processes > 1
            else []
        )
        environment = (
            os.environ
            | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            | ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if fsdp else {})
        )
        command = [
            sys.executable,
            *launcher,
            "-m",
            "grpo_nb",
            "train",
            *(str(x) for name, value in options.items() for x in (f"--{name}", value)),
        ]
        subprocess.run(
            command, cwd=scratch, env=environment, check=True, capture_output=True
        )
        times = [
            json.loads(line)["step_time"]
            for line in (Path(scratch) / "run/metrics.jsonl").read_text().splitlines()
        ]
    return statistics.median(times[WARM:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks/results/processes.json"
    )
    arguments = parser.parse_args()
    found = {}
    for algorithm in SETTINGS:
        pairs = []
        for i in range(arguments.pairs):
            order = (1, 2) if i % 2 == 0 else (2, 1)
            pairs.append({n: seconds(algorithm, n, arguments.steps) for n in order})
            print(
                algorithm,
                {n: round(s, 3) for n, s in sorted(pairs[-1].items())},
                f"{pairs[-1][1] / pairs[-1][2]:.2f} times as fast",
                flush=True,
            )
        found[algorithm] = {
            "options": SETTINGS[algorithm],
            "seconds_1": [p[1] for p in pairs],
            "seconds_2": [p[2] for p in pairs],
            "speedup": [p[1] / p[2] for p in pairs],
        }
    machine = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }
    arguments.output.write_text(
        json.dumps(
            {
                "machine": machine,
                "versions": {
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
                "steps": arguments.steps - WARM,
                "algorithms": found,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
