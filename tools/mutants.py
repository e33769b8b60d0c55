"""Put each known bug into a copy of the library and see that the test which is there for it fails: `make mutants`.

The bugs are in tests/mutants/mutants.toml. A mutant is killed when its test fails by an assertion; one whose test passes has
survived; anything else (a crash, an import error, no end) is broken, since it says nothing about the test. torch is imported
once, and each mutant runs in a forked child (Linux, macOS) over its own copy of the library and the tests."""

import argparse
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = (
    "hypothesis",
    "pandas",
    "pydantic",
    "pytest",
    "torch",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)
SECONDS = 300  # before a run of tests is stopped; a mutant takes a few


def mutants() -> list[dict]:
    "What mutants.toml says."
    return tomllib.loads((ROOT / "tests/mutants/mutants.toml").read_text())["mutant"]


def problems(chosen: list[dict]) -> list[str]:
    "Where the list and the repository have drifted apart: `find` must occur exactly once, and the test must exist."
    found = []
    for mutant in chosen:
        file, (test, _, function) = (
            ROOT / mutant["file"],
            mutant["test"].partition("::"),
        )
        times = file.read_text().count(mutant["find"]) if file.exists() else 0
        if times != 1:
            found.append(
                f"{mutant['name']}: `find` occurs {times} times in {mutant['file']}"
            )
        source = (ROOT / test).read_text() if (ROOT / test).exists() else ""
        if f"\ndef {function.partition('[')[0]}(" not in source:
            found.append(f"{mutant['name']}: there is no {mutant['test']}")
    return found


class Reason:
    "A plugin of pytest: why the test failed."

    error = text = ""

    def pytest_exception_interact(self, call, report):
        self.error, self.text = (
            call.excinfo.typename,
            " ".join(call.excinfo.exconly().split()),
        )


def run_tests(copy: Path, tests: list[str], raises: str | None):
    "In a child: the tests over this copy; leaves a verdict and its reason beside it, and all output in a log."
    signal.alarm(SECONDS)  # ends the child, and with it what hangs
    log = os.open(f"{copy}.log", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)  # for the tests that start a process
    sys.path.insert(0, str(copy))
    import pytest

    reason = Reason()
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], plugins=[reason])
    if not sys.modules["grpo_nb"].__file__.startswith(str(copy)):
        code, reason.text = -1, "another grpo_nb was imported"
    verdict = (
        "survived"
        if code == 0
        else "killed"
        if code == 1 and reason.error in ("AssertionError", "Failed", raises)
        else "broken"
    )
    Path(f"{copy}.verdict").write_text(
        f"{verdict}\n{reason.text or f'exit status {code} of pytest'}"
    )


def start(copy: Path, tests: list[str], raises: str | None = None) -> int:
    "Fork a child that runs the tests; its process id."
    Path(f"{copy}.verdict").write_text(
        f"broken\nit crashed, or had no end within {SECONDS} s"
    )  # unless the child says otherwise
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    try:
        run_tests(copy, tests, raises)
    finally:
        os._exit(0)  # nothing of the parent's runs on in the child


def run(
    chosen: list[dict], work: Path, jobs: int
) -> list[tuple[dict, str, str, float]]:
    "(mutant, verdict, reason, seconds) of each; the unchanged copy must pass all their tests first."
    plain = work / "plain"
    for part in ("grpo_nb", "tests"):
        shutil.copytree(
            ROOT / part, plain / part, ignore=shutil.ignore_patterns("__pycache__")
        )
    os.waitpid(start(plain, sorted({mutant["test"] for mutant in chosen})), 0)
    was, why = Path(f"{plain}.verdict").read_text().split("\n", 1)
    if was != "survived":
        sys.exit(
            f"{Path(f'{plain}.log').read_text()}\nthe tests must pass without a bug first, and do not: {why}"
        )
    waiting, running, results = list(chosen), {}, []
    with tqdm(total=len(chosen), desc="mutants", unit="", disable=None) as bar:
        while waiting or running:
            while waiting and len(running) < jobs:
                mutant = waiting.pop(0)
                copy = shutil.copytree(plain, work / mutant["name"])
                path = copy / mutant["file"]
                path.write_text(
                    path.read_text().replace(mutant["find"], mutant["replace"])
                )
                running[start(copy, [mutant["test"]], mutant.get("raises"))] = (
                    mutant,
                    copy,
                    time.monotonic(),
                )
            mutant, copy, began = running.pop(os.wait()[0])
            results.append(
                (
                    mutant,
                    *Path(f"{copy}.verdict").read_text().split("\n", 1),
                    time.monotonic() - began,
                )
            )
            shutil.rmtree(copy)
            bar.update()
    return sorted(results, key=lambda result: chosen.index(result[0]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], prog="mutants.py"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="these mutants, by name"
    )
    parser.add_argument(
        "--sample", type=int, metavar="N", help="N of them, drawn by --seed"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--list", action="store_true", help="show them, run nothing")
    parser.add_argument(
        "--check",
        action="store_true",
        help="only see that each still fits the library and the tests",
    )
    options = parser.parse_args()
    chosen = mutants()
    if unknown := sorted(
        set(options.only or []) - {mutant["name"] for mutant in chosen}
    ):
        sys.exit(f"no such mutant: {', '.join(unknown)}")
    if options.only:
        chosen = [mutant for mutant in chosen if mutant["name"] in options.only]
    if options.sample:
        chosen = sorted(
            random.Random(options.seed).sample(
                chosen, min(options.sample, len(chosen))
            ),
            key=chosen.index,
        )
    if options.list:
        return print(
            *(
                f"{mutant['bug'] or '–':>2}  {mutant['name']:50} {mutant['title']}"
                for mutant in chosen
            ),
            sep="\n",
        )
    if found := problems(chosen):
        sys.exit("\n".join(found))
    if options.check:
        return print(
            f"{len(chosen)} mutants fit: each `find` occurs once, each test exists"
        )
    began = time.monotonic()
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "agg",
    }
    for name in PRELOADED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="grpo_nb_mutants_") as work:
        results = run(chosen, Path(work).resolve(), options.jobs)
    for mutant, was, why, seconds in results:
        print(
            f"{was:8} {mutant['bug'] or '–':>2}  {mutant['name']:50} {seconds:4.1f} s  {why[:110]}"
        )
    counts = {
        was: sum(result[1] == was for result in results)
        for was in ("killed", "survived", "broken")
    }
    print(
        f"{len(results)} mutants in {time.monotonic() - began:.0f} s: "
        + ", ".join(f"{n} {was}" for was, n in counts.items())
    )
    sys.exit(counts["killed"] < len(results))


if __name__ == "__main__":
    main()
