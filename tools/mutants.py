"""Put each known bug into a copy of the library and see its test fail: `make
mutants`.

The bugs are in tests/mutants/mutants.toml. A mutant is killed when its test fails by
an assertion; one whose test passes has survived; anything else (a crash, an import
error, no end) is broken, since it says nothing about the test. torch is imported
once, and each mutant runs in a forked child (Linux, macOS) over its own copy of the
library and tests.

With --random mutants are drawn that nobody chose (tools/random_mutants.py). Such a
one is killed when any test of those that run its statement fails, by whatever error,
or has no end; survivors are told with their diff. That is a report, not a gate: the
exit status is 0 unless something is broken."""

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import random_mutants
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
TRACING = 3600  # the same, of all the tests that are traced
ANY = "any error"  # kills a random mutant
VERDICTS = ("killed", "survived", "broken")


def mutants() -> list[dict]:
    "What mutants.toml says."
    return tomllib.loads((ROOT / "tests/mutants/mutants.toml").read_text())["mutant"]


def problems(chosen: list[dict]) -> list[str]:
    """Where the list and the repository have drifted apart: `find` must occur
    exactly once, and the test must exist."""
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
        self.error = call.excinfo.typename
        self.text = " ".join(call.excinfo.exconly().split())


def verdict(code: int, error: str, raises: str | None) -> str:
    "What pytest's exit status and the error of the test that failed say of a mutant."
    if code == 0:
        return "survived"
    if raises == ANY and code in (1, 2, 4):  # 4: conftest.py cannot be imported
        return "killed"
    if code == 1 and error in ("AssertionError", "Failed", raises):
        return "killed"
    return "broken"


def run_tests(copy: Path, arguments: list[str], raises: str | None, plugins: list):
    "In a child: the tests over this copy; leaves a verdict, its reason and a log."
    log = os.open(f"{copy}.log", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)  # for the tests that start a process
    sys.path.insert(0, str(copy))
    import pytest

    reason = Reason()
    code = pytest.main(
        ["-q", "-p", "no:cacheprovider", *arguments], plugins=[reason, *plugins]
    )
    library = sys.modules.get("grpo_nb")
    if library is not None and not library.__file__.startswith(str(copy)):
        code, reason.text = -1, "another grpo_nb was imported"
    Path(f"{copy}.verdict").write_text(
        f"{verdict(code, reason.error, raises)}\n"
        f"{reason.text or f'exit status {code} of pytest'}"
    )


def start(
    copy: Path,
    arguments: list[str],
    raises: str | None = None,
    plugins: list = (),
    seconds: int = SECONDS,
) -> int:
    "Fork a child that runs the tests; its process id."
    Path(f"{copy}.verdict").write_text(
        f"{'killed' if raises == ANY else 'broken'}\n"
        f"it crashed, or had no end within {seconds} s"
    )  # unless the child says otherwise
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    try:
        signal.alarm(seconds)  # ends the child, and with it what hangs
        run_tests(copy, arguments, raises, plugins)
    finally:
        os._exit(0)  # nothing of the parent's runs on in the child


def copy_library(work: Path) -> Path:
    "The library and its tests, to be changed; what else the tests read, as links."
    plain = work / "plain"
    own = ("grpo_nb", "tests")
    for part in own:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, plain / part, ignore=ignored)
    for path in ROOT.iterdir():
        if path.name not in (*own, "runs") and not path.name.startswith("."):
            (plain / path.name).symlink_to(path)
    return plain


def check_plain(plain: Path, pid: int) -> None:
    "End here if the tests do not pass without a bug."
    os.waitpid(pid, 0)
    was, why = Path(f"{plain}.verdict").read_text().split("\n", 1)
    if was != "survived":
        sys.exit(
            f"{Path(f'{plain}.log').read_text()}\n"
            f"the tests must pass without a bug first, and do not: {why}"
        )


def run(chosen: list, plain: Path, jobs: int, begin) -> list[tuple]:
    "(mutant, verdict, reason, seconds) of each; `begin(mutant, copy)` starts a child."
    waiting, running, results = list(enumerate(chosen)), {}, []
    with tqdm(total=len(chosen), desc="mutants", unit="", disable=None) as bar:
        while waiting or running:
            while waiting and len(running) < jobs:
                i, mutant = waiting.pop(0)
                copy = shutil.copytree(plain, plain.parent / f"{i}", symlinks=True)
                running[begin(mutant, copy)] = (i, mutant, copy, time.monotonic())
            i, mutant, copy, began = running.pop(os.wait()[0])
            told = Path(f"{copy}.verdict").read_text().split("\n", 1)
            results.append((i, mutant, *told, time.monotonic() - began))
            shutil.rmtree(copy)
            bar.update()
    return [result[1:] for result in sorted(results, key=lambda result: result[0])]


def run_known(chosen: list[dict], work: Path, jobs: int) -> list[tuple]:
    "The mutants of mutants.toml, each with its test."
    plain = copy_library(work)
    tests = sorted({mutant["test"] for mutant in chosen})
    check_plain(plain, start(plain, ["-x", *tests]))

    def begin(mutant: dict, copy: Path) -> int:
        path = copy / mutant["file"]
        path.write_text(path.read_text().replace(mutant["find"], mutant["replace"]))
        return start(copy, ["-x", mutant["test"]], mutant.get("raises"))

    return run(chosen, plain, jobs, begin)


def run_random(
    chosen: list[random_mutants.Mutant],
    tests: list[str],
    work: Path,
    jobs: int,
    seconds: float,
) -> list[tuple]:
    "Drawn mutants, each with the tests that run its statement: those are traced first."
    plain = copy_library(work)
    tracer = random_mutants.Trace(plain)
    check_plain(plain, start(plain, tests, plugins=[tracer], seconds=TRACING))
    trace = json.loads(tracer.file.read_text())

    def begin(mutant: random_mutants.Mutant, copy: Path) -> int:
        (copy / mutant.file).write_text(mutant.new)
        near = random_mutants.tests_for(mutant, trace, seconds)
        files = sorted({test.partition("::")[0] for test in near})
        limit = int(60 + 5 * seconds)
        order = [random_mutants.Chosen(near)]
        return start(copy, ["-x", *files], ANY, order, limit)

    return run(chosen, plain, jobs, begin)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__,
        prog="mutants.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--only", nargs="+", metavar="NAME", help="these known ones, by name")
    add("--sample", type=int, metavar="N", help="N of the known ones, drawn by --seed")
    add("--random", type=int, metavar="N", help="N that nobody chose, drawn by --seed")
    add("--seed", type=int, default=0)
    add("--jobs", type=int, default=1, help="how many at a time")
    add("--list", action="store_true", help="show them, run nothing")
    add("--check", action="store_true", help="only see that each known one still fits")
    drawn = result.add_argument_group("with --random")
    drawn.add_argument(
        "--modules",
        nargs="+",
        metavar="NAME",
        choices=sorted(
            str(path.relative_to(ROOT / "grpo_nb").with_suffix("")).replace("/", ".")
            for path in (ROOT / "grpo_nb").rglob("[!_]*.py")
        ),
        default=random_mutants.MODULES,
        help="draw from these (default: boxes of the figure, as listed there)",
    )
    drawn.add_argument(
        "--tests",
        nargs="+",
        metavar="FILE",
        default=[f"tests/{name}.py" for name in random_mutants.TESTS],
        help="files of tests to choose from (default: the quick ones)",
    )
    drawn.add_argument(
        "--seconds",
        type=float,
        default=60,
        help="how long a mutant's tests may take without it (default: 60)",
    )
    return result


def choose(options: argparse.Namespace) -> list[dict]:
    "The known mutants that the options ask for."
    chosen = mutants()
    names = {mutant["name"] for mutant in chosen}
    if unknown := sorted(set(options.only or []) - names):
        sys.exit(f"no such mutant: {', '.join(unknown)}")
    if options.only:
        chosen = [mutant for mutant in chosen if mutant["name"] in options.only]
    if options.sample:
        n = min(options.sample, len(chosen))
        sample = random.Random(options.seed).sample(chosen, n)
        chosen = sorted(sample, key=chosen.index)
    return chosen


def prepare() -> None:
    "What every child inherits: the environment, and packages that take long to import."
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "agg",
        # seconds of each child, and none is used
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    for name in PRELOADED:
        importlib.import_module(name)


def summary(results: list[tuple], began: float) -> dict[str, int]:
    "Count the verdicts, and print them."
    counts = {was: sum(r[1] == was for r in results) for was in VERDICTS}
    told = ", ".join(f"{n} {was}" for was, n in counts.items())
    seconds = time.monotonic() - began
    print(f"{len(results)} mutants in {seconds:.0f} s: {told}")
    return counts


def main_known(options: argparse.Namespace) -> None:
    chosen = choose(options)
    if options.list:
        for mutant in chosen:
            bug = mutant["bug"] or "–"
            print(f"{bug:>2}  {mutant['name']:50} {mutant['title']}")
        return
    if found := problems(chosen):
        sys.exit("\n".join(found))
    if options.check:
        print(f"{len(chosen)} mutants fit: each `find` occurs once, each test exists")
        return
    began = time.monotonic()
    prepare()
    with tempfile.TemporaryDirectory(prefix="grpo_nb_mutants_") as work:
        results = run_known(chosen, Path(work).resolve(), options.jobs)
    for mutant, was, why, seconds in results:
        bug = mutant["bug"] or "–"
        print(f"{was:8} {bug:>2}  {mutant['name']:50} {seconds:4.1f} s  {why[:110]}")
    counts = summary(results, began)
    sys.exit(counts["killed"] < len(results))


def main_random(options: argparse.Namespace) -> None:
    chosen = random_mutants.draw(ROOT, options.modules, options.random, options.seed)
    if options.list:
        for mutant in chosen:
            print(f"{mutant.operator}\n{mutant.diff()}")
        return
    began = time.monotonic()
    prepare()
    with tempfile.TemporaryDirectory(prefix="grpo_nb_mutants_") as work:
        results = run_random(
            chosen, options.tests, Path(work).resolve(), options.jobs, options.seconds
        )
    for mutant, was, why, seconds in results:
        place = f"{mutant.file}:{mutant.line}"
        print(f"{was:8} {mutant.operator:17} {place:28} {seconds:4.1f} s  {why[:110]}")
    for mutant, was, _, _ in results:
        if was != "killed":
            print(f"\n{was}: {mutant.operator}\n{mutant.diff()}", end="")
    counts = summary(results, began)
    sys.exit(counts["broken"] > 0)


def main() -> None:
    options = parser().parse_args()
    if options.random:
        main_random(options)
    else:
        main_known(options)


if __name__ == "__main__":
    main()
