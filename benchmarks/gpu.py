"""What a GPU has to say: its tests, steps of GRPO here and in TRL, memory, tokens per
second; by one command, in at most eight minutes.

make bench-gpu
make bench-gpu ARGS="--parts d,sampler"     # these; the other parts stay as they were

Each part is a process of its own and has a limit of its own:

tests              tests/test_gpu.py
a, b, c, c_bf16, d a setting of vs_trl.py: pairs of steps here and in TRL, in turn, then
                   the peak memory of each side alone
sampler            completions of setting d by the library's sampler
vllm               the same by vLLM, where it can be imported

Results go into benchmarks/results/gpu.json after each part. What a part had measured
when its time was up stays; a part that was left out is there with the reason. Chapter
40 and the home page read the file, and say so while there is none."""

import time

BEGAN = time.monotonic()  # the time that imports take is of the eight minutes

import argparse
import datetime
import gc
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import transformers

from vs_trl import (
    ROOT,
    SETTINGS,
    Meter,
    commit,
    make_queries,
    matmul_rate,
    measure,
    memory_ratio,
    not_here,
    opened,
    own_memory,
    save_model,
)
from grpo_nb.engine.decoding import sample
from grpo_nb.engine.precision import precision
from grpo_nb.loading import load_policy, resolve_device
from grpo_nb.run.options import make_config
from grpo_nb.run.run_directory import write_atomically

RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
SECONDS = 480  # of the whole run
LEAST = 15  # seconds: with less a part is not begun
PARTS = {  # seconds at most; what matters most comes first
    "tests": 100,
    "d": 140,
    "sampler": 60,
    "b": 45,
    "a": 35,
    "c": 60,
    "vllm": 120,
    "c_bf16": 60,
}
PAIRS, WARMUP = 5, 1
FEW = {"d": 3}  # pairs of settings whose steps are long
TESTS = "tests/test_gpu.py"
SMALL = {"qwen": "qwen_small", "smollm2": "tiny_1024"}  # models in miniature


# ---- what a part measures; it reports as often as there is something to keep


def miniature(setting):
    "The same setting in a size that a CPU computes in a second."
    return replace(
        setting,
        model=SMALL.get(setting.model, setting.model),
        num_prompts=2,
        num_generations=2,
        prompt_length=8,
        max_completion_length=4,
        passes=1,
    )


OUTCOME = re.compile(r"(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


def run_tests(report, tests=TESTS):
    "The tests for a GPU: how many passed, and which did not."
    command = [sys.executable, "-u", "-m", "pytest", "-v", "-p", "no:cacheprovider"]
    counts, failed = Counter(), []
    with subprocess.Popen(
        [*command, tests], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            outcome = OUTCOME.match(line)
            if not outcome:
                continue
            counts[outcome[2].lower()] += 1
            if outcome[2] in ("FAILED", "ERROR"):
                failed.append(outcome[1])
            report({"outcomes": dict(counts), "failed": failed})
    if process.returncode not in (0, 1):  # 1: some have failed
        raise RuntimeError(f"pytest ended with status {process.returncode}")


def run_setting(name, device, report, small=False):
    "Steps of both sides in turn; then the memory of each alone."
    setting = miniature(SETTINGS[name]) if small else SETTINGS[name]
    pairs, warmup = (1, 0) if small else (FEW.get(name, PAIRS), WARMUP)
    rate = matmul_rate(device, setting.dtype, 64 if small else None)
    with tempfile.TemporaryDirectory() as scratch:
        directory = save_model(setting.model, scratch, device)
        found = measure(setting, device, directory, name, pairs, warmup, rate)
        report(found)
        memory = {}
        for which in ("ours", "trl"):
            gc.collect()  # what the steps before have left
            memory[which] = own_memory(which, setting, directory, device)
            report(found | {"memory": memory})
    report(found | {"memory": memory, "memory_ratio": ratio_of_peaks(memory)})


def ratio_of_peaks(memory):
    "Of state and what is above it: what this process held before is not counted."
    needed = {
        side: {"peak": found["state"] + found["above_state"]}
        for side, found in memory.items()
    }
    return memory_ratio(needed, "peak")


def run_sampler(name, device, report, small=False):
    "Tokens per second of setting d's completions; the first time does not count."
    setting = miniature(SETTINGS["d"]) if small else SETTINGS["d"]
    with tempfile.TemporaryDirectory() as scratch:
        directory = save_model(setting.model, scratch, device)
        policy, tokenizer = load_policy(str(directory), str(device))
        config = make_config(
            use_vllm=name == "vllm",
            model=str(directory),
            dtype=setting.dtype,
            device=str(device),
            **setting.options,
        )
        sampler, facts = sampler_of(config, policy, tokenizer)
        queries = make_queries(setting, setting.num_prompts, seed=1)
        rates = []
        for i in range(2 if small else 4):
            rates.append(rate_of(sampler, policy, tokenizer, queries, config, i))
            if i > 0:
                middle = median(rates[1:])
                report(facts | {"tokens_per_second": middle, "rates": rates[1:]})


def sampler_of(config, policy, tokenizer):
    "(the sampler, what is to be known of it)"
    if not config.use_vllm:
        return sample, {}
    from grpo_nb.engine.vllm_sampler import VLLMSampler, import_vllm

    version = import_vllm().__version__
    return VLLMSampler(policy, tokenizer, config), {"version": version}


def rate_of(sampler, policy, tokenizer, queries, config, seed):
    "Tokens per second of one call."
    meter = Meter(policy.device)
    generator = torch.Generator(policy.device).manual_seed(seed)
    began = meter.clock()
    with precision(config, policy.device):
        rollout = sampler(
            policy,
            tokenizer,
            queries,
            config.num_generations,
            config.max_completion_length,
            generator=generator,
        )
    seconds = meter.clock() - began
    return rollout.completion_mask.sum().item() / seconds


def measure_part(name, device, report, small=False):
    "One part, in this process."
    if name == "tests":
        return run_tests(report)
    if name in SETTINGS:
        return run_setting(name, device, report, small)
    return run_sampler(name, device, report, small)


# ---- each in a process of its own, while there is time


def left_out(name, device, seconds):
    "Why a part is not begun; None if it is. `seconds`: those that are left."
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    if name in SETTINGS and name in not_here(device):
        return not_here(device)[name]
    if seconds < LEAST:
        return "no time was left"
    return None


def finish(command, limit):
    "Let a command end, or end it when its time is up: how that was."
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # it ends together with what it has started
    )
    try:
        _, said = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return {"status": "out of time", "reason": f"stopped after {limit:.0f} s"}
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode == 0:
        return {"status": "done"}
    lines = said.strip().splitlines() or [f"it ended with status {process.returncode}"]
    reason = lines[-1].replace(str(Path.home()), "~")[:300]
    return {"status": "failed", "reason": reason}


def command_of(name, arguments, path):
    "The command that measures one part, and keeps what it finds in a file."
    command = [sys.executable, __file__, "--part", name, "--output", str(path)]
    command += ["--device", arguments.device]
    return [*command, "--miniature"] if arguments.miniature else command


def run_part(name, arguments, limit):
    "One part in a process of its own: how it ended, and what it has reported."
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "found.json"
        began = time.monotonic()
        how = finish(command_of(name, arguments, path), limit)
        found = json.loads(path.read_text()) if path.exists() else {}
    return how | {"seconds": round(time.monotonic() - began, 1)} | found


def run(arguments):
    "All parts that were asked for, written one by one."
    device = resolve_device(arguments.device)
    path = arguments.output or RESULTS
    record = opened(path, device, "parts")
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.parts:
        left = arguments.seconds - (time.monotonic() - BEGAN)
        reason = left_out(name, device, left)
        if reason:
            part = {"status": "left out", "reason": reason}
        else:
            part = run_part(name, arguments, min(PARTS[name], left))
        print(f"{name:8} {line_of(part)}", flush=True)
        older = record["parts"].get(name, part)
        if not reason or older["status"] == "left out":  # else the older result stays
            record["parts"][name] = part
        record |= {"commit": commit(), "date": datetime.date.today().isoformat()}
        record["text"] = text_of(record)
        write_atomically(path, json.dumps(record, indent=1) + "\n")
    return record


# ---- in words


def line_of(part):
    "How a part ended, in a line."
    words = [part["status"]]
    if "seconds" in part:
        words.append(f"{part['seconds']:.0f} s")
    if "reason" in part:
        words.append(part["reason"])
    return ", ".join(words)


WHAT = {
    "a": "the embedded model, 16 queries × 16 short answers",
    "b": "the same model, prompts of 128 tokens, 4 × 16 completions of 32",
    "c": "SmolLM2-135M, prompts of about 100 tokens, 4 × 8 completions of 48",
    "c_bf16": "the same in bfloat16",
    "d": "0.5 billion parameters, prompts of 512 tokens, 4 × 16 completions of 256, "
    "bfloat16",
}


def text_of(record):
    "What was measured, in Markdown: chapter 40 and the home page show it."
    gpu, versions, parts = record["machine"]["gpu"], record["versions"], record["parts"]
    torch_version = versions["torch"].split("+")[0]
    first = f"On {gpu}, torch {torch_version}, TRL {versions['trl']}"
    paragraphs = [first + tests_text(parts.get("tests", {})) + "."]
    rows = [
        row_of(name, parts[name]) for name in WHAT if "speedup" in parts.get(name, ())
    ]
    if rows:
        head = "| setting | grpo_nb | TRL | faster | memory | of TRL |"
        line = "| --- | --- | --- | --- | --- | --- |"
        paragraphs.append("\n".join([head, line, *rows]))
    paragraphs += [sampling_text(parts), missing_text(parts)]
    return "\n\n".join(text for text in paragraphs if text)


def tests_text(part):
    "How many tests have passed."
    outcomes = part.get("outcomes")
    if not outcomes:
        return ""
    text = f": {outcomes.get('passed', 0)} of {sum(outcomes.values())} tests passed"
    if part["failed"]:
        text += f", not {', '.join(part['failed'])}"
    return text


def row_of(name, part):
    "A setting as a row of the table."
    memory = part.get("memory", {})
    peaks = []
    for side in ("ours", "trl"):
        found = memory.get(side)
        peaks.append("–")
        if found:
            peaks[-1] = f"{(found['state'] + found['above_state']) / 2**30:.2g} GiB"
    cells = [
        WHAT[name],
        f"{part['seconds_ours']:.2g} s",
        f"{part['seconds_trl']:.2g} s",
        f"{part['speedup']:.1f} ×",
        *peaks,
    ]
    return f"| {' | '.join(cells)} |"


def sampling_text(parts):
    "Tokens per second of the samplers."
    names = {"sampler": "the library's sampler", "vllm": "vLLM"}
    rates = [
        f"{parts[name]['tokens_per_second']:,.0f} by {words}"
        for name, words in names.items()
        if "tokens_per_second" in parts.get(name, ())
    ]
    if not rates:
        return ""
    return f"Tokens per second, completions of the last setting: {', '.join(rates)}."


def missing_text(parts):
    "What was not measured, and why."
    missing = [
        f"{name} ({part['reason']})" for name, part in parts.items() if "reason" in part
    ]
    return f"Not, or not all, measured: {'; '.join(missing)}." if missing else ""


# ---- the command


def parse(words):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--parts", help=f"of {','.join(PARTS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all parts")
    parser.add_argument("--device", default="auto", help="auto, cuda, xpu, ...")
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/gpu.json"
    )
    parser.add_argument(
        "--miniature", action="store_true", help="tiny sizes, for tests"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    names = list(PARTS)
    if arguments.parts:
        names = [name.strip() for name in arguments.parts.split(",")]
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"--parts must be of {', '.join(PARTS)}; got {', '.join(unknown)}")
    arguments.parts = names
    own_file = arguments.output not in (None, RESULTS)
    if arguments.miniature and not own_file:
        parser.error("--miniature needs an --output of its own")
    return arguments


def report_to(path):
    "A function that keeps what has been found so far."

    def report(found):
        write_atomically(path, json.dumps(found))

    return report


def main(words=None):
    arguments = parse(words)
    if importlib.util.find_spec("trl") is None:
        sys.exit("error: TRL is not installed: pip install -e '.[bench]'")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        device = resolve_device(arguments.device)
        if device.type == "cpu":
            raise ValueError("there is no accelerator here")
        if not arguments.part:
            return print(run(arguments)["text"])
    except ValueError as error:
        sys.exit(f"error: {error}")
    report = report_to(arguments.output)
    measure_part(arguments.part, device, report, arguments.miniature)


if __name__ == "__main__":
    main()
