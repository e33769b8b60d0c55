"""The ledger: every row holds, and a row that compares nothing, or whose oracle is
missing, does not pretend to."""

import ast
import math
import sys
from dataclasses import replace

import pytest
import torch

from grpo_nb import reference
from grpo_nb.evidence import oracles, trl_oracles
from grpo_nb.evidence.ledger import CHECKS, as_markdown, run_checks
from grpo_nb.evidence.oracles import ROWS, Check, OracleMissing, disagreement
from grpo_nb.evidence.trl_oracles import TRL_ROWS, import_trl
from helpers import ROOT

TOY = Check("toy", "x^2", "school", "pow", "by hand", lambda: (0.0, None))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_row(check):
    try:
        value, gradient = check.run()
    except OracleMissing as missing:
        pytest.skip(str(missing))
    compared = [error for error in (value, gradient) if error is not None]
    assert compared and all(error <= check.tolerance for error in compared), (
        value,
        gradient,
    )


def test_tolerances_are_tight():
    """1e-10, but where float32, a finite difference or TRL's float32 factor stands
    in the way; those say so here."""
    loose = {check.name: check.tolerance for check in CHECKS if check.tolerance > 1e-10}
    assert loose == {
        "slope of the loss": 1e-6,
        "advantage, group, TRL": 1e-7,
        "advantage, batch, TRL": 1e-7,
        "one step, TRL": 1e-6,
        "three steps on one sampling, TRL": 1e-6,
    }


def test_rows_are_complete():
    """Each row has a name of its own and says what, from where and how; its formula
    fits into a cell of a table."""
    assert len({check.name for check in CHECKS}) == len(CHECKS) >= 40
    for check in CHECKS:
        assert check.formula and check.source and check.code and check.how
        assert (
            "|" not in check.formula
            and "$" not in check.formula
            and "label" not in check.formula
        )
        assert check.formula.count("{") == check.formula.count("}")


def test_every_row_of_both_oracles_is_in_the_table_once():
    "What TRL has in the same formula stands beside it; all else in its order."
    assert sorted(map(id, CHECKS)) == sorted(map(id, [*ROWS, *TRL_ROWS]))
    for rows in (ROWS, TRL_ROWS):
        places = [CHECKS.index(row) for row in rows]
        assert places == sorted(places)
    names = [check.name for check in CHECKS]
    assert names[:4] == ["log-prob", "log-prob, TRL", "entropy", "entropy, TRL"]


def test_trl_is_imported_in_one_module_and_only_when_it_is_called():
    "No line outside of a function of `trl_oracles` imports TRL."
    for path in sorted((ROOT / "grpo_nb").rglob("*.py")):
        tree = ast.parse(path.read_text())
        inside = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        calls = {id(n) for f in inside for n in ast.walk(f)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            else:
                continue
            if "trl" in [module.split(".")[0] for module in modules]:
                assert path.name == "trl_oracles.py" and id(node) in calls, path


@pytest.mark.parametrize(
    "errors",
    [
        (math.nan, None),
        (None, None),
        (0.0, math.nan),
        (1e-9, 0.0),
        (0.0, 1e-9),
        (math.inf, 0.0),
    ],
)
def test_what_does_not_hold(errors):
    "NaN, nothing compared, and an error in only one of the two are no success."
    assert (
        TOY.measure()["holds"] is True
        and replace(TOY, run=lambda: errors).measure()["holds"] is False
    )


def test_disagreement():
    """Values and gradients apart from each other; one wrong entry is seen, and
    numbers that do not match are refused."""
    x = torch.randn(
        4,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
        requires_grad=True,
    )
    assert disagreement(x.exp(), [y.exp() for y in x], [x]) == (0, 0)
    assert (
        disagreement(x.exp(), [y.exp().detach() for y in x], [x])[0]
        == 0
        < disagreement(x.exp(), [y.exp().detach() for y in x], [x])[1]
    )
    for i in range(4):
        assert (
            min(
                disagreement(
                    x, [y * (2 if i == j else 1) for j, y in enumerate(x)], [x]
                )
            )
            > 0
        )
    assert math.isnan(disagreement(x.detach(), [0.0, math.nan, 0.0, 0.0])[0])
    with pytest.raises(ValueError, match="4 numbers are compared with 3"):
        disagreement(x, [0.0] * 3)


def test_without_trl(monkeypatch):
    """Rows that need TRL say how to get it; the others do not need it; nothing of
    TRL is imported until then."""
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(OracleMissing, match="TRL is not installed: pip install trl"):
        import_trl()
    theirs = [check for check in CHECKS if "TRL" in check.how]
    table = run_checks(theirs)
    assert (
        len(theirs) >= 13
        and table["holds"].isna().all()
        and (table["note"] == "TRL is not installed: pip install trl").all()
    )
    assert as_markdown(table).count("pip install trl") == len(theirs)


def test_an_import_error_inside_trl_is_not_swallowed(monkeypatch):
    "A broken TRL is an error, not a missing one."

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("trl"):
                raise ModuleNotFoundError("No module named 'datasets'", name="datasets")

    for name in [name for name in sys.modules if name.split(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="datasets"):
        import_trl()


def reversed_kl(right):
    return lambda new, ref, estimator="k3": right(ref, new, estimator)


def one_lambda_too_many(right):
    return lambda r, V, mask, gamma, lam: right(r, V, mask, gamma, lam * gamma)


def no_eps(right):
    return lambda *args, **kwargs: right(*args, **kwargs, eps=0.0)


def longest_of_the_batch(right):
    def wrong(loss, mask, loss_type, max_completion_length):
        return right(loss, mask, loss_type, mask.shape[1])

    return wrong


def clip_alone(right):
    def wrong(new, old, A, mask, epsilon=0.2, epsilon_high=0.2, delta=None):
        rho = (new - old).exp().clamp(1 - epsilon, 1 + epsilon_high)
        return -rho * A[:, None], {}

    return wrong


def no_clip_of_values(right):
    return lambda V, old, R, mask, eps: right(V, old, R, mask, 1e9)


@pytest.mark.parametrize(
    "name, wrong, rows",
    [
        (
            "kl",
            reversed_kl,
            {"E[k1]", "E[k3]", "E[grad k3]", "E[grad rho k3]", "KL in the reward"},
        ),
        ("gae", one_lambda_too_many, {"GAE", "GAE, λ = 1"}),
        ("group_advantages", no_eps, {"group advantage", "std of the batch"}),
        ("aggregate", longest_of_the_batch, {"dr_grpo"}),
        ("policy_loss", clip_alone, {"clipped objective", "clip-higher", "dual clip"}),
        ("value_loss", no_clip_of_values, {"clipped value loss"}),
    ],
)
def test_rows_notice(monkeypatch, name, wrong, rows):
    "A library that is wrong in one place fails in the rows about that place."
    for module in (oracles, reference):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, wrong(getattr(module, name)))
    table = run_checks([check for check in CHECKS if check.name in rows])
    assert len(table) == len(rows) and not table["holds"].any(), table


def test_markdown():
    """One line a row; an error that is not allowed is bold; a dash where nothing is
    compared."""
    text = as_markdown(run_checks([TOY, replace(TOY, run=lambda: (None, 0.5))]))
    row = "| toy<br>*school* | $x^2$ | `pow`<br>by hand | {}<br>{} |"
    assert text.splitlines()[2:] == [row.format("0", "–"), row.format("–", "**5e-01**")]
    assert "by hand; allowed 1e-03 | **nan**<br>– |" in as_markdown(
        run_checks([replace(TOY, run=lambda: (math.nan, None), tolerance=1e-3)])
    )


def test_nan_in_one_of_many_settings_is_seen(monkeypatch):
    "Python's max would lose it: a row that tries many settings must not."
    pytest.importorskip("trl")
    right = trl_oracles.batch_loss
    calls = []

    def batch_loss(*arguments):
        calls.append(1)
        loss, sums = right(*arguments)
        return (loss * math.nan if len(calls) == 17 else loss), sums

    monkeypatch.setattr(trl_oracles, "batch_loss", batch_loss)
    (check,) = (check for check in CHECKS if check.name == "grpo, TRL")
    row = check.measure()
    assert len(calls) == 30 and math.isnan(row["value"]) and row["holds"] is False
