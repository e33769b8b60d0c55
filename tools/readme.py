"""Write README.md from nbs/index.ipynb.

python tools/readme.py            # write python tools/readme.py --check    # exit 1
if README.md is not what the notebook gives

Pictures that the notebook's cells show are written to nbs/images/index-N.svg (or
.png) and referred to from there."""

import argparse
import base64
import json
import posixpath
import re
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK, README, IMAGES = (
    ROOT / "nbs/index.ipynb",
    ROOT / "README.md",
    ROOT / "nbs/images",
)
HEADER = (
    "<!-- Generated from nbs/index.ipynb by tools/readme.py: edit the notebook, not "
    "this file. -->\n\n"
)
ALERTS = {
    "note": "NOTE",
    "tip": "TIP",
    "important": "IMPORTANT",
    "warning": "WARNING",
    "caution": "CAUTION",
}


def text(value) -> str:
    "Notebook text, which may be stored as lines."
    return "".join(value) if isinstance(value, list) else value


def link(url: str, repository: str) -> str:
    """A link of the notebook as one of README.md: relative to the root of the
    repository."""
    url = url.removeprefix(repository)
    if url.startswith("#") or re.match(r"[a-z]+:", url):
        return url
    path, hash_, anchor = url.partition("#")
    for candidate in (posixpath.normpath(posixpath.join("nbs", path)), path):
        if (ROOT / candidate).exists():
            return candidate + hash_ + anchor
    sys.exit(f"{NOTEBOOK.name}: the link {url} leads nowhere")


def prose(source: str, repository: str) -> str:
    "A Markdown cell without what only the documentation site understands."
    lines, callout = [], None
    for line in source.splitlines():
        if m := re.match(r":{3,} *\{(.*)\}", line):
            if kind := re.search(r"\.callout-(\w+)", m[1]):
                callout, title = True, re.search(r'title="([^"]*)"', m[1])
                lines += [f"> [!{ALERTS[kind[1]]}]"] + (
                    [f"> **{title[1]}**", ">"] if title else []
                )
        elif re.match(r":{3,} *$", line):
            callout = None
        else:
            lines.append(f"> {line}".rstrip() if callout else line)
    source = "\n".join(lines)
    attributes = re.compile(
        r"(?<=[)$`\w]) *\{[#.][a-zA-Z][^}\n]*\}|(?<=\))\{[\w-]+=[^}\n]*\}"
    )  # {#eq-x}, {.class}, {target="_blank"}
    pieces = re.split(
        r"(```.*?```|`[^`\n]+`)", source, flags=re.S
    )  # every second piece is code: left as it is
    for n in range(0, len(pieces), 2):
        pieces[n] = attributes.sub("", pieces[n])
        pieces[n] = re.sub(
            r"(\]\(|(?:src|href)=\")([^)\"\s]+)",
            lambda m: m[1] + link(m[2], repository),
            pieces[n],
        )
    return "".join(pieces)


def title(source: str) -> str:
    "The first cell, without nbdev's `- key: value` front matter."
    return re.sub(r"\A(# .+\n*(?:> .+\n*)?)(?:- [\w-]+: .+(?:\n|$))+", r"\1", source)


def output(out: dict, options: dict, images: dict[str, bytes]) -> str:
    "One output of a cell; pictures are added to `images`."
    data = out.get("data", {})
    if "application/vnd.jupyter.widget-view+json" in data:
        return ""  # a progress bar
    for mime, suffix in [("image/svg+xml", "svg"), ("image/png", "png")]:
        if mime in data:
            name, picture = f"index-{len(images) + 1}.{suffix}", text(data[mime])
            images[name] = (
                (picture.strip() + "\n").encode()
                if suffix == "svg"
                else base64.b64decode(picture)
            )
            own_title = re.search(r"<title[^>]*>([^<]*)", picture)
            alt = (
                options.get("fig-alt")
                or options.get("fig-cap")
                or (own_title[1] if own_title else "")
            )
            return f"![{alt}]({IMAGES.relative_to(ROOT).as_posix()}/{name})"
    if "text/markdown" in data:
        return prose(text(data["text/markdown"]), "").strip()
    plain = (
        text(out["text"])
        if out.get("name") == "stdout"
        else text(data.get("text/plain", ""))
    )
    return f"```text\n{plain.rstrip()}\n```" if plain.strip() else ""


def joined_options(source: str) -> str:
    """A directive on one line, as nbdev reads it: what begins with `#|   ` goes on with
    the line above."""
    return re.sub(r"(?<=.)\n#\|   +", " ", source)


def code(cell: dict, images: dict[str, bytes]) -> list[str]:
    "A code cell and its outputs, as far as its directives let them be seen."
    source = joined_options(text(cell["source"]))
    directives = re.findall(r"^#\| *([\w-]+):? *(.*)$", source, re.M)
    options = {key: value.strip().strip("\"'") for key, value in directives}
    if (
        options.keys() & {"hide", "export", "exporti", "default_exp"}
        or options.get("include") == "false"
    ):
        return []
    source = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
    language = "bash" if re.match(r"%%(bash|sh)\b|!", source) else "python"
    source = re.sub(r"^(%%\w+.*\n|!)", "", source, flags=re.M)
    parts = (
        [f"```{language}\n{source}\n```"]
        if source and options.get("echo") != "false"
        else []
    )
    if options.get("output") != "false":
        parts += [output(out, options, images) for out in cell["outputs"]]
    return parts


def convert() -> tuple[str, dict[str, bytes]]:
    "README.md and its pictures."
    config = ConfigParser(delimiters="=")
    config.read(ROOT / "settings.ini", encoding="utf-8")
    settings = config["DEFAULT"]
    repository = f"{settings['git_url']}/blob/{settings['branch']}/"
    parts, images = [], {}
    cells = [
        cell
        for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] != "raw"
    ]
    for n, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            parts += code(cell, images)
        else:
            parts.append(
                prose(
                    title(text(cell["source"])) if n == 0 else text(cell["source"]),
                    repository,
                )
            )
    return HEADER + "\n\n".join(
        part.strip() for part in parts if part.strip()
    ) + "\n", images


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write README.md from nbs/index.ipynb."
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit 1 if something would change",
    )
    args = parser.parse_args()
    readme, images = convert()
    wanted = {
        README: readme.encode(),
        **{IMAGES / name: data for name, data in images.items()},
    }
    stale = [
        path
        for path, data in wanted.items()
        if not path.exists() or path.read_bytes() != data
    ]
    orphans = [path for path in IMAGES.glob("index-*") if path not in wanted]
    if args.check and stale + orphans:
        sys.exit(
            "not what nbs/index.ipynb gives: "
            + ", ".join(str(p.relative_to(ROOT)) for p in stale + orphans)
            + " (run `make export`)"
        )
    if not args.check:
        IMAGES.mkdir(exist_ok=True)
        for path in stale:
            path.write_bytes(wanted[path])
        for path in orphans:
            path.unlink()
    print(
        f"{README.name}: {'in sync' if not stale else 'written'}, {len(images)} "
        "pictures"
    )


if __name__ == "__main__":
    main()
