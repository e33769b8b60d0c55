"""Build the page that trains the policy: one file with everything in it.

    python tools/build_live.py [--output live.html] [--runs runs.json]

From a file:// page nothing can be fetched, so the scripts of tools/live/, jax-js
(tools/jax-js/), the weights of the policy in float16, the figure and the recorded runs
are written into it. No node is needed: `bundle` makes one script of modules."""

import argparse
import base64
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path(__file__).resolve().parent / "live"
JAX = Path(__file__).resolve().parent / "jax-js/jax.min.js"
RUNS = ROOT / "nbs/guides/live_runs.json"  # made by nbs/guides/live.ipynb
PAGE = "live.html"
SITE = "https://grpo-nb.github.io/grpo_nb/"

IMPORT = re.compile(r'^import \{([^}]*)\} from "([^"]+)";\n', re.M)
EXPORT = re.compile(r"^export (?=(?:async function|function|class|const) )", re.M)
NAME = re.compile(r"^export (?:async function|function|class|const) (\w+)", re.M)
SPREAD = re.compile(r"^export const \{([^}]*)\}", re.M)


def bundle(entry: Path) -> str:
    """Make one script of a module and all that it imports, each in a scope of its own.

    Enough for what tools/live/ uses: named imports of own files, exports where a name
    is declared."""
    done = {}

    def name_of(path: Path) -> str:
        return "module_" + re.sub(r"\W", "_", path.stem)

    def add(path: Path):
        if path in done:
            return
        done[path] = ""  # seen; a circle would find it empty
        text = path.read_text()
        for _, target in IMPORT.findall(text):
            add((path.parent / target).resolve())

        def take(m):
            names = " ".join(m[1].split()).rstrip(",")
            names = re.sub(r"(\w+) as (\w+)", r"\1: \2", names)
            return f"const {{ {names} }} = {name_of(Path(m[2]))};\n"

        exported = NAME.findall(text)
        for names in SPREAD.findall(text):
            exported += [name.split(":")[-1].strip() for name in names.split(",")]
        body = EXPORT.sub("", IMPORT.sub(take, text))
        gives = f"return {{ {', '.join(exported)} }};\n"
        del done[path]  # behind what it imports
        done[path] = f"const {name_of(path)} = (() => {{\n{body}{gives}}})();\n"

    add(entry.resolve())
    names = [name_of(path) for path in done]
    assert len(names) == len(set(names)), f"two modules have one name: {names}"
    return "".join(done.values())


def architecture() -> dict:
    "Read the embedded policy: its sizes, its characters, its weights in float16."
    import torch

    from grpo_nb.policy import load_policy

    policy, tokenizer = load_policy("tiny", "cpu")
    config = policy.config
    parameters = [x.detach() for x in policy.parameters()]
    halves = torch.cat([x.flatten() for x in parameters]).half().numpy()
    ids = range(config.vocab_size)
    return {
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "width": config.hidden_size,
        "eps": config.rms_norm_eps,
        "theta": config.rope_parameters["rope_theta"],
        "vocabulary": [tokenizer.convert_ids_to_tokens(i) for i in ids],
        "shapes": [list(x.shape) for x in parameters],
        "weights": base64.b64encode(halves.tobytes()).decode(),
    }


def figures() -> dict:
    "Draw both halves of the figure, and say where their boxes stand."
    from grpo_nb.figure import boxes, draw_figure

    drawn = {}
    for half in ("grpo", "ppo"):
        places = {}
        for box in boxes(half):
            place = {"x": box.x, "y": box.y, "w": box.w, "h": box.h}
            chapter = box.chapter.partition("_")[2]
            places[box.name] = place | {"kind": box.kind, "chapter": chapter}
        svg = str(draw_figure(half, link="figure/{}.html"))
        drawn[half] = {"svg": svg, "boxes": places}
    return drawn


def theme() -> str:
    "Take the colours of the site's own style sheet, for both themes."
    css = (ROOT / "nbs/styles.css").read_text()
    start, end = css.index(":root {"), css.index("body { font-family")
    return css[start:end]


def as_script(value) -> str:
    "Write a value so that it can stand in a script element."
    if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return value.replace("</", "<\\/").replace("<!--", "<\\!--")


def page(runs: list | None = None) -> str:
    """Write the page.

    `runs`: recorded runs to show under Replay, as `record` in nbs/guides/live.ipynb
    makes them; None: those that are committed. A page with other runs does not stand
    on the site, so its links lead there."""
    base = ""
    if runs is None:
        runs = json.loads(RUNS.read_text()) if RUNS.exists() else []
    else:
        base = f'<base href="{SITE}" target="_blank">'
    parts = {
        "base": base,
        "style": theme() + (SOURCE / "page/style.css").read_text(),
        "policy": as_script(architecture()),
        "figures": as_script(figures()),
        "runs": as_script(runs),
        "worker": as_script(JAX.read_text() + bundle(SOURCE / "worker/main.js")),
        "script": as_script(bundle(SOURCE / "page/main.js")),
    }
    template = (SOURCE / "page/page.html").read_text()
    return re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], template)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the page that trains.")
    parser.add_argument("--output", type=Path, default=Path(PAGE))
    parser.add_argument("--runs", type=Path, help="recorded runs (default: committed)")
    args = parser.parse_args()
    runs = json.loads(args.runs.read_text()) if args.runs else None
    text = page(runs)
    args.output.write_text(text)
    print(f"{args.output}: {len(text.encode()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
