"""Check that what is generated agrees with the notebooks, without changing anything:
exit 1 and say what to run if not.

In a temporary copy, the library is exported anew and the notebooks are cleaned; both
must give what is there already."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPORT = """
from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbdev_export
from nbdev.quarto import refresh_quarto_yml
nbdev_export.__wrapped__(); nbdev_clean.__wrapped__(); refresh_quarto_yml()
"""


def files(root: Path) -> dict[str, bytes]:
    "Exported modules, notebooks and nbdev's configuration under `root`."
    found = [
        *root.glob("grpo_nb/**/*.py"),
        *root.glob("nbs/**/*.ipynb"),
        root / "nbs/nbdev.yml",
    ]
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in found
        if not any(part.startswith(".") for part in p.relative_to(root).parts)
    }


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="grpo_nb_sync_") as work:
        copy = Path(work).resolve()
        shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".*"))
        shutil.copy(ROOT / "settings.ini", copy)
        (copy / "grpo_nb").mkdir()
        subprocess.run([sys.executable, "-c", EXPORT], cwd=copy, check=True)
        there, fresh = files(ROOT), files(copy)
    differ = sorted(
        name
        for name in there.keys() | fresh.keys()
        if there.get(name) != fresh.get(name)
    )
    if differ:
        sys.exit("not what `make export` gives: " + ", ".join(differ))
    private = sorted(
        name for name, data in there.items() if f"{ROOT}/".encode() in data
    )
    if private:
        sys.exit(f"outputs hold a path of this machine ({ROOT}): " + ", ".join(private))
    print(f"{len(fresh)} files in sync: modules are exported, notebooks are clean")


if __name__ == "__main__":
    main()
