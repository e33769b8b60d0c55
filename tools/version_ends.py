"""Either end of the ranges in settings.ini, for `make test-oldest` and `make
test-newest`.

`version_ends.py lowest test,peft` prints a constraint of pip for each requirement of
the library and of these extras: the lowest version that its range allows.
`installed` prints those versions that the Python which runs it has."""

import re
import sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SETTINGS = Path(__file__).resolve().parent.parent / "settings.ini"


def requirements(extras: list[str]) -> list[str]:
    "What settings.ini wants for the library and these extras, each once."
    config = ConfigParser(delimiters="=")
    config.read(SETTINGS, encoding="utf-8")
    keys = ["requirements", *(f"extras_{extra}" for extra in extras)]
    lines = (config["DEFAULT"][key] for key in keys)
    return list(dict.fromkeys(" ".join(lines).split()))


def name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0]


def lowest(requirement: str) -> str:
    "As a constraint; `ValueError`: a range without a lower end."
    found = re.search(r"(?:>=|==)([\w.]+)", requirement)
    if found is None:
        raise ValueError(f"{requirement} has no lower end in settings.ini")
    return f"{name(requirement)}=={found[1]}"


def installed(requirement: str) -> str:
    try:
        return f"{name(requirement)} {version(name(requirement))}"
    except PackageNotFoundError:
        return f"{name(requirement)} is not installed"


def main(what: str, extras: str) -> None:
    shown = {"lowest": lowest, "installed": installed}[what]
    lines = dict.fromkeys(map(shown, requirements(extras.split(","))))
    print(*lines, sep=", " if what == "installed" else "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
