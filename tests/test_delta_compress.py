"""Compressed deltas: what is lost is bounded and measured, the base never is, and files are as small as computed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_changes import KINDS, bits, change_of, dense, exact_both_ways, holder, one
from families import batches, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thrifty import attach
from thrifty.core.errors import ThriftyError
from thrifty.core.low_rank import LowRank
from thrifty.core.region import Whole
from thrifty.delta import Delta, LowRankPiece, Piece
from thrifty.delta.algebra import average, combine, stack, transfer
from thrifty.delta.coded import CodedPiece
from thrifty.delta.compress import compress, measure
from thrifty.delta.files import nbytes

DTYPES = [torch.float32, torch.bfloat16]


def within_half_a_scale(found: Tensor, exact: Tensor, top: int) -> None:
    """Along the last axis, 64 numbers share a scale; scales are rounded up to bfloat16."""
    for here, true in zip(found.split(64, dim=-1), exact.split(64, dim=-1), strict=True):
        bound = true.abs().amax(dim=-1, keepdim=True) / top / 2 * (1 + 2**-7)
        assert ((here - true).abs() <= bound * (1 + 1e-9) + 5e-41).all()


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    shape=st.tuples(st.integers(10, 20), st.integers(10, 20)),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1e-6, 1e-3, 0.1, 30.0]),
    how=st.sampled_from(["int8", "int4"]),
    seed=st.integers(0, 99),
)
def test_int8_and_int4_are_off_by_half_a_scale_and_exact_both_ways(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    size: float,
    how: str,
    seed: int,
) -> None:
    base, delta = change_of(kind, shape, dtype, size, seed)
    small = compress(delta, how, base={"w": base})
    piece, old = small.pieces["w"], delta.pieces["w"]
    assert isinstance(piece, CodedPiece)
    top = 127 if how == "int8" else 7
    if isinstance(old, LowRankPiece):
        for found, true in zip(piece.factors(), old.factors(), strict=True):
            rows = (found.mT, true.mT) if found.shape[1] == 4 else (found, true)
            within_half_a_scale(rows[0].double(), rows[1].double(), top)
    else:
        within_half_a_scale(piece.change().flatten(), old.change().flatten(), top)
        assert small.plan["w"] == delta.plan["w"]
    exact_both_ways(small, base, tmp_path_factory.mktemp("small") / "d")


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    shape=st.tuples(st.integers(10, 20), st.integers(10, 20)),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1e-3, 1.0]),
    how=st.sampled_from(["delta_come=1x8,2x3,3x2", "delta_come=2x5", "delta_come=1x7,1x1", "delta_come=99x6"]),
    seed=st.integers(0, 99),
)
def test_delta_come_is_exact_both_ways_on_every_region(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    size: float,
    how: str,
    seed: int,
) -> None:
    base, delta = change_of(kind, shape, dtype, size, seed)
    small = compress(delta, how, base={"w": base})
    loaded = exact_both_ways(small, base, tmp_path_factory.mktemp("small") / "d")
    if how == "delta_come=99x6" and isinstance(loaded.pieces["w"], CodedPiece):  # every vector that there is
        assert measure(delta, loaded).total.error < 0.1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("how", "width"), [("int8", 8), ("int4", 4)])
def test_a_file_is_as_small_as_computed(tmp_path: Path, dtype: torch.dtype, how: str, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(400, 300, generator=generator).to(dtype)
    trained = (base + 0.01 * torch.randn(400, 300, generator=generator)).to(dtype)
    delta = Delta({"w": Piece.of(base, trained, Whole())}, method={}, total=base.numel())
    small = compress(delta, how)
    small.save(tmp_path / "d")
    piece, size = small.pieces["w"], base.numel()
    assert isinstance(piece, CodedPiece)
    assert len(piece.codes) == size * width // 8
    assert piece.scales.nbytes == 2 * size // 64
    assert 8 * len(piece.back) / size < 0.3
    expected = size * (width + 0.25) / 8 + len(piece.back)
    assert 0 <= (tmp_path / "d" / "delta.safetensors").stat().st_size - expected < 600
    report = measure(delta, Delta.load(tmp_path / "d"))
    assert report.total == report.tensors["w"]
    assert (report.total.bytes_before, report.total.bytes_after) == (2 * base.nbytes, expected)
    lost = (piece.change() - (trained.double() - base.double())).norm() / (trained.double() - base.double()).norm()
    assert math.isclose(report.total.error, lost, rel_tol=1e-9)
    assert report.total.error < (0.01 if width == 8 else 0.15)


@pytest.mark.parametrize("how", ["int8", "int4", "delta_come=2x8,2x2"])
@pytest.mark.parametrize(
    "change", [0.0, -0.0, 1e-45, 1.65e-38, 1e30, 3e38, [0.0, 1e-45, 1e38], [3e38, 1.0, 0.0]], ids=str
)
def test_changes_of_any_size(tmp_path: Path, how: str, change: Any) -> None:
    base = torch.zeros(12, 30)
    trained = base.clone()
    trained.view(-1)[: 3 * 64] = torch.tensor(change).repeat(64 * 3)[: 3 * 64]
    small = compress(Delta({"w": Piece.of(base, trained, Whole())}, method={}, total=360), how)
    loaded = exact_both_ways(small, base, tmp_path / "d")
    if how != "delta_come=2x8,2x2":
        exact = trained.double() - base.double()
        within_half_a_scale(loaded.pieces["w"].change().flatten(), exact.flatten(), 127 if how == "int8" else 7)
    if change in (0.0, -0.0):
        assert not loaded.pieces["w"].change().any()


def test_a_change_across_the_whole_range_and_beyond_it(tmp_path: Path) -> None:
    base, trained = torch.full((12, 30), -3e38), torch.full((12, 30), 3e38)
    exact_both_ways(compress(one(base, trained), "int8"), base, tmp_path / "d")
    top = torch.full((12, 30), torch.finfo(torch.float32).max)
    with pytest.raises(ThriftyError, match=r"^w: base . compressed change is not finite in torch.float32"):
        compress(one(torch.zeros(12, 30), top), "int4").pieces["w"]
    with pytest.raises(ThriftyError, match=r"^w changes by more than a scale in bfloat16 holds"):
        compress(one(torch.zeros(12, 30).double(), torch.full((12, 30), 1e300, dtype=torch.float64)), "int8").pieces[
            "w"
        ]


@pytest.mark.parametrize("how", ["int8", "int4", "top_k=10%", "delta_come=2x8"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_refused(how: str, value: float) -> None:
    trained = torch.ones(12, 30)
    trained[3, 3] = value
    with pytest.raises(ThriftyError, match=r"^w changes by numbers that are not finite"):
        compress(one(torch.zeros(12, 30), trained), how).pieces["w"]


def decaying(side: int) -> Tensor:
    """A matrix whose k-th singular value is 1 / k."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(side, side, generator=generator).double())[0] for _ in range(2))
    return (u / torch.arange(1, side + 1)) @ v.T


def test_delta_come_beats_low_rank_and_low_bit_of_the_same_size() -> None:
    side, numbers = 256, 256**2
    change = decaying(side)
    base = torch.randn(side, side, generator=torch.Generator().manual_seed(1))
    delta = one(base, (base.double() + change).float())

    def error(how: str) -> tuple[float, int]:
        piece = compress(delta, how).pieces["w"]
        assert isinstance(piece, CodedPiece)
        return float((piece.change() - change).norm() / change.norm()), len(piece.codes) + piece.scales.nbytes

    # a sixteenth of 16 bits: 8 vectors on each side at 16 bits, or the signs and their mean size
    come, size = error("delta_come")
    assert 0.95 * numbers / 8 < size <= numbers / 8
    values = torch.linalg.svdvals(change)
    low_rank = float(values[8:].norm() / values.norm())
    one_bit = float((change.sign() * change.abs().mean() - change).norm() / change.norm())
    assert come < 0.75 * low_rank < one_bit
    # the size of int4
    plain, room = error("int4")
    mixed, size = error("delta_come=16x8,60x5,53x2")
    assert 0.95 * room < size <= room
    values_left = 4.25 * numbers / 16 / (2 * side)
    assert mixed < 0.75 * plain
    assert mixed < float(values[int(values_left) :].norm() / values.norm())


def test_compressed_deltas_add_stack_and_transfer(tmp_path: Path) -> None:
    base, delta = change_of("blocks", (20, 16), torch.float32, 0.1, 0)
    trained = holder(w=base)
    int8 = compress(delta, "int8")
    double = combine([(int8, 2.0)], base={"w": base})
    model = holder(w=base)
    double.apply(model)
    torch.testing.assert_close(model.w.detach().double(), base + 2 * dense(int8.pieces["w"]), rtol=1e-6, atol=1e-9)
    double.remove(model)
    assert bits(model.w) == bits(base)
    with pytest.raises(ThriftyError, match=r"w was changed by a low-rank pair or is compressed.* give the base model"):
        combine([(int8, 2.0)]).pieces["w"]
    assert combine([(int8, 1.0)]).pieces["w"].to_files()[0] == int8.pieces["w"].to_files()[0]
    int8.apply(trained)
    middle = trained.w.detach().clone()
    on_top = compress(one(middle, middle + 0.5), "int4")
    both = stack(int8, on_top, base={"w": base})
    on_top.apply(trained)
    both.apply(model)
    assert bits(model.w) == bits(trained.w)
    newer = base + 1
    moved = transfer(int8, {"w": newer})
    assert isinstance(moved.pieces["w"], CodedPiece)
    exact_both_ways(moved, newer, tmp_path / "d")


def test_compressed_pairs_stay_pairs_in_sums() -> None:
    base, one_ = change_of("low_rank", (20, 16), torch.float32, 0.1, 0)
    pair = compress(one_, "int8", base={"w": base})
    come = compress(one_, "delta_come=2x8,1x4", base={"w": base})
    assert come.plan["w"] == LowRank(3, 3.0)
    mean = average([pair, come], base={"w": base})
    assert mean.plan["w"] == LowRank(7, 7.0)
    expected = (dense(pair.pieces["w"]) + dense(come.pieces["w"])) / 2
    torch.testing.assert_close(dense(mean.pieces["w"]), expected, rtol=1e-5, atol=1e-7)
    again = compress(pair, "int4", base={"w": base})
    assert nbytes(again.pieces["w"]) < nbytes(pair.pieces["w"])


def test_a_trained_model_keeps_its_logits(tmp_path: Path) -> None:
    model = build("llama", layers=1)
    tuning = attach(model, {"random_blocks": {"block_size": 8}}, budget=0.3)
    for leaf in tuning.parameters():
        leaf.data.add_(0.05 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0)))
    tuning.sync()
    delta = tuning.delta()
    tuning.finish()
    (batch,) = batches(1, 2, 8)
    expected, plain = model(**batch).logits, build("llama", layers=1)(**batch).logits
    moved = (expected - plain).abs().max()
    for how, share in (("int8", 0.02), ("int4", 0.2)):
        compress(delta, how).save(tmp_path / how)
        base = build("llama", layers=1)
        before = {name: bits(p) for name, p in base.named_parameters()}
        loaded = Delta.load(tmp_path / how)
        loaded.apply(base)
        assert 0 < (base(**batch).logits - expected).abs().max() < share * moved
        loaded.remove(base)
        assert {name: bits(p) for name, p in base.named_parameters()} == before
