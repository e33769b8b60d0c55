"""Collapse in JupyterLab the cells whose code the site hides or folds.

python tools/collapse.py          # write
python tools/collapse.py --check  # exit 1 if a notebook is not as this gives it

Such a cell only sets up a picture: `#| echo: false` or `#| code-fold: true`. JupyterLab
shows a bar in place of its code, which a click opens."""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVES = {"#| echo: false", "#| code-fold: true"}


def notebooks() -> list[Path]:
    "All notebooks but JupyterLab's own copies."
    found = sorted((ROOT / "nbs").rglob("*.ipynb"))
    return [path for path in found if ".ipynb_checkpoints" not in path.parts]


def collapse(notebook: dict) -> dict:
    "Set the metadata of each code cell by its directives; return the notebook."
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        cell["metadata"].pop("jupyter", None)
        if DIRECTIVES & set("".join(cell["source"]).splitlines()):
            cell["metadata"]["jupyter"] = {"source_hidden": True}
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    differ = []
    for path in notebooks():
        text = path.read_text(encoding="utf-8")
        collapsed = collapse(json.loads(text))
        written = json.dumps(collapsed, indent=1, ensure_ascii=False, sort_keys=True)
        if written + "\n" == text:
            continue
        differ.append(path.relative_to(ROOT).as_posix())
        if not check:
            path.write_text(written + "\n", encoding="utf-8")
    if check and differ:
        sys.exit("not what `make export` gives: " + ", ".join(differ))
    print(f"{len(differ)} notebooks changed" if not check else "cells are collapsed")


if __name__ == "__main__":
    main()
