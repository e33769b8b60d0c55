"""Launches and syncs of a training step on the stand-in, by stage and by line.

python tests/standin/counting.py grpo num_prompts=8  # config fields; prints both"""

import ast
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import standin
import torch

from grpo_nb.run.options import make_config
from grpo_nb.run.training import train

STAGES = {  # of a function, by its file and name
    "models.py sample": "sampling",
    "models.py score": "reward",
    "models.py reference_logprobs": "reference",
    "models.py predict_values": "values",
    "reference.py token_rewards": "advantages",
    "reference.py next_beta": "advantages",
    "gae.py advantages": "advantages",
    "group.py advantages": "advantages",
    "update.py update": "update",
    "training.py rollout_metrics": "metrics",
    "diagnostics.py record": "record",
    "diagnostics.py update_metrics": "record",
    "training.py table": "record",
    "training.py _heldout": "evaluation",
}
STEPS = (2, 3)  # what is counted; what is done once comes before


def place(frame):
    "Say in which stage a frame is, and which line of the library asked."
    stage, line = "other", None
    while frame is not None:
        code = frame.f_code
        folder, _, file = code.co_filename.rpartition("/")
        if "/grpo_nb" in folder:
            line = line or f"{file}:{frame.f_lineno} {code.co_name}"
            stage = STAGES.get(f"{file} {code.co_name}", stage)
        frame = frame.f_back
    return stage, line


def count_steps(**options):
    """Train three steps; (launches and syncs by (kind, stage), syncs by (stage, line,
    operation), the metrics), of a step: means over steps 2 and 3."""
    step = [1]
    lines = {}

    def on_step(line):
        step[0] += 1
        lines[line["step"]] = line

    defaults = {"device": "standin", "max_steps": 3, "eval_size": 4, "save_steps": 0}
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(**defaults | {"output_dir": f"{folder}/run"} | options)
        with standin.trace(lambda frame: (step[0], *place(frame))) as events:
            train(config, progress=False, on_step=on_step)
    stages, syncs = Counter(), Counter()
    for (kind, operation, number, stage, line), n in events.items():
        if number in STEPS and stage != "evaluation":
            stages[kind, stage] += n / len(STEPS)
            if kind == "sync":
                syncs[stage, line, operation] += n / len(STEPS)
    return stages, syncs, [lines[number] for number in STEPS]


def total(stages, kind):
    "Add up one kind over the stages."
    return sum(n for (kind_of, _), n in stages.items() if kind_of == kind)


def main():
    "Count for the config of the command line, and print."
    torch.set_num_threads(1)
    algorithm, *fields = sys.argv[1:]
    options = dict(field.split("=") for field in fields)
    for name, text in options.items():
        try:
            options[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            pass  # a string
    stages, syncs, metrics = count_steps(algorithm=algorithm, **options)
    print(algorithm, options, [line["completions/mean_length"] for line in metrics])
    for stage in dict.fromkeys(stage for _, stage in stages):
        numbers = stages["launch", stage], stages["sync", stage]
        print(f"{stage:12} launches {numbers[0]:8.1f}   syncs {numbers[1]:7.1f}")
    numbers = total(stages, "launch"), total(stages, "sync")
    print(f"{'total':12} launches {numbers[0]:8.1f}   syncs {numbers[1]:7.1f}")
    for (stage, line, operation), n in sorted(syncs.items(), key=str):
        print(f"{n:6.1f}  {stage:10} {line:44} {operation}")


if __name__ == "__main__":
    main()
