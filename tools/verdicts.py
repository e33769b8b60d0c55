"""Decide every claim again, from the tables in benchmarks/claims/; nothing is trained.

python tools/verdicts.py            # write what became of each into its JSON file
python tools/verdicts.py --check    # exit 1 where that is not what its file says
python tools/verdicts.py 02_explore 07_stability    # only these

The cells of a claim's notebook run one after another in this process."""

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = Path("nbs/experiments/claims")
RESULTS = Path("benchmarks/claims")


def code_cells(page: Path) -> list[str]:
    "The code of a notebook, cell by cell."
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run(page: Path) -> None:
    "Run the cells of a notebook in a namespace of their own, without their output."
    from IPython.core.interactiveshell import InteractiveShell
    from matplotlib import pyplot

    shell = InteractiveShell()
    with contextlib.redirect_stdout(io.StringIO()):
        for source in code_cells(page):
            shell.run_cell(source, silent=True).raise_error()
    pyplot.close("all")


def decided(names: list[str], root: Path) -> dict[str, dict]:
    "What the tables under this root say of each claim; its files are written there."
    folder = root / PAGES
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # a claim looks for its tables from where it runs
    found = {}
    for name in names:
        run(ROOT / PAGES / f"{name}.ipynb")
        found[name] = json.loads((root / RESULTS / f"{name}.json").read_text())
        print(f"{name}: {found[name]['verdict']}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("claims", nargs="*")
    options = parser.parse_args()
    pages = sorted((ROOT / PAGES).glob("*.ipynb"))
    everything = [
        page.stem for page in pages if "claim.conclude(" in "".join(code_cells(page))
    ]
    names = options.claims or everything
    os.environ["MPLBACKEND"] = "agg"
    if not options.check:
        decided(names, ROOT)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(ROOT / RESULTS, Path(scratch) / RESULTS)
        found = decided(names, Path(scratch))
        os.chdir(ROOT)  # the scratch folder goes
    kept = {
        name: json.loads((ROOT / RESULTS / f"{name}.json").read_text())
        for name in names
    }
    other = [name for name in names if kept[name] != found[name]]
    for name in other:
        print(f"{name}: kept is another conclusion: make verdicts", file=sys.stderr)
    return 1 if other else 0


if __name__ == "__main__":
    sys.exit(main())
