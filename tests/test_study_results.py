"""What is read from a study's records: scores, differences, costs, searches, times, and nothing dropped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from made_study import QUALITY, base, final, make_study, rows_of, run, search, write_run

from thrifty.core.errors import ThriftyError
from thrifty.study.curves import Curve, curve, mean_curve, pareto, seconds_to, time_to
from thrifty.study.gather import read_results
from thrifty.study.results import Entry, Results, SearchResult
from thrifty.study.rule import majority_rule
from thrifty.study.statistics import paired_bootstrap, score


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return read_results(make_study(tmp_path_factory.mktemp("made") / "claim"))


def _entry(results: Results, label: str) -> Entry:
    [entry] = [entry for entry in results.entries if entry.label == label]
    return entry


def _read(tmp_path: Path, *records: dict[str, Any], **options: Any) -> Results:
    for record in records:
        write_run(tmp_path, record)
    return read_results(tmp_path, **options)


def test_scores_and_differences_are_those_of_the_rows(results: Results) -> None:
    smt, lora = ([final(m, budget="2%", seed=s, quality=q)["train_info"]["measures"] for s in (0, 1)]
                 for m, q in (("smt", QUALITY["smt"] + 0.03), ("lora", QUALITY["lora"] - 0.06)))  # fmt: skip
    entry = _entry(results, "smt 2%")
    for measure in ("exact_match", "loss"):
        rows = [[run[measure]["rows"] for run in side] for side in (smt, lora)]
        values = [score(seed) for seed in rows[0]]
        found, difference = entry.scores[measure], entry.differences[measure]
        assert found.by_seed == {0: pytest.approx(values[0]), 1: pytest.approx(values[1])}
        assert found.mean == pytest.approx(np.mean(values))
        assert found.standard_error == pytest.approx(scipy.stats.sem(values))
        assert found.low < found.mean < found.high
        expected = paired_bootstrap(*rows)
        assert difference.value == pytest.approx(expected.difference)
        assert (difference.low, difference.high) == (expected.low, expected.high)
        assert difference.verdict == "better"  # more right answers, and less loss
    assert _entry(results, "random_blocks 2%").differences["loss"].verdict == "worse"


def test_entries_are_ordered_by_task_method_and_size(results: Results) -> None:
    # The records were written at the same second, so methods come in the order of their files' names.
    assert [entry.label for entry in results.entries[:4]] == ["full", "lora 0.5%", "lora 2%", "lora 8%"]
    assert results.methods == ("full", "lora", "random_blocks", "smt")
    assert (results.tasks, results.mains, results.baseline) == (("snips",), {"snips": "exact_match"}, "lora")


def test_each_is_compared_at_its_budget_and_own_sizes_with_the_nearest(results: Results) -> None:
    to = {entry.label: {d.to for d in entry.differences.values()} for entry in results.entries}
    assert to["smt 8%"] == {"lora 8%"}
    assert to["full"] == {"lora 8%"}  # 134M: the largest lora is nearest
    assert to["lora 2%"] == set()


def test_a_budget_without_baseline_takes_the_nearest_in_parameters(tmp_path: Path) -> None:
    found = _read(
        tmp_path,
        final("lora", budget="1%", trainable=1_000_000),
        final("lora", budget="4%", trainable=4_000_000),
        final("smt", budget="3%", trainable=3_000_000),
        run("final", "lora", budget="3%", error="no room"),  # at the same budget, but with nothing to compare to
    )
    assert _entry(found, "smt 3%").differences["loss"].to == "lora 4%"


def test_the_baseline_may_be_any_method(tmp_path: Path) -> None:
    records = [final("lora"), final("smt")]
    assert _entry(_read(tmp_path, *records, baseline="smt"), "lora 1%").differences["loss"].to == "smt 1%"
    with pytest.raises(ThriftyError, match="unknown baseline 'smd'; did you mean 'smt'"):
        _read(tmp_path, baseline="smd")


def test_only_seeds_in_common_are_compared(results: Results) -> None:
    entry = _entry(results, "smt 0.5%")
    assert (entry.seeds, entry.failed) == ((0,), {1: "MemoryError: no room"})
    assert entry.differences["loss"].seeds == (0,)
    assert entry.scores["loss"].standard_error is None


def test_no_seed_in_common_is_said(tmp_path: Path) -> None:
    found = _read(tmp_path, final("lora", seed=0), final("smt", seed=1))
    assert _entry(found, "smt 1%").differences == {}
    assert "snips: smt 1% and lora 1% have no seed in common for exact_match: no difference is given." in found.notes


def test_other_rows_give_a_difference_without_interval(tmp_path: Path) -> None:
    short = final("smt")
    short["train_info"]["measures"]["exact_match"]["rows"] = rows_of(np.ones(10))
    found = _read(tmp_path, final("lora"), short)
    difference = _entry(found, "smt 1%").differences["exact_match"]
    assert (difference.low, difference.high, difference.verdict) == (None, None, "unclear")
    assert difference.value == pytest.approx(1 - _entry(found, "lora 1%").scores["exact_match"].mean)
    assert any("different rows of exact_match" in note for note in found.notes)


def test_scores_without_rows_keep_mean_and_standard_error(tmp_path: Path) -> None:
    records = [
        run("final", m, seed=s, measures={"arc_easy/acc": {"score": x}}, num_trainable_params=5, num_total_params=10)
        for m, values in (("lora", (0.4, 0.5)), ("smt", (0.5, 0.54)))
        for s, x in enumerate(values)
    ]
    entry = _entry(_read(tmp_path, *records), "smt 1%")
    found = entry.scores["arc_easy/acc"]
    assert (found.mean, found.low) == (pytest.approx(0.52), None)
    assert found.standard_error == pytest.approx(0.02)
    assert entry.differences["arc_easy/acc"].value == pytest.approx(0.07)


def test_forgetting_is_the_rise_over_the_base_model(results: Results) -> None:
    before = score(base()["train_info"]["measures"]["forgetting"]["rows"])
    for entry in results.entries:
        assert entry.forgetting is not None
        assert entry.forgetting.value == pytest.approx(entry.scores["forgetting"].mean - before)
        assert entry.forgetting.verdict == "worse"
    assert results.gain(_entry(results, "smt 2%")) == pytest.approx(
        _entry(results, "smt 2%").scores["exact_match"].mean
    )


def test_costs_are_means_over_finished_seeds(tmp_path: Path) -> None:
    runs = [
        final("smt", seed=s, train_time=t, accelerator_memory_max=m) for s, t, m in ((0, 10.0, 5e6), (1, 30.0, 7e6))
    ]
    entry = _entry(_read(tmp_path, *runs, run("final", "smt", seed=2, error="stopped")), "smt 1%")
    costs = entry.costs
    assert (costs.train_seconds, costs.peak_bytes, costs.probe_seconds) == (20.0, 6e6, 12.0)
    assert costs.share == pytest.approx(1_300_000 / 134_515_008)
    assert (costs.tokens_per_second, costs.file_bytes) == (500.0, 5_200_000)
    assert entry.learning_rate == 0.003


def test_every_failure_is_listed_with_its_reason(results: Results, tmp_path: Path) -> None:
    assert ("final-snips-smt-0.5pct-s1", "MemoryError: no room") in [(f.name, f.message) for f in results.failures]
    assert sum(f.stage == "search" for f in results.failures) == 7
    wild = final("smt", measures={"loss": {"rows": [[math.nan, 3.0]]}})
    found = _read(tmp_path, final("lora"), wild, run("base", budget=None, error="no data"))
    assert {f.message for f in found.failures} == {"its loss is nan", "no data"}
    assert _entry(found, "smt 1%").failed == {0: "its loss is nan"}
    assert _entry(found, "smt 1%").scores == {}


def test_a_method_whose_searches_all_failed_is_still_there(tmp_path: Path) -> None:
    found = _read(tmp_path, final("lora"), *search("smt", {1e-3: None, 3e-3: None}))
    entry = _entry(found, "smt 1%")
    assert (entry.seeds, entry.failed) == ((), {})
    assert entry.search is not None
    assert entry.search.best is None


def test_searches_know_their_best_rate_and_whether_it_is_inside(results: Results) -> None:
    inside, edge = _entry(results, "lora 2%").search, _entry(results, "smt 2%").search
    assert inside is not None
    assert edge is not None
    assert (inside.best, inside.interior, inside.losses[0.01]) == (0.003, True, math.inf)
    assert (edge.best, edge.interior) == (0.01, False)
    assert SearchResult(losses={0.1: 2.0}).interior is False


def test_chosen_shares_are_means_over_seeds(tmp_path: Path) -> None:
    runs = [final("smt", seed=0, chosen={"a": [1, 10], "b": [5, 10]}), final("smt", seed=1, chosen={"a": [3, 10]})]
    assert _entry(_read(tmp_path, *runs), "smt 1%").chosen == {"a": pytest.approx(0.2), "b": pytest.approx(0.25)}


# --- time to a given quality ---


def test_time_to_quality_by_hand() -> None:
    lora = Curve((0, 10, 20), (0.0, 10.0, 20.0), (2.0, 1.0, 1.2))  # its best, 1.0, after 10 s
    smt = Curve((0, 10, 20), (4.0, 8.0, 12.0), (2.0, 1.5, 0.5))  # 1.0 half-way between 8 and 12 s
    found = time_to([smt], [lora])
    assert found is not None
    assert (found.loss, found.seconds, found.baseline_seconds, found.ratio) == (1.0, 10.0, 10.0, 1.0)
    assert time_to([Curve((0, 10), (0.0, 9.0), (2.0, 1.1))], [lora]).ratio is None  # never
    assert time_to([lora], [lora]).ratio == 1.0
    assert time_to([Curve((), (), ())], [lora]) is None
    assert time_to([], [lora]) is None


def test_the_mean_over_seeds_decides() -> None:
    seeds = [Curve((0, 10), (0.0, 10.0), (2.0, 1.0)), Curve((0, 10, 20), (0.0, 14.0, 30.0), (2.0, 2.0, 0.0))]
    assert mean_curve(seeds) == Curve((0, 10), (0.0, 12.0), (2.0, 1.5))
    assert seconds_to(mean_curve(seeds), 1.75) == 6.0


def test_curves_of_records(results: Results) -> None:
    entry = _entry(results, "smt 2%")
    assert entry.curves[0].steps == tuple(range(0, 90, 10))
    assert entry.curves[0].seconds[0] == 12.0  # the probe
    assert entry.train_curves[0].steps == tuple(range(10, 90, 10))
    assert entry.time_to is not None
    assert entry.time_to.ratio < 1
    assert _entry(results, "random_blocks 2%").time_to.seconds is None
    assert curve([{"step": 2, "train time": 1.0, "train loss": 3.0}]).steps == ()


@given(
    st.lists(st.tuples(st.floats(0, 10), st.floats(-5, 5)), min_size=1, max_size=12),
    st.sampled_from(["higher", "lower"]),
)
def test_the_pareto_front_is_what_nothing_beats(points: list[tuple[float, float]], better: str) -> None:
    costs, qualities = zip(*points)
    sign = 1 if better == "higher" else -1

    def beaten(i: int) -> bool:
        return any(
            costs[j] <= costs[i] and sign * qualities[j] >= sign * qualities[i]
            and (costs[j], qualities[j]) != (costs[i], qualities[i])
            for j in range(len(points))
        )  # fmt: skip

    front = pareto(costs, qualities, better=better)
    assert set(front) == {i for i in range(len(points)) if not beaten(i)}
    assert [costs[i] for i in front] == sorted(costs[i] for i in front)


# --- which measure counts ---


def test_exact_match_counts_where_full_beats_the_floor(results: Results) -> None:
    rule = results.rules["snips"]["exact_match"]
    assert rule.counts is True
    assert "snips: exact_match counts: full fine-tuning scores" in rule.words


def test_a_measure_that_does_not_count_gives_way_to_the_loss(tmp_path: Path) -> None:
    untrained = base()
    untrained["train_info"]["measures"] = {
        "choice": {"rows": rows_of(np.arange(200) < 60), "majority": 0.44},
        "loss": {"rows": [[2.0, 1.0]]},
    }
    measured = {"choice": {"rows": rows_of(np.arange(200) < 90)}, "loss": {"rows": [[1.0, 1.0]]}}
    records = [untrained, *(final(m, measures=measured) for m in ("full", "smt"))]
    found = _read(tmp_path, *records, main="choice")
    rule = found.rules["snips"]["choice"]
    assert rule.counts is False  # .45 of 200 rows has a standard error of .035: the majority's .44 is not beaten
    assert "not 3 standard errors above the most frequent answer, 0.440; the loss is the measure there" in rule.words
    assert found.mains == {"snips": "loss"}


def test_three_standard_errors_are_the_line() -> None:
    judged = {"task": "t", "measure": "choice", "floor": 0.25, "floor_is": "the base model"}
    assert majority_rule(full=0.5, error=0.08, **judged).counts is True
    assert majority_rule(full=0.5, error=0.084, **judged).counts is False
    assert majority_rule(full=None, error=None, **judged).counts is None
    assert "no standard error" in majority_rule(full=0.5, error=None, **judged).words


def test_the_main_measure_is_the_one_asked_for(tmp_path: Path) -> None:
    records = [final("smt"), final("smt", task="gsm8k", measures={"loss": {"rows": [[1.0, 1.0]]}})]
    assert _read(tmp_path, *records).mains == {"snips": "exact_match", "gsm8k": "loss"}
    assert _read(tmp_path, main="loss").mains == {"snips": "loss", "gsm8k": "loss"}
    assert _read(tmp_path, main={"snips": "forgetting"}).mains == {"snips": "forgetting", "gsm8k": "loss"}
    with pytest.raises(ThriftyError, match="unknown measure 'exact'"):
        _read(tmp_path, main="exact")


def test_a_folder_without_records_says_so(tmp_path: Path) -> None:
    with pytest.raises(ThriftyError, match="holds no records of runs"):
        read_results(tmp_path)
