"""Which runs a study makes, in which order, and what it refuses before the first."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.core.errors import ThriftyError
from thrifty.study.budgets import StudyBudget
from thrifty.study.config import Range, Search, Study, load_study
from thrifty.study.fit import _largest, with_fits
from thrifty.study.plan import check, done_and_planned, hopeless, ready, specs
from thrifty.study.proposals import propose
from thrifty.study.rates import best_rate, is_interior, rates_to_try, written
from thrifty.study.records import Record
from thrifty.study.spec import Spec


def mapping(**changes: Any) -> dict[str, Any]:
    return {
        "run": {"model": "smollm2-135m", "max_steps": 10},
        "tasks": {"sums": {"train": "train.jsonl", "eval": "eval.jsonl", "measures": {"loss": True}}},
        "methods": {"smt": "smt", "lora": {"peft": {"peft_type": "LORA", "r": "fit", "lora_alpha": "2*fit"}}},
        "seeds": [0, 1],
        "search": {"learning_rate": [1e-3, 3e-3, 1e-2], "run": {"max_steps": 4}, "widen": 2},
        **changes,
    }


def ended(spec: Spec, *, loss: float = 1.0, **info: Any) -> Record:
    """The record of a run that ended with `loss` on its rows; failed where that is NaN."""
    status = "failed" if math.isnan(loss) else "success"
    train_info = {"status": status, "measures": {"loss": {"rows": [[loss, 1]]}}, **info}
    run_info = {
        name: getattr(spec, name)
        for name in ("stage", "task", "method", "budget", "learning_rate", "seed", "trial", "proposed_budget")
    }
    return Record(spec.name, run_info | {"spec_sha256": spec.digest()}, train_info, {})


def play(study: Study, loss: Any, **info: Any) -> tuple[list[str], dict[str, Record]]:
    """Make every run, in order; `loss` gives each spec's. Returns the names in order, and the records."""
    order: list[str] = []
    records: dict[str, Record] = {}
    while found := ready(study, records):
        records[found[0].name] = ended(found[0], loss=loss(found[0]), **info)
        order.append(found[0].name)
        assert len(order) < 200
    return order, records


def test_one_seed_of_everything_comes_before_the_next() -> None:
    study = load_study(mapping())
    order, records = play(study, lambda spec: abs(math.log(spec.learning_rate / 3e-3)) if spec.learning_rate else 3.0)
    assert order == [
        "base-sums",
        *(f"search-sums-smt-1pct-{rate}" for rate in ("1e-3", "3e-3", "1e-2")),
        "final-sums-smt-1pct-s0",
        *(f"search-sums-lora-1pct-{rate}" for rate in ("1e-3", "3e-3", "1e-2")),
        "final-sums-lora-1pct-s0",
        "final-sums-smt-1pct-s1",
        "final-sums-lora-1pct-s1",
    ]
    assert {records[name].run_info["learning_rate"] for name in order if name.startswith("final")} == {3e-3}
    assert done_and_planned(study, records) == (11, 11)
    assert done_and_planned(study, {}) == (0, 11)


def test_all_contestants_get_the_same_rows_steps_and_seeds() -> None:
    study = load_study(mapping())
    _, records = play(study, lambda spec: 1.0)
    finals = {spec.name: spec for spec in specs(study, records) if spec.stage == "final"}
    smt, lora = finals["final-sums-smt-1pct-s1"], finals["final-sums-lora-1pct-s1"]
    differing = {key for key in smt.config.keys() | lora.config.keys() if smt.config.get(key) != lora.config.get(key)}
    assert differing == {"method", "budget"}  # lora's budget is what `fit` is fitted to
    assert lora.fit_to == smt.config["budget"] == 0.01
    assert smt.judged_by == lora.judged_by == "eval.jsonl"
    # rates are chosen and curves are drawn on rows that are neither trained on nor judged by
    held_out = {"path": "train.jsonl", "split": "[95%:]"}
    assert smt.config["data"] == {"train": {"path": "train.jsonl", "split": "[:95%]"}, "eval": held_out}
    search = next(spec for spec in specs(study, {}) if spec.stage == "search")
    assert (search.judged_by, search.measures, search.config["max_steps"]) == (held_out, {"loss": True}, 4)


@settings(max_examples=200, deadline=None)
@given(st.floats(-6, 0), st.integers(1, 5), st.integers(-5, -1), st.integers(0, 4))
def test_a_search_widens_until_the_best_rate_is_inside(optimum: float, size: int, start: int, widen: int) -> None:
    ladder = [float(f"{d}e{p}") for p in range(-12, 6) for d in (1, 3)]
    first = ladder.index(float(f"1e{start}"))
    grid = ladder[first : first + size]
    found: dict[float, float] = {}
    while missing := [rate for rate in rates_to_try(grid, found, widen=widen) if rate not in found]:
        found |= {rate: (math.log10(rate) - optimum) ** 2 for rate in missing}
    assert set(grid) <= set(found) <= set(ladder)
    below, above = sum(rate < grid[0] for rate in found), sum(rate > grid[-1] for rate in found)
    assert max(below, above) <= widen
    if not is_interior(found):
        best = best_rate(found)
        assert (best == min(found) and below == widen) or (best == max(found) and above == widen)


def test_a_failed_rate_is_an_edge_and_no_rate_is_no_answer() -> None:
    assert rates_to_try([1e-3, 1e-2], {1e-3: 2.0, 1e-2: math.inf}, widen=1) == [3e-4, 1e-3, 1e-2]
    assert rates_to_try([1e-3], {1e-3: math.inf}, widen=3) == [1e-3]
    assert best_rate({1e-3: math.inf}) is None
    assert [written(rate) for rate in (1e-3, 0.003, 0.25, 1e-10)] == ["1e-3", "3e-3", "2.5e-1", "1e-10"]


def test_final_runs_without_a_good_search_are_reported_as_failed() -> None:
    study = load_study(mapping())
    lost = lambda spec: math.nan if spec.method == "smt" else 1.0  # noqa: E731
    order, records = play(study, lost)
    assert not any(name.startswith("final-sums-smt") for name in order)
    assert [spec.name for spec in hopeless(study, records)] == ["final-sums-smt-1pct-s0", "final-sums-smt-1pct-s1"]
    assert hopeless(study, {}) == []


def test_bytes_and_seconds_come_from_a_calibration() -> None:
    study = load_study(mapping(budgets=["2MB"], seconds=60, methods={"smt": "smt"}))
    costs = {
        "num_trainable_params": 250_000,
        "file_size": 1_000_000,
        "train_time": 13.0,
        "probe_seconds": 1.0,
        "steps": 6,
    }
    order, records = play(study, lambda spec: spec.learning_rate or 0.0, **costs)
    assert order[1] == "calibrate-sums-smt-2MB"
    finals = [spec for spec in specs(study, records) if spec.stage == "final"]
    assert [(spec.config["budget"], spec.config["max_steps"]) for spec in finals] == [(500_000, 29)] * 2


def test_a_study_of_two_budgets_searches_at_each() -> None:
    entry = {"method": "full", "budgets": "own", "learning_rate": [1e-4]}
    study = load_study(mapping(budgets=["0.5%", 20_000], methods={"smt": "smt", "full": entry}, seeds=[0]))
    order, _ = play(study, lambda spec: spec.learning_rate or 0.0)
    finals = [name for name in order if name.startswith("final")]
    assert finals == ["final-sums-smt-0.5pct-s0", "final-sums-smt-20000-s0", "final-sums-full-own-s0"]


def test_optuna_proposes_within_its_range_and_the_same_again() -> None:
    changes = {
        "search": {"trials": 5, "learning_rate": {"low": 1e-4, "high": 1e-1}, "budget": {"low": "0.1%", "high": "5%"}}
    }
    study = load_study(mapping(methods={"smt": "smt"}, **changes))
    order, records = play(study, lambda spec: abs(math.log(spec.learning_rate / 1e-2)) if spec.learning_rate else 1.0)
    assert [name for name in order if "search" in name] == [f"search-sums-smt-1pct-t{n}" for n in range(5)]
    again, same = play(study, lambda spec: abs(math.log(spec.learning_rate / 1e-2)) if spec.learning_rate else 1.0)
    assert order == again
    trials = [records[f"search-sums-smt-1pct-t{n}"].run_info for n in range(5)]
    assert trials == [same[f"search-sums-smt-1pct-t{n}"].run_info for n in range(5)]
    assert all(1e-4 <= info["learning_rate"] <= 1e-1 and 0.001 <= info["proposed_budget"] <= 0.05 for info in trials)
    assert len({info["learning_rate"] for info in trials}) == 5
    best = min(trials, key=lambda info: abs(math.log(info["learning_rate"] / 1e-2)))
    final = next(spec for spec in specs(study, records) if spec.stage == "final")
    assert (final.learning_rate, final.config["budget"]) == (best["learning_rate"], best["proposed_budget"])


def test_optuna_goes_on_after_failed_trials() -> None:
    search = Search(learning_rate=Range(low=1e-4, high=1e-1), trials=4)
    past = [({"learning_rate": 1e-2}, math.inf), ({"learning_rate": 1e-3}, 1.0)]
    rate, budget = propose(search, past, seed=0)
    assert 1e-4 <= rate <= 1e-1
    assert budget is None


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 60), st.integers(0, 40), st.integers(0, 6000))
def test_fit_is_the_largest_rank_within_the_budget(slope: int, offset: int, spare: int) -> None:
    ceiling = slope + offset + spare
    size = _largest(lambda r: slope * r + offset, ceiling)
    assert slope * size + offset <= ceiling < slope * (size + 1) + offset


@settings(max_examples=300, deadline=None)
@given(st.integers(100, 60_000), st.integers(1, 60_000))
def test_fit_is_the_fewest_parts_where_more_parts_are_fewer_numbers(numbers: int, ceiling: int) -> None:
    size = _largest(lambda parts: numbers // parts, ceiling)
    assert numbers // size <= ceiling
    assert size == 1 or numbers // (size - 1) > ceiling


def test_fit_says_what_cannot_be_fitted() -> None:
    with pytest.raises(ThriftyError, match="smallest size trains 900 numbers, more than the budget's 100"):
        _largest(lambda r: 900 * r, 100)
    with pytest.raises(ThriftyError, match="changes nothing"):
        _largest(lambda r: 7, 100)
    assert with_fits({"a": ["fit", "3*fit", "outfit", 5]}, 4) == {"a": [4, 12, "outfit", 5]}


@pytest.mark.parametrize(
    ("given", "label", "word"),
    [
        ("1%", "1%", "1pct"),
        (0.005, "0.5%", "0.5pct"),
        (250_000, "250000", "250000"),
        ("5 MB", "5MB", "5MB"),
        ("own", "own", "own"),
    ],
)
def test_budgets(given: Any, label: str, word: str) -> None:
    budget = StudyBudget.parse(given)
    assert (budget.label, budget.word) == (label, word)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metods": {}}, "unknown key of a study 'metods'; did you mean 'methods'?"),
        ({"methods": {}}, "methods is missing"),
        ({"tasks": {"a b": {"train": "x"}}}, "tasks: 'a b' must be letters"),
        ({"tasks": {"a": {"eval": "x"}}}, "tasks.a.train is missing"),
        ({"tasks": {"a": {"train": "x", "measures": {"exact_match": 5}}}}, "tasks.a.eval is missing"),
        ({"tasks": {"a": {"train": "x"}}}, "tasks.a.eval is missing"),
        ({"tasks": {"a": {"train": "x", "evl": "x"}}}, "unknown key 'tasks.a.evl'; did you mean 'tasks.a.eval'?"),
        ({"baseline": "lara"}, "unknown method of this study 'lara'; did you mean 'lora'?"),
        ({"run": {"seed": 3}}, "seed is set by the study (seeds)"),
        ({"run": []}, "run must be a mapping"),
        ({"budgets": ["1%", 0.01]}, "budgets names a budget twice"),
        ({"budgets": "two"}, "nor a size of the result ('5MB'), nor 'own'"),
        ({"seeds": [1, 1]}, "seeds must be different integers"),
        ({"seconds": -1}, "seconds must be above 0"),
        ({"curve": {"evry": 3}}, "did you mean 'curve.every'?"),
        ({"search": {"learning_rate": {"low": 1e-3, "high": 1e-2}}}, "needs search.trials"),
        ({"search": {"trials": 3}}, "search.trials needs a range"),
        ({"search": {"trials": 3, "learning_rate": {"low": 1e-2, "high": 1e-3}}}, "low must be above 0 and below high"),
        ({"search": {"learning_rate": []}}, "rates above 0, at least one"),
    ],
)
def test_a_study_file_is_read_strictly(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ThriftyError) as error:
        load_study(mapping(**changes))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"methods": {"smt": {"smt": {"blok_size": 8}}}},
            "arguments: method smt on task sums: unknown option of method 'smt': 'blok_size'",
        ),
        ({"run": {"model": "smollm2-135m", "max_stepz": 3}}, "did you mean 'max_steps'?"),
        ({"methods": {"a": {"method": {"peft": {"r": "fit"}}, "budgets": "own"}}}, "fit needs a budget to fit"),
        ({"tasks": {"a": {"train": ["x", "y"], "eval": "z"}}}, "`held_out` must say which"),
    ],
)
def test_what_a_run_would_refuse_is_said_before_the_first(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ThriftyError) as error:
        check(load_study(mapping(**changes)))
    assert said in str(error.value)


def test_errors_name_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("methods: {smt: smt}\ntasks:\n  a:\n    train: x\n    evl: y\n")
    with pytest.raises(ThriftyError, match=r"mine\.yaml:5: unknown key 'tasks\.a\.evl'"):
        load_study(file)
    file.write_text(
        "run: {model: smollm2-135m}\ntasks: {a: {train: x, eval: y}}\nmethods:\n  mine: {smt: {scop: global}}\n"
    )
    with pytest.raises(ThriftyError, match=r"mine\.yaml:4: method mine on task a: .*did you mean 'scope'"):
        check(load_study(file))
