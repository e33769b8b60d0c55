"""Train as `make run` does: the main notebook with papermill, saved in the directory
of its run.

python tools/run.py                                    into the next free runs/NNNN
python tools/run.py -p algorithm ppo -p output_dir X   into X, a path from where this
is called

Any option of papermill may be given. Where the run goes is asked of papermill, which
merges all ways to give parameters (-b, -f, -y, -p, -r) before it runs anything."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

NOTEBOOK = Path(__file__).resolve().parent.parent / "nbs/experiments/train.ipynb"


def papermill(output, arguments):
    "Call papermill on the main notebook; its exit status."
    command = [sys.executable, "-m", "papermill", "-k", "python3", *arguments]
    return subprocess.run([*command, str(NOTEBOOK), str(output)]).returncode


def parameters(arguments):
    "The parameters that papermill reads; ends with its status where it reads none."
    quiet = ["--prepare-only", "--no-progress-bar", "--log-level", "ERROR"]
    with tempfile.TemporaryDirectory() as scratch:
        prepared = Path(scratch) / "prepared.ipynb"
        status = papermill(prepared, [*arguments, *quiet])
        if status or not prepared.exists():
            sys.exit(status)
        return json.loads(prepared.read_text())["metadata"]["papermill"]["parameters"]


def next_directory(parent=Path("runs")):
    """Make the next free runs/NNNN; of several that are started at once, each gets
    its own."""
    parent.mkdir(exist_ok=True)
    names = [path.name for path in parent.glob("[0-9]*")]
    number = max([int(name) for name in names if name.isdecimal()], default=0) + 1
    while True:
        try:
            (parent / f"{number:04d}").mkdir()
            return parent / f"{number:04d}"
        except FileExistsError:
            number += 1


def working_directory(arguments):
    "Where the notebook runs, and paths begin: --cwd, or here."
    for text, value in zip(arguments, [*arguments[1:], ""]):
        if text == "--cwd":
            return Path(value)
        if text.startswith("--cwd="):
            return Path(text.removeprefix("--cwd="))
    return Path()


def main(arguments):
    "Run the notebook, and show what it left."
    given = parameters(arguments)
    if given.get("output_dir") is None:
        run = next_directory()
        elsewhere = working_directory(arguments) != Path()
        output_dir = run.resolve() if elsewhere else run
        arguments = [*arguments, "-p", "output_dir", str(output_dir)]
    else:
        output_dir = os.path.expanduser(str(given["output_dir"]))
        run = working_directory(arguments) / output_dir
        if (run / "config.json").exists() and given.get("resume") is not True:
            sys.exit(
                f"error: output_dir {str(run)!r} already holds a run; "
                "give another one, or -p resume True to go on with it"
            )
        run.mkdir(parents=True, exist_ok=True)
    print(f"run: {run}/train.ipynb", flush=True)
    status = papermill(run / "train.ipynb", ["--progress-bar", *arguments])
    if status:
        sys.exit(status)
    if (run / "summary.txt").exists():
        print(f"\n{(run / 'summary.txt').read_text()}")
    print(f"in {run}:", *sorted(path.name for path in run.iterdir()))


if __name__ == "__main__":
    main(sys.argv[1:])
