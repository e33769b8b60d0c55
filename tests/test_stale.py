"""What is said about the code, in tables and texts, against the code: what has grown
old is named."""

import ast
import importlib
import inspect
import json
import re
import textwrap
import tomllib
from dataclasses import fields

import pandas as pd
import pytest
from transformers import LlamaConfig

from grpo_nb import algorithm, gae, group, models, reference, update, value
from grpo_nb.checks import alternatives
from grpo_nb.evidence.cost import flops, parameters
from grpo_nb.evidence.ledger import CHECKS
from grpo_nb.evidence.trl_oracles import TRL_ROWS
from grpo_nb.figure import boxes
from grpo_nb.group import BASELINES, SCALES
from grpo_nb.objective import AGGREGATES, LEVELS, OBJECTIVES
from grpo_nb.run import dynamic_sampling
from grpo_nb.run.options import (
    BOUNDS,
    RECIPES,
    Config,
    GRPOConfig,
    PPOConfig,
    make_config,
)
from helpers import ROOT

NBS = ROOT / "nbs"
WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
CHINESE = "零一二三四五六七八九十"


def cells(path):
    return json.loads((NBS / path).read_text())["cells"]


def sources(path, kind="code"):
    found = [cell for cell in cells(path) if cell["cell_type"] == kind]
    return ["".join(cell["source"]) for cell in found]


def printed(path):
    "What the saved outputs of a notebook show as text."
    lines = []
    for cell in cells(path):
        for output in cell.get("outputs", []):
            lines += output.get("text", []) + output.get("data", {}).get(
                "text/plain", []
            )
    return "".join(lines)


def test_a_chapter_is_called_by_its_number():
    "A link that says `chapter 21` leads to the notebook 21, a claim to its claim."
    link = r"\[[^\]]*?(?:chapter|claim) (\d+)[^\]]*\]\([^)]*?(\d\d)_\w+\.ipynb"
    wrong = []
    for path in sorted(NBS.rglob("*.ipynb")):
        text = "\n".join(sources(path.relative_to(NBS), "markdown"))
        for found in re.finditer(link, text, re.IGNORECASE):
            if int(found[1]) != int(found[2]):
                wrong.append(f"{path.name}: {found[0]}")
    assert not wrong


def test_every_recipe_has_its_row():
    "In the table of the options' chapter, and in the saved tables of the experiment."
    (table,) = [
        text
        for text in sources("2_run/20_options.ipynb", "markdown")
        if text.startswith("## Recipes")
    ]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(RECIPES)
    shown = printed("experiments/recipes.ipynb")
    for recipe in RECIPES:
        assert re.search(rf"^{recipe}\b", shown, re.MULTILINE), recipe


def test_numbers_of_recipes_in_words():
    "Wherever a text counts them: nine recipes, nine settings, 9 of 9."
    pages = [path for path in NBS.rglob("*.ipynb") if ".ipynb_" not in str(path)]
    texts = [ROOT / "README.md", *pages]
    number = "|".join(WORDS)
    found = []
    for path in texts:
        text = path.read_text()
        found += re.findall(rf"\b({number}) (?:named )?recipes\b", text, re.IGNORECASE)
        found += re.findall(rf"\b({number}) settings from \w+ papers", text)
        found += re.findall(r"\b\d+ of (\d+) recipes\b", text)
        found += re.findall(rf"([{CHINESE}]|\d+) ?[个种]配方", text)
    assert len(found) >= 4
    for word in found:
        n = word.lower()
        if n in WORDS:
            n = WORDS.index(n)
        elif n in CHINESE:
            n = CHINESE.index(n)
        assert int(n) == len(RECIPES), word


def test_numbers_of_papers_in_words():
    "Settings or recipes from so many papers: those of the table, by their addresses."
    (table,) = [
        text
        for text in sources("2_run/20_options.ipynb", "markdown")
        if text.startswith("## Recipes")
    ]
    papers = re.findall(r"^\| `\w+` \| \[[^]]*\]\(\S+/([\d.]+)\)", table, re.MULTILINE)
    found = []
    for path in ("index.ipynb", "experiments/recipes.ipynb"):
        for text in sources(path, "markdown"):
            found += re.findall(r"(?:settings|recipes) from (\w+) papers", text)
    assert len(found) >= 2
    assert {WORDS.index(word) for word in found} == {len(set(papers))}


def test_every_recipe_is_told_by_claim_8():
    "As one that it ran, or as one that it did not."
    text = "".join(map("".join, (c["source"] for c in cells(CLAIM_8))))
    for recipe in RECIPES:
        assert re.search(rf"[`\"]{recipe}[`\"]", text), recipe


CLAIM_8 = "experiments/claims/08_performance.ipynb"

NO_TRL = {  # choices without a row of TRL's, and why
    "batch_centred": "TRL's standard deviation of the batch is that of raw rewards",
    "leave_one_out": "GRPOTrainer has no baseline but the mean; TRL's RLOOTrainer has",
}
NO_MUTANT = {  # choices without a mutant of their own, and why
    "bnpo": "is dapo here, by the same line",
    "none": "leaves the scale out: what could be wrong in it is in `group`",
}
TABLES = {  # option: what it chooses from
    "objective": OBJECTIVES,
    "loss_type": AGGREGATES,
    "importance_sampling_level": LEVELS,
    "scale_rewards": SCALES,
    "baseline": BASELINES,
}
SHOWN = {  # choice of an option: its row in the ledger, TRL's, words of a mutant
    "objective": {
        "clip": ("clipped objective", "grpo, TRL", "the clip is inverted"),
        "cispo": ("CISPO", "cispo, TRL", "CISPO: the capped weight"),
        "sapo": ("SAPO", "sapo, TRL", "SAPO: the factor 4 / tau"),
    },
    "loss_type": {
        "grpo": ("grpo", "grpo, TRL", "GRPO averages over all tokens"),
        "bnpo": ("bnpo", "bnpo, TRL", None),
        "dapo": ("dapo", "dapo, TRL", "the token mean is a mean of the means"),
        "dr_grpo": ("dr_grpo", "dr_grpo, TRL", "Dr. GRPO divides by the longest"),
    },
    "importance_sampling_level": {
        "token": ("ratio", "grpo, TRL", "the ratio of a token that is far away"),
        "sequence": ("sequence ratio", "grpo, TRL", "GSPO without the length"),
        "sequence_token": ("sequence ratio on tokens", "grpo, TRL", "GSPO-token:"),
    },
    "scale_rewards": {
        "group": ("group advantage", "advantage, group, TRL", "(ddof 0)"),
        "batch": (
            "std of the batch",
            "advantage, batch, TRL",
            "the standard deviation of the batch",
        ),
        "batch_centred": ("std of the centred batch", None, "are not centred before"),
        "none": ("no std", "advantage, none, TRL", None),
    },
    "baseline": {
        "mean": ("group advantage", "advantage, group, TRL", "mean of the batch"),
        "leave_one_out": ("leave-one-out", None, "leave-one-out with n in place"),
    },
}


def test_every_option_with_a_table_is_shown():
    "Those of the configs that name their choices as a table of functions."
    every = [*fields(GRPOConfig), *fields(PPOConfig)]
    tables = {field.name: field.metadata.get("choices") for field in every}
    assert {name for name, table in tables.items() if isinstance(table, dict)} == {
        *SHOWN
    }


@pytest.mark.parametrize("option", SHOWN)
def test_every_choice_has_a_row_an_oracle_and_a_mutant(option):
    "Or a reason why it has none: a new choice is not forgotten."
    assert TABLES[option].keys() == SHOWN[option].keys(), "each choice needs a line"
    allowed = f"must be {alternatives(TABLES[option])}"
    with pytest.raises(ValueError, match=f"{re.escape(allowed)}$"):
        make_config(**{option: "?"})
    names = [check.name for check in CHECKS]
    theirs = [check.name for check in TRL_ROWS]
    mutants = tomllib.loads((ROOT / "tests/mutants/mutants.toml").read_text())
    titles = [mutant["title"] for mutant in mutants["mutant"]]
    for choice, (row, trl, bug) in SHOWN[option].items():
        assert row in names
        assert (trl is None) == (choice in NO_TRL) and (trl is None or trl in theirs)
        assert (bug is None) == (choice in NO_MUTANT), choice
        assert bug is None or any(bug in title for title in titles), choice


CHAPTERS = {  # that name every choice of an option but its default
    "objective": "1_figure/10_objective.ipynb",
    "loss_type": "1_figure/10_objective.ipynb",
    "importance_sampling_level": "1_figure/10_objective.ipynb",
    "scale_rewards": "1_figure/09_group.ipynb",
    "baseline": "1_figure/09_group.ipynb",
}
TESTED = {  # files that try each choice of an option but its default
    "objective": [
        "test_equations.py",
        "test_properties.py",
        "test_fuzz.py",
        "test_trl.py",
        "worker.py",
    ],
    "scale_rewards": ["helpers.py", "test_equations.py", "test_rounding.py"],
}


@pytest.mark.parametrize("option", SHOWN)
def test_every_choice_is_in_its_chapter_and_in_the_tests(option):
    "By its name, in quotes: in prose, and in each file that has a list of choices."
    prose = "".join(sources(CHAPTERS[option], "markdown"))
    places = {CHAPTERS[option]: prose}
    for file in TESTED.get(option, []):
        places[file] = (ROOT / "tests" / file).read_text()
    if option == "objective":
        places["12_update"] = "".join(sources("1_figure/12_update.ipynb"))
    default = getattr(make_config(), option)
    for choice in TABLES[option].keys() - {default}:
        for place, text in places.items():
            if choice == "none" and place != CHAPTERS[option]:
                continue  # what could be wrong in it is in `group`
            assert f'"{choice}"' in text, (place, choice)


def test_objectives_of_trl_are_named_for_those_who_come_from_it():
    "Its loss types that are objectives here, beside both options."
    code = "".join(sources("guides/from_trl.ipynb"))
    meaning = code[code.index('"loss_type": """') :].split('""",')[0]
    name = code[code.index('"objective": (') :].split("\n")[0]
    theirs = [check.name for check in TRL_ROWS]
    for objective in OBJECTIVES:
        if f"{objective}, TRL" in theirs:
            assert f'`"{objective}"' in meaning and f'`"{objective}"' in name


NO_SYMBOL = {"top_p", "value_learning_rate"}  # the first: in the table of letters


def test_every_number_of_a_box_is_in_the_notation():
    "A symbol for what stands in an equation, with the option's name beside it."
    text = "".join(sources("notation.ipynb", "markdown"))
    options = [*fields(GRPOConfig), *fields(PPOConfig)]
    for option in options:
        number = option.name in BOUNDS and option.type in (float, float | None)
        if number and option.name not in NO_SYMBOL:
            assert f"`{option.name}`" in text, option.name


def test_what_the_guide_adds_is_not_the_librarys():
    "An entry of one's own that has become built in would be no example any more."
    tables = TABLES | {"recipe": RECIPES}
    every = {name for table in tables.values() for name in table}
    code = "\n".join(sources("guides/variants.ipynb"))
    added = re.findall(r'^(?:[A-Z]+)\["(\w+)"\] = ', code, re.MULTILINE)
    assert len(added) >= 3
    assert not every & set(added)


GUIDE = "guides/troubleshooting.ipynb"


def metrics_of_the_glossary():
    "The keys of metrics.jsonl that the notation lists; NAME is any reward function."
    text = "".join(sources("notation.ipynb", "markdown"))
    glossary = text.split("## Glossary of metrics")[1]
    return set(re.findall(r"^\| `([\w/]+)` \|", glossary, re.MULTILINE))


def names_in_backticks(text):
    "Options and metrics that a text names: words with _ or /, and `name=value`."
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", outside)
    found = set()
    for span in spans:
        name = span.split("=")[0]
        if re.fullmatch(r"[A-Za-z]\w*(/\w+)*", name):
            found.add(name)
    return found


def test_the_guide_names_options_and_metrics_that_exist():
    "Each name in backticks of the guide to faults, its code's options included."
    options = {f.name for config in (GRPOConfig, PPOConfig) for f in fields(config)}
    metrics = metrics_of_the_glossary()
    assert len(metrics) > 40
    of_code = {"OMP_NUM_THREADS", "completions", "evaluate", "second"}
    of_code |= {"target", "truncated"}  # a task, a column
    of_code |= {"datasets", "eval", "on_step", "trust_remote_code", "weights_only"}
    named = names_in_backticks("\n\n".join(sources(GUIDE, "markdown")))
    assert len(named & options) > 30 and len(named & metrics) > 15
    unknown = named - options - metrics - of_code
    assert not unknown, unknown
    assert of_code <= named, of_code - named


def test_a_name_that_is_no_option_is_seen():
    text = "`beta` and `betta=0.1`, `update/kl`, `run.groups(3)`, `kl_targett`"
    names = {"beta", "betta", "update/kl", "kl_targett"}
    assert names_in_backticks(text) == names


def test_the_guide_opens_with_all_of_its_symptoms():
    "A row of its first table for each section on one, by its address, in their order."
    prose = sources(GUIDE, "markdown")
    linked = re.findall(r"\]\(#([\w-]+)\) \|$", prose[1], re.MULTILINE)
    titles = re.findall(r"^## (.+)$", "\n".join(prose), re.MULTILINE)
    address = {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-"): t for t in titles}
    others = {"Where to look first", "Three ways to go on", "Where to next"}
    others |= {"What is executed, and what is not"}
    assert linked == [a for a, title in address.items() if title not in others]
    assert len(linked) >= 12
    for part in ("**Look at**", "**Change**", "**The present run**"):
        assert "".join(prose).count(part) == len(linked), part


def definitions(path, *names):
    "The assignments and functions of a notebook with these names, evaluated."
    space = dict(algorithm=algorithm, gae=gae, group=group, models=models)
    space |= dict(reference=reference, update=update, value=value)
    space |= dict(dynamic_sampling=dynamic_sampling)
    space |= dict(ast=ast, inspect=inspect, textwrap=textwrap)
    for source in sources(path):
        for node in ast.parse(re.sub("^%", "#%", source, flags=re.M)).body:
            name = getattr(node, "name", None)
            if isinstance(node, ast.Assign):
                name = getattr(node.targets[0], "id", None)
            if name in names:
                exec(ast.unparse(node), space)
    return [space[name] for name in names]


@pytest.mark.parametrize("module, half", [(group, "grpo"), (gae, "ppo")])
def test_claim_5_counts_every_function_of_these_boxes(module, half):
    "The small ones beneath a public function, too: a new one is not forgotten."
    (parts,) = definitions("experiments/claims/05_simpler.ipynb", "PARTS")
    counted = {f.__name__ for of_part in parts[half].values() for f in of_part}
    for name, thing in vars(module).items():
        if inspect.isfunction(thing) and thing.__module__ == module.__name__:
            assert name in counted, name


def test_claim_5_counts_what_is_there():
    "Parameters, boxes and lines of its verdict are those that counting gives now."
    page = "experiments/claims/05_simpler.ipynb"
    wanted = ("NEEDED", "VARIANTS", "PARTS", "code_lines")
    needed, variants, parts, code_lines = definitions(page, *wanted)
    shared = {field.name for field in fields(Config)}
    own = {}
    for name, config in (("ppo", PPOConfig), ("grpo", GRPOConfig)):
        own[name] = {field.name for field in fields(config)} - shared
        assert own[name] == {*needed[name], *variants[name]}
    lines = {}
    for name, of_half in parts.items():
        lines[name] = {part: sum(map(code_lines, f)) for part, f in of_half.items()}
    every = {name: sum(counts.values()) for name, counts in lines.items()}
    plain = {name: every[name] - lines[name]["variants"] for name in lines}
    counts = {
        "parameters of its own": {name: len(own[name]) for name in own},
        "needed by the figure": {name: len(needed[name]) for name in own},
        "boxes": {name: len(boxes(name)) for name in own},
        "lines without variants": plain,
        "(with variants": every,
    }
    verdict = json.loads((ROOT / "benchmarks/claims/05_simpler.json").read_text())
    for what, count in counts.items():
        sentence = f"{what} {count['ppo']} against {count['grpo']}"
        assert sentence in verdict["reason"], sentence


def test_what_is_said_of_a_gpu_is_what_one_has_measured():
    """`benchmarks/results/gpu.json` as it is, or that it is not there; and no other
    text says that nothing was measured, which a run of `make bench-gpu` would belie."""
    measured = ROOT / "benchmarks" / "results" / "gpu.json"
    wanted, unwanted = "No GPU has run this yet", "tests passed"
    if measured.exists():
        wanted, unwanted = json.loads(measured.read_text())["text"], wanted
    for page in ("4_evidence/40_cost.ipynb", "index.ipynb"):
        (cell,) = [c for c in cells(page) if 'gpu.json"' in "".join(c["source"])]
        for output in cell["outputs"]:  # one, once the page has been executed
            shown = "".join(output["data"]["text/markdown"])
            assert wanted in shown and unwanted not in shown, page
    done = r"\b(measured|tried|run)\b"
    denied = (
        rf"(nothing|never|not)\b[^.;|]*{done} on a GPU|no GPU has {done}"
        rf"|\bGPU,[^.;|]*\b(nothing|never)\b[^.;|]*{done}|not {done}: a GPU"
    )
    found = []
    for path in sorted(NBS.rglob("*.ipynb")):
        text = "\n".join(sources(path.relative_to(NBS), "markdown"))
        found += [f"{path.name}: {x[0]}" for x in re.finditer(denied, text, re.I)]
    assert not found


def test_claim_4_has_the_numbers_of_the_cost_model():
    """What its verdict says of a model of 8B is not measured but computed: so again
    here."""
    sizes = dict(hidden_size=4096, intermediate_size=14336, vocab_size=128256)
    layers = dict(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)
    big = parameters(LlamaConfig(**sizes, **layers, tie_word_embeddings=False))

    def step(config, reward=None, value=True):
        found = pd.Series(flops(config, big, 256, 1024, reward))
        if not value:
            found = found.drop(["value: predict", "value: update"])
        return found.sum()

    many = PPOConfig(num_prompts=1024, max_completion_length=1024)
    few = PPOConfig(num_prompts=16, max_completion_length=1024)
    grpo = GRPOConfig(num_prompts=16, num_generations=64, max_completion_length=1024)
    rule = 1 - step(many, value=False) / step(many)
    model = 1 - step(many, big, value=False) / step(many, big)
    reason = json.loads((ROOT / "benchmarks/claims/04_compute.json").read_text())[
        "reason"
    ]
    assert f"saves {rule:.0%} of the FLOPs with a rule as reward" in reason
    assert f"and {model:.0%} with a model" in reason
    times = step(grpo) / step(few)
    assert f"at equal queries GRPO takes {times:.0f} times those of PPO" in reason


def test_the_chinese_page_counts_the_options_that_are_there():
    "Its saved output has the numbers and the names of the config's fields."
    shared = [field.name for field in fields(Config)]
    shown = printed("zh.ipynb")
    assert re.findall(r"两者共有 (\d+) 个参数", shown) == [str(len(shared))]
    for name, config in (("PPO", PPOConfig), ("GRPO", GRPOConfig)):
        own = [field.name for field in fields(config) if field.name not in shared]
        ((count, names),) = re.findall(rf"^{name} 独有 (\d+) 个： (.*)$", shown, re.M)
        assert int(count) == len(own) and set(names.split("、")) == set(own)


def fuzzed():
    "Each function of test_fuzz.py with the text of the tests that draw its arguments."
    source = (ROOT / "tests/test_fuzz.py").read_text()
    tree = ast.parse(source)
    places = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("grpo_nb."):
            places |= {alias.name: node.module for alias in node.names}
    texts = {}
    for test in tree.body:
        for call in getattr(test, "decorator_list", []):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "fuzz":
                decorators = " ".join(map(ast.unparse, test.decorator_list[1:]))
                for name in map(ast.unparse, call.args):
                    text = texts.get(name, "") + decorators + ast.unparse(test)
                    texts[name] = text
    for name, text in texts.items():
        if name in places:
            yield getattr(importlib.import_module(places[name]), name), text


BY_POSITION = {  # or by a strategy that several tests share
    "adapt_beta horizon",
    "aggregate mask",
    "as_rollout device",
    "batch_loss batch",
    "batch_loss totals",
    "build_models reward_funcs",
    "check_choice name",
    "check_context lengths",
    "check_shapes tensors",
    "check_tokens ids",
    "check_tokens mask",
    "check_weights info",
    "combine names",
    "completions_per_row G",
    "completions_per_row hidden",
    "cost_table model_config",
    "cost_table reward_model",
    "decode_completions ids",
    "decode_completions mask",
    "draw_figure link",
    "dynamic_sampling sample",
    "dynamic_sampling score",
    "flops reward",
    "format_reward pattern",
    "forward_flops scalar",
    "gae mask",
    "in_micro_batches compute",
    "in_micro_batches hidden",
    "in_order results",
    "interval statistic",
    "iqm axis",
    "judge reward_funcs",
    "kl_in_reward mask",
    "lacks_memory error",
    "load_rewards policy",
    "load_rewards tokenizer",
    "load_task options",
    "main arguments",
    "measure_flops stage",
    "micro_batches hidden",
    "open_run device",
    "open_run reward_funcs",
    "open_run task",
    "parameters model_config",
    "parse_arguments arguments",
    "passes_trial otherwise",
    "passes_trial trial",
    "position_ids attention_mask",
    "predict_values value_model",
    "preference_pairs is_right",
    "process_advantages num_generations",
    "process_advantages step_rewards",
    "process_reward tokenizer",
    "ratio mask",
    "resume_arguments arguments",
    "sample generator",
    "score reward_funcs",
    "shared_rows hidden",
    "shares_prompt longest",
    "sweep notebook",
    "sweep threads",
    "table step",
    "token_logprobs return_entropy",
    "train advantages",
    "train on_step",
    "train policy_loss",
    "train reward_funcs",
    "training_bytes trained",
    "whiten mask",
}


def test_every_parameter_of_a_fuzzed_function_is_drawn():
    """A parameter that its tests do not name is not drawn, or handed over by position.

    Those of today stand in BY_POSITION; what is new has to be drawn by name."""
    found = set()
    for function, text in fuzzed():
        if inspect.isfunction(function):
            for parameter in inspect.signature(function).parameters:
                if not re.search(rf"\b{parameter}\b", text):
                    found.add(f"{function.__name__} {parameter}")
    assert not found - BY_POSITION, found - BY_POSITION
    assert not BY_POSITION - found, "these are drawn by name, or are no more"
