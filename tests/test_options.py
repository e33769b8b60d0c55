"""Options stand beside their box, are put together in one place, and each choice is
spelled once: in its table."""

import ast
import dataclasses
import functools
import json
import re
import textwrap
import typing

import nbformat
import pytest
from helpers import ROOT, short_config, tagged
from pydantic.dataclasses import dataclass

from grpo_nb import gae, group, objective, reference, reward, sampling, update, value
from grpo_nb.checks import alternatives
from grpo_nb.run import options
from grpo_nb.run.command_line import main, parse_arguments
from grpo_nb.run.options import BOUNDS, CONFIGS, RECIPES, Config, make_config
from grpo_nb.run.options import other_functions, own_functions
from grpo_nb.run.training import train

BOXES = [
    sampling.SamplingOptions,
    reward.RewardOptions,
    reference.ReferenceOptions,
    value.ValueOptions,
    gae.GAEOptions,
    group.GroupOptions,
    objective.ObjectiveOptions,
    update.UpdateOptions,
]
TABLES = {
    "objective": objective.OBJECTIVES,
    "loss_type": objective.AGGREGATES,
    "importance_sampling_level": objective.LEVELS,
    "scale_rewards": group.SCALES,
    "baseline": group.BASELINES,
}
PARTS = [*BOXES, options.StartOptions, options.RunOptions]


def choices_of(field):
    "What a field may be, where that is a choice: from its table, or from its type."
    if "choices" in field.metadata:
        return list(field.metadata["choices"])
    if typing.get_origin(field.type) is typing.Literal:
        return list(typing.get_args(field.type))
    return []


@pytest.mark.parametrize("box", PARTS, ids=lambda box: box.__name__)
def test_options_of_a_box(box):
    """A plain dataclass with keywords only; each field has a help and is an option
    of those configs that have the box."""
    assert not hasattr(box, "__pydantic_fields__")
    with pytest.raises(TypeError):
        box(1)
    owners = [config for config in CONFIGS.values() if issubclass(config, box)]
    assert owners
    for field in dataclasses.fields(box):
        assert field.metadata["help"]
        for config in owners:
            assert config.__dataclass_fields__[field.name].metadata["help"]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_config_is_its_parts(config):
    """Each option belongs to one part; what a config adds itself, its algorithm has
    alone."""
    found = [f.name for part in PARTS for f in dataclasses.fields(part)]
    assert len(found) == len(set(found))
    own = {f.name for f in dataclasses.fields(config)} - set(found)
    others = set(CONFIGS.values()) - {config}
    for other in others:
        assert not own & {f.name for f in dataclasses.fields(other)}


def test_bounds_are_of_options_and_numbers_have_them():
    """No bound is left over from an option that is gone; no number of a box goes
    without."""
    fields = [f for box in BOXES for f in dataclasses.fields(box)]
    assert set(BOUNDS) <= {f.name for f in fields}
    for field in fields:
        if field.type in (int, float, float | None):
            assert field.name in BOUNDS


@pytest.mark.parametrize("name, table", TABLES.items(), ids=TABLES)
def test_an_entry_of_ones_own(monkeypatch, capsys, name, table):
    """Refused before it is in its table, by a message that names what is; then
    allowed, and shown."""
    message = f"{name} = 'mine': must be {alternatives(table)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        make_config(**{name: "mine"})
    with pytest.raises(SystemExit):
        parse_arguments([f"--{name}", "mine"])
    assert "mine" in capsys.readouterr().err
    monkeypatch.setitem(table, "mine", next(iter(table.values())))
    assert getattr(make_config(**{name: "mine"}), name) == "mine"
    assert getattr(parse_arguments([f"--{name}", "mine"]), name) == "mine"
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "mine}" in "".join(capsys.readouterr().out.split())
    if table not in (group.SCALES, group.BASELINES):
        assert short_config(algorithm="ppo", **{name: "mine"})
    saved = json.loads(json.dumps(dataclasses.asdict(make_config(**{name: "mine"}))))
    assert getattr(make_config(**saved), name) == "mine"


def first(rollout, config):
    return rollout.rewards


def another(rollout, config):
    return -rollout.rewards


def typed(source):
    "A function without a file, as at a prompt."
    names = {}
    exec(source, names)
    return names["f"]


class Called:
    def __call__(self, rollout, config):
        return rollout.rewards


def test_functions_of_ones_own(monkeypatch):
    """What was passed is named, and entries that are not the library's; the digest
    tells two sources apart."""
    config = make_config()
    assert own_functions(config, advantages=None) == {}
    assert own_functions(config, policy_loss=objective.policy_loss) == {
        "policy_loss": {"name": "policy_loss", "sha256": ""}
    }
    functions = {
        "first": first,
        "another": another,
        "partial": functools.partial(first, config=1),
        "partial of the library's": functools.partial(objective.aggregate, mask=1),
        "partial of another value": functools.partial(first, config=2),
        "called": Called(),
        "typed": typed("def f(rollout, config): return rollout.rewards"),
        "typed another": typed("def f(rollout, config): return rollout.values"),
    }
    digests = {}
    for name, function in functions.items():
        record = own_functions(config, advantages=function)
        assert record == own_functions(config, advantages=function)
        assert json.loads(json.dumps(record)) == record
        digests[name] = record["advantages"]["sha256"]
    assert len(set(digests.values())) == len(functions)
    monkeypatch.setitem(objective.OBJECTIVES, "mine", first)
    record = own_functions(make_config(objective="mine"), advantages=another)
    assert {key: x["name"] for key, x in record.items()} == {
        "advantages": "another",
        "objective": "first",
    }
    assert other_functions(record, record) == []
    assert other_functions(record, {}) == [
        "advantages was another, now the library's",
        "objective was first, now the library's",
    ]
    monkeypatch.setattr(another, "__name__", "first")
    renamed = own_functions(make_config(objective="mine"), advantages=first)
    renamed["objective"] = own_functions(config, objective=another)["objective"]
    assert other_functions(record, renamed) == [
        "advantages was another, now first",
        "objective is not the first that it was: another source",
    ]


def comments_of(source):
    "The value and the comment of each option: beside it, or in the lines above."
    found = {}
    above = []
    for line in source.splitlines():
        if match := re.match(r"(\w+) = (.+?)(?:  # (.*))?$", line):
            name, value, beside = match.groups()
            words = " ".join(filter(None, [*above, beside]))
            if name != value:  # named in the cell above
                found[name] = ast.literal_eval(value), words
        above = above + [line[2:]] if line.startswith("# ") else []
    return found


def test_refills_belong_to_the_librarys_grpo(monkeypatch):
    """A kind of GRPOConfig has the option, but a step of its own, which gets no spare
    queries: refused by name, also where a recipe brings it; 0 is fine."""

    @dataclass(config={"extra": "forbid"}, kw_only=True)
    class MineConfig(options.GRPOConfig):
        algorithm: typing.Literal["mine"] = "mine"

    monkeypatch.setitem(CONFIGS, "mine", MineConfig)
    for refills in ({"dynamic_sampling": 3}, {"recipe": "dapo"}):
        with pytest.raises(ValueError, match="dynamic_sampling = [34]: must be 0") as e:
            make_config(algorithm="mine", **refills)
        assert 'algorithm = "mine"' in str(e.value)
    assert make_config(algorithm="mine", dynamic_sampling=0).dynamic_sampling == 0
    assert make_config(recipe="dapo").dynamic_sampling == 4


def defaults_of(name):
    "The defaults of an option, by algorithm."
    return {
        algorithm: getattr(config(), name)
        for algorithm, config in CONFIGS.items()
        if name in config.__dataclass_fields__
    }


def first_of_train(name, field):
    """How an option stands in the first cell: with its default, or with None and the
    default in words where a recipe or an algorithm has another."""
    defaults = defaults_of(name)
    values = list(defaults.values())
    told = field.metadata["help"] + choices_in_brackets(field)
    if name == "algorithm":
        return None, f"{told}; default: grpo"
    if values[0] is None or "default:" in told:
        return None, told
    if values == values[:1] * len(values):
        if not any(name in recipe for recipe in RECIPES.values()):
            return values[0], told
        default = values[0]
        words = ", ".join(default) if isinstance(default, list) else str(default)
        return None, f"{told}; default: {words}"
    words = ", ".join(f"{x} in {name.upper()}" for name, x in defaults.items())
    return None, f"{told}; default: {words}"


def choices_in_brackets(field):
    choices = ", ".join(map(str, choices_of(field)))
    return f" ({choices})" if choices else ""


def test_the_comments_of_the_train_notebook():
    """Each parameter is explained by its help text and its choices, as they are now;
    those of the first cell have their defaults."""
    notebook = nbformat.read(ROOT / "nbs/experiments/train.ipynb", 4)
    (k,) = tagged(notebook.cells)
    first, rest = (comments_of(notebook.cells[i].source) for i in (k - 1, k))
    fields = {}
    for config in (*CONFIGS.values(), Config):
        fields |= config.__dataclass_fields__
    assert first.keys() | rest.keys() == fields.keys()
    assert first == {name: first_of_train(name, fields[name]) for name in first}
    expected = {}
    for name in rest:
        told = fields[name].metadata["help"] + choices_in_brackets(fields[name])
        expected[name] = None, told
    assert rest == expected, textwrap.dedent(
        """the comment beside a parameter, or above it where both do not fit into 88
        columns, is its help text with its choices in brackets"""
    )
    for name in first:  # papermill knows the tagged cell alone
        assert f"\n{name} = {name}\n" in notebook.cells[k].source


def twice(rollout, config):
    "Group advantages, doubled."
    return 2 * group.advantages(rollout, config)


def halved(rollout, config):
    "Group advantages, halved."
    return group.advantages(rollout, config) / 2


def test_functions_of_ones_own_are_used_recorded_and_asked_for(tmp_path):
    "They move the policy; a run goes on with the same alone, and to the last bit."
    small = {"num_generations": 4, "max_steps": 2, "save_steps": 1}

    def run(name, steps=2, resume=False, **functions):
        options = small | {"max_steps": steps, "output_dir": str(tmp_path / name)}
        config = short_config(**options, resume=resume)
        return train(config, progress=False, **functions)

    plain, own = run("plain"), run("own", advantages=twice)
    assert own.metrics["grad_norm"][1] > 1.5 * plain.metrics["grad_norm"][1]
    record = json.loads((tmp_path / "own/config.json").read_text())
    assert record["passed"]["functions"]["advantages"]["name"] == "twice"
    run("parts", steps=1, advantages=twice)
    (tmp_path / "parts/model").rename(tmp_path / "elsewhere")
    for other in ({}, {"advantages": halved}, {"policy_loss": objective.policy_loss}):
        with pytest.raises(ValueError, match="advantages was twice, now"):
            run("parts", resume=True, **other)
    parts = run("parts", resume=True, advantages=twice)
    assert parts.metrics["loss"].tolist() == own.metrics["loss"].tolist()


def test_a_loss_of_ones_own(tmp_path):
    calls = []

    def loss(*arguments, **options):
        calls.append(1)
        return objective.policy_loss(*arguments, **options)

    config = short_config(max_steps=1, output_dir=str(tmp_path / "run"))
    train(config, policy_loss=loss, progress=False)
    assert calls
    with pytest.raises(ValueError, match="advantages.*must be None"):
        train(short_config(algorithm="ppo"), advantages=twice, progress=False)
