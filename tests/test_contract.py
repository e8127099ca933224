"""The design's invariants for every method, family and setting. Nothing is skipped: what does not apply is no cell."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from contract_cells import (
    CELLS,
    LAYERS,
    LENGTH,
    METHODS,
    ROWS,
    STEPS,
    WAYS,
    Cell,
    Trained,
    logits,
    named,
    summed_loss,
)
from families import batches, build
from torch import Tensor, nn

from thrifty.core.entries import Entries
from thrifty.core.low_rank import LowRank
from thrifty.core.projected import Projected
from thrifty.core.region import Blocks
from thrifty.core.rotated import Rotated
from thrifty.delta import Delta
from thrifty.kernels.entry_grad import EntryLayout
from thrifty.select.targets import targets
from thrifty.update.linear import LinearPart
from thrifty.update.low_rank import LowRankPart
from thrifty.update.tuning import Tuning, attach_with

SELECTING = [cell for cell in CELLS if METHODS[cell[0]].blocks]
EXACT = [cell for cell in CELLS if METHODS[cell[0]].exact]
# largest relative error of a gradient: float32 sums in another order; bfloat16 keeps 8 bits
ROUNDING = {"float32": 1e-5, "float32+bf16": 2e-2, "bfloat16": 2e-2}
_asked: Counter[str] = Counter()
_cells: set[tuple[str, ...]] = set()
_merged: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def count(request: pytest.FixtureRequest) -> Iterator[None]:
    """Prints how many cells were asked how much, and what merging changed, whatever captures output."""
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\ncontract: {len(_cells)} cells of {len(CELLS)}, {sum(_asked.values())} checks: {dict(_asked)}")
        print(f"largest logit difference of a merged peer: { {k: f'{v:.1e}' for k, v in _merged.items()} }")


@pytest.fixture(autouse=True)
def forced(request: pytest.FixtureRequest) -> Iterator[None]:
    """The cell's own way to its gradients, where it names one."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    cell = params.get("cell") or Cell(*params.get("trained", ("", "", "")))
    with cell.forced():
        yield


def note(invariant: str, cell: Cell) -> None:
    _asked[invariant] += 1
    _cells.add((cell.name, cell.family, cell.setting, cell.way or ""))


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest) -> Trained:
    """The cell, trained once for all that ask about it."""
    return Trained(Cell(*request.param))


def over(cells: list[tuple[str, ...]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("trained", cells, indirect=True, scope="module", ids="-".join)


def over_fresh(cells: list[tuple[str, ...]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("cell", [Cell(*c) for c in cells], ids=["-".join(c) for c in cells])


def relative(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def merged_difference(cell: Cell, one: Tensor, other: Tensor) -> float:
    """Largest logit difference of any token; of the median token where rounding may send one to another expert."""
    tokens = (one.float() - other.float()).abs().amax(-1).flatten()
    return float(tokens.median() if (cell.family, cell.setting) == ("mixtral", "bfloat16") else tokens.max())


def check_merged(trained: Trained, after: Tensor) -> None:
    """What was beside the weights and is now in them changes the logits within the row's tolerance."""
    cell = trained.cell
    assert cell.row.tolerance is not None
    difference = merged_difference(cell, after, trained.logits)
    assert difference <= cell.row.tolerance[cell.setting]
    _merged[cell.setting] = max(_merged.get(cell.setting, 0.0), difference)


def expected_gradient(tuning: Tuning, name: str, dense: Tensor) -> Tensor:
    """The dense gradient G of W, gathered; of a low-rank pair s B^T G beside (s G A^T)^T; seen in a rotated basis."""
    region, leaf = tuning.plan[name], tuning.named_leaves()[name]
    if isinstance(region, Rotated):
        return region.basis.rows.to(leaf.dtype).t() @ dense.to(leaf.dtype) @ region.basis.columns.to(leaf.dtype)
    if isinstance(region, Projected):
        return region.left.to(leaf.dtype).t() @ dense.to(leaf.dtype) @ region.right.to(leaf.dtype).t()
    if not isinstance(region, LowRank):
        return region.gather(dense).view_as(leaf)
    g_OI = dense.to(leaf.dtype)
    part = tuning._parts[name]
    assert isinstance(part, LowRankPart)
    g_OI = g_OI.t() if part.transposed else g_OI
    a, b_transposed = leaf.detach().split([g_OI.shape[1], g_OI.shape[0]], dim=1)
    return region.alpha / region.r * torch.cat([b_transposed @ g_OI, a @ g_OI.t()], dim=1)


@pytest.mark.parametrize("cell", [Cell(*c) for c in CELLS if len(c) == 4], ids=lambda c: f"{c.name}-{c.family}-{c.way}")
def test_a_forced_way_is_the_one_taken(cell: Cell) -> None:
    for part in cell.attach(cell.build())._parts.values():
        if not isinstance(part, LinearPart):
            continue
        layout = part.member.layout
        if isinstance(layout, EntryLayout):
            assert layout.sampled == (cell.way == "sampled")
        else:
            assert cell.way is not None
            wanted = [WAYS[cell.way](group) for group in layout.groups]
            assert [type(way) for way in layout.ways(torch.device("cpu"))] == [type(way) for way in wanted]


@over(SELECTING)
def test_the_table_trains_two_matrices_a_ragged_edge_and_leaves_one_untouched(trained: Trained) -> None:
    plan, cell = trained.plan, trained.cell
    assert len(plan) >= 2
    assert set(targets(cell.build(), "all-linear")) - set(plan)
    assert all(isinstance(region, Blocks) for region in plan.values())
    assert any((g.h, g.w) != r.shape for n, r in plan.items() for g in r.groups(plan.shapes[n]))
    assert 0.9 * 0.02 <= plan.trainable_share <= 0.02
    note("table", cell)


@over(CELLS)
def test_1_what_is_not_planned_is_bit_identical_and_what_is_planned_changed(trained: Trained) -> None:
    cell, start = trained.cell, trained.start
    if cell.row.exact:
        for name, region in trained.plan.items():
            if isinstance(region, LowRank):
                assert torch.equal(trained.attached[name], start[name]), name
        after = named(trained.finished) if cell.row.pairs else trained.attached
        now = {n: p for n, p in after.items() if n in start}
        changed = trained.delta.plan  # of all plans, where it changed on the way
        assert now.keys() == start.keys()
        for name, before in start.items():
            moved = now[name] != before
            if name not in changed:
                assert not moved.any(), name
                continue
            region = changed[name]
            assert not moved[~region.mask(before.shape)].any(), name
            assert moved.any(), name
            if isinstance(region, Blocks):
                for group in region.groups(before.shape):
                    rows, cols = group.element_index()
                    assert moved.reshape(-1, moved.shape[-1])[rows, cols].flatten(1).any(1).all(), name
    else:
        # under its adapter the base is untouched, and merging touches only what the adapter sits on
        weights = trained.tuning.model.get_base_model().named_parameters()
        frozen = {n.replace(".base_layer", ""): p for n, p in weights if ".lora_" not in n}
        assert frozen.keys() == start.keys()
        assert all(torch.equal(frozen[name], before) for name, before in start.items())
        assert all(leaf.any() for name, leaf in trained.leaves.items() if "lora_B" in name)
        merged = named(trained.finished)
        for name, before in start.items():
            assert torch.equal(merged[name], before) == (name not in trained.delta.base), name
    note("1 only the plan", cell)


@over(CELLS)
def test_2_the_delta_makes_the_trained_model_and_takes_it_back(trained: Trained, tmp_path: Path) -> None:
    cell = trained.cell
    trained.delta.save(tmp_path / "delta")
    delta, base = Delta.load(tmp_path / "delta"), cell.build()
    before = logits(base)
    base = delta.apply(base)
    if cell.row.pairs:
        check_merged(trained, logits(base))
        assert torch.equal(logits(base), logits(trained.finished))
        for name, tensor in trained.finished.named_parameters():
            assert torch.equal(dict(base.named_parameters())[name], tensor), name
    elif cell.row.exact:
        assert torch.equal(logits(base), trained.logits)
        for name, tensor in base.named_parameters():
            assert torch.equal(tensor, trained.attached[name]), name
    else:
        check_merged(trained, logits(base))
        assert delta.difference is not None
        _merged[cell.setting] = max(_merged.get(cell.setting, 0.0), delta.difference)
    assert not torch.equal(logits(base), before)
    delta.remove(base)
    assert torch.equal(logits(base), before)
    for name, tensor in base.named_parameters():
        assert torch.equal(tensor, trained.start[name]), name
    note("2 delta", cell)


@over(EXACT)
def test_9_delta_files_hold_at_most_2_2_times_the_region(trained: Trained, tmp_path: Path) -> None:
    trained.delta.save(tmp_path / "delta")
    size = sum(file.stat().st_size for file in (tmp_path / "delta").iterdir())
    # pairs are kept as they were trained, in float32
    region = sum(
        count * (4 if isinstance(trained.delta.plan[name], LowRank) else trained.cell.dtype.itemsize)
        for name, count in trained.delta.plan.sizes.items()
    )
    entries = [region.size(()) for region in trained.delta.plan.values() if isinstance(region, Entries)]
    constant = 1024 * (1 + len(trained.delta.plan))  # names, hashes and shapes: a kilobyte for each tensor
    assert size <= 2.2 * region + 4 * sum(entries) + constant  # an entry needs its place, which a block hardly does
    note("9 delta size", trained.cell)


@over(CELLS)
def test_3_a_plain_checkpoint_loaded_by_transformers_alone_gives_the_logits(trained: Trained, tmp_path: Path) -> None:
    model = trained.finished
    assert type(model) is type(trained.cell.build())
    model.save_pretrained(tmp_path / "plain")
    plain = type(model).from_pretrained(tmp_path / "plain", dtype=trained.cell.dtype, attn_implementation="eager")
    assert torch.equal(logits(plain), logits(model))
    if trained.cell.row.exact and not trained.cell.row.pairs:
        assert torch.equal(logits(plain), trained.logits)
    else:
        check_merged(trained, logits(plain))
    note("3 plain checkpoint", trained.cell)


@over_fresh(EXACT)
def test_4_the_gradient_is_the_dense_one_gathered(cell: Cell) -> None:
    tuning, twin = cell.attach(cell.build()), cell.build()
    (batch,) = batches(1, ROWS, LENGTH, seed=2)
    cell.backward(tuning.model, batch, 1)
    cell.backward(twin, batch, 1)
    dense = {name: p.grad for name, p in twin.named_parameters()}
    for name, leaf in tuning.named_leaves().items():
        expected = expected_gradient(tuning, name, dense[name])
        assert leaf.grad.dtype == leaf.dtype == torch.float32
        assert relative(leaf.grad, expected) <= ROUNDING[cell.setting], name
    note("4 gradient", cell)


@pytest.mark.parametrize(("name", "family"), [(n, f) for n, row in METHODS.items() if row.exact for f in row.families])
def test_4_the_gradient_is_the_dense_one_in_float64(name: str, family: str) -> None:
    cell, (batch,) = Cell(name, family, "float32"), batches(1, ROWS, LENGTH, seed=2)
    model, twin = (build(family, torch.float64, layers=LAYERS) for _ in range(2))
    if family == "mixtral":  # the grouped product of stacked experts has no float64
        model.set_experts_implementation("eager")
        twin.set_experts_implementation("eager")
    tuning = cell.attach(model)
    summed_loss(tuning.model, batch).backward()
    summed_loss(twin, batch).backward()
    dense = {name: p.grad for name, p in twin.named_parameters()}
    for name, leaf in tuning.named_leaves().items():
        assert leaf.grad.dtype == torch.float64
        assert relative(leaf.grad, expected_gradient(tuning, name, dense[name])) < 1e-12, name
    _asked["4 gradient, float64"] += 1


@over_fresh(CELLS)
def test_5_micro_batches_add_up_to_the_big_batch(cell: Cell) -> None:
    tuning, (batch,) = cell.attach(cell.build()), batches(1, ROWS, LENGTH, seed=3)
    items = int((batch["labels"][:, 1:] != -100).sum())
    found = []
    for size in (ROWS, 1):
        for leaf in tuning.parameters():
            leaf.grad = None
        for i in range(0, ROWS, size):
            cell.backward(tuning.model, {k: v[i : i + size] for k, v in batch.items()}, items)
        found.append({name: leaf.grad.clone() for name, leaf in tuning.named_leaves().items()})
    whole, parts = (torch.cat([g.flatten() for g in grads.values()]) for grads in found)
    assert relative(parts, whole) <= ROUNDING[cell.setting]
    note("5 accumulation", cell)


@over(CELLS)
def test_5_resumed_from_its_state_it_ends_bit_identical(trained: Trained) -> None:
    cell = trained.cell
    first = cell.attach(cell.build())
    optimizer = cell.optimizer(first)
    cell.steps(first, optimizer, last=1)
    state = {name: t.clone() for name, t in first.state().items()}
    plan = first.plan if cell.row.exact else None
    second = attach_with(cell.build(), cell.row.method, budget=cell.row.budget, seed=1, plan=plan)
    resumed = cell.optimizer(second)
    if cell.row.scheduled:
        second.restore(first.plan, state, copy.deepcopy(first.progress()))
    else:
        second.load_state(state)
    resumed.load_state_dict(optimizer.state_dict())
    cell.steps(second, resumed, first=1, last=STEPS)
    for name, leaf in second.named_leaves().items():
        assert torch.equal(leaf, trained.leaves[name]), name
    assert torch.equal(logits(second.model), trained.logits)
    note("5 resume", cell)


@over(CELLS)
def test_7_the_same_seed_gives_the_same_result(trained: Trained) -> None:
    again = Trained(trained.cell)
    assert again.plan.keys() == trained.plan.keys()
    assert all(again.plan[name] == region for name, region in trained.plan.items())
    assert all(torch.equal(again.attached[name], p) for name, p in trained.attached.items())
    assert torch.equal(again.logits, trained.logits)
    note("7 same seed", trained.cell)


@over_fresh(SELECTING)
def test_9_what_is_kept_for_backward_is_the_used_columns(cell: Cell) -> None:
    tuning, (batch,) = cell.attach(cell.build()), batches(1, ROWS, LENGTH, seed=4)
    inside: list[nn.Module] = []
    kept: dict[nn.Module, dict[int, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if inside:
            storage = tensor.untyped_storage()
            kept[inside[-1]][storage.data_ptr()] = storage.nbytes()
        return tensor

    def enter(module: nn.Module, _: object) -> None:
        inside.append(module)
        kept[module] = {}

    parts = {name: part for name, part in tuning._parts.items() if isinstance(part, LinearPart)}
    for part in parts.values():
        part.module.register_forward_pre_hook(enter)
        part.module.register_forward_hook(lambda *_: inside.pop() and None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), cell.autocast():
        loss = summed_loss(tuning.model, batch)
    compute = torch.bfloat16 if "bf" in cell.setting else torch.float32
    assert parts
    for name, part in parts.items():
        mask = tuning.plan[name].mask(tuning.plan.shapes[name])
        columns = int(mask.any(1 if part.member.transposed else 0).sum())
        assert sum(kept[part.module].values()) == ROWS * LENGTH * columns * compute.itemsize, name
    loss.backward()
    note("9 kept bytes", cell)
