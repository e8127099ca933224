"""A batch whose rows have a delta each: what each delta alone computes, within rounding, on an untouched base."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import batches, build
from made_deltas import bits, refused, tuned
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from thrifty import Deltas
from thrifty.core.entries import Entries
from thrifty.core.low_rank import LowRank
from thrifty.core.region import Blocks, Region, Whole
from thrifty.delta import Delta, additive

FAMILIES = ("llama", "gpt2", "qwen2")


def parts(model: nn.Module) -> dict[str, Delta]:
    """Deltas that together change every tensor, in every form."""
    generator = torch.Generator().manual_seed(0)
    found = dict(model.named_parameters())
    matrices = [name for name, p in found.items() if p.ndim == 2 and re.search(r"\.\d+\.", name)]

    def some(shape: tuple[int, ...], h: int, w: int) -> Blocks:
        grid = torch.rand(-(-shape[0] // h), -(-shape[1] // w), generator=generator) < 0.4
        grid.view(-1)[-1] = True  # a corner, smaller than the others
        return Blocks((h, w), grid.nonzero())

    regions: dict[str, dict[str, Region]] = {name: {} for name in ("blocks", "lines", "entries", "pairs", "rest")}
    for k, name in enumerate(matrices):
        h, w = found[name].shape
        regions["blocks"][name] = some((h, w), 16, 16)
        regions["lines"][name] = some((h, w), 1, w) if k % 2 else some((h, w), h, 1)
        regions["entries"][name] = Entries(torch.randperm(h * w, generator=generator)[: h * w // 10])
        regions["pairs"][name] = LowRank(3, 6.0)
    for k, (name, p) in enumerate(found.items()):
        if name not in matrices:
            regions["rest"][name] = some(tuple(p.shape), 4, p.shape[1]) if p.ndim == 2 and k % 2 else Whole()
        if p.ndim == 1 and name.endswith("bias"):
            regions["entries"][name] = Entries(torch.arange(0, len(p), 3))
    regions["rest"][matrices[0]] = Whole()
    return {name: tuned(model, region, seed=k, size=0.05) for k, (name, region) in enumerate(regions.items())}


REQUESTS = [None, "blocks", "lines", "entries", "pairs", "rest", "blocks"]


def padded(rows: int, length: int) -> dict[str, Tensor]:
    (batch,) = batches(1, rows, length)
    positions = torch.arange(length).expand(rows, length)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "position_ids": positions}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=str
)
@torch.no_grad()
def test_each_row_of_a_batch_has_its_own_delta(family: str, dtype: torch.dtype, bound: float) -> None:
    model = build(family, dtype, layers=2).eval()
    deltas, batch, before = Deltas(model, parts(model)), padded(len(REQUESTS), 9), bits(model)
    deltas.activate("lines")  # taken out meanwhile
    with deltas.route(REQUESTS):
        found = model(**batch).logits.double()
        assert deltas.active is None
        assert bits(model) == before
    assert deltas.active == "lines"
    with deltas.using(None):
        plain = model(**batch).logits.double()
    for row, name in enumerate(REQUESTS):
        with deltas.using(name):
            expected = model(**batch).logits[row].double()
        assert (found[row] - expected).abs().max() <= bound * expected.abs().max()
        if name is not None:
            assert (found[row] - plain[row]).abs().max() > 2 * bound * expected.abs().max()
    with deltas.route(["pairs"] * len(REQUESTS)):
        together = model(**batch).logits.double()
    with deltas.using("pairs"):
        assert (together - model(**batch).logits.double()).abs().max() <= bound * together.abs().max()
    assert torch.equal(found[0], plain[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_generate_what_their_delta_generates(family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype, layers=2).eval()
    deltas = Deltas(model, parts(model))
    batch = padded(len(REQUESTS), 9)
    # prompts end at the right, as generation wants them
    left = {key: batch[key].flip(1) for key in ("input_ids", "attention_mask")}
    if dtype == torch.float64:  # transformers masks with the least float64, and its softmax in float32 makes NaN of it
        left["attention_mask"] = torch.ones_like(left["attention_mask"])
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    with deltas.route(REQUESTS):
        found = model.generate(**left, **options)
    texts = set()
    for row, name in enumerate(REQUESTS):
        with deltas.using(name):
            assert torch.equal(found[row], model.generate(**left, **options)[row])
            texts.add(tuple(found[row, 9:].tolist()))
    assert len(texts) > 4
    with deltas.route(REQUESTS):
        refused(
            lambda: model.generate(**left, **options, num_beams=2), f"sees {2 * len(REQUESTS)} rows for 7 .*no beams"
        )
    assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_tied_weights_are_routed_at_both_ends() -> None:
    model = build("gemma2", torch.float64, layers=1).eval()
    name = "lm_head.weight"
    deltas = Deltas(model, {"rows": tuned(model, {name: Blocks((20, 8), torch.tensor([(0, 0), (4, 4)]))})})
    batch = padded(2, 6)
    with deltas.route(["rows", None]):
        found = model(**batch).logits
    with deltas.using("rows"):
        torch.testing.assert_close(found[0], model(**batch).logits[0], rtol=0, atol=1e-10)
    assert torch.equal(found[1], model(**batch).logits[1])


@torch.no_grad()
def test_under_autocast_rows_agree_coarsely() -> None:
    model = build("llama", layers=2).eval()
    deltas, batch = Deltas(model, parts(model)), padded(len(REQUESTS), 9)
    with torch.autocast("cpu", torch.bfloat16):
        with deltas.route(REQUESTS):
            found = model(**batch).logits.float()
        for row, name in enumerate(REQUESTS):
            with deltas.using(name), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                expected = model(**batch).logits[row].float()
            with deltas.using(name):  # the copies that autocast keeps are not those of another delta
                assert torch.equal(model(**batch).logits[row].float(), expected)
            assert (found[row] - expected).abs().max() <= 0.1 * expected.abs().max()


def test_gradients_pass_through_a_routed_batch() -> None:
    model = build("llama", torch.float64, layers=2).eval().requires_grad_(False)
    deltas, batch = Deltas(model, parts(model)), padded(len(REQUESTS), 9)
    x = model.model.embed_tokens.weight.detach()[batch.pop("input_ids")]

    def grad() -> Tensor:
        leaf = x.clone().requires_grad_()
        model(inputs_embeds=leaf, **batch).logits.square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    names = [name for name in REQUESTS if name != "rest"] + [None]  # `rest` changes the embedding, which is not called
    with deltas.route(names):
        found = grad()
    for row, name in enumerate(names):
        with deltas.using(name):
            torch.testing.assert_close(found[row], grad()[row], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("chunk", [1, 100, 2**22])
def test_the_additive_form_is_the_dense_product(transposed: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(additive, "_CHUNK", chunk)
    shape, generator = (13, 10), torch.Generator().manual_seed(0)
    x = torch.randn(6, shape[not transposed], generator=generator, dtype=torch.float64)
    sizes = [(4, 3), (1, 10), (13, 1), (13, 4), (5, 10), (20, 20), (1, 1)]
    regions: list[Blocks | Entries] = [Entries(torch.randperm(130, generator=generator)[:40])]
    for h, w in sizes:
        grid = torch.rand(-(-13 // h), -(-10 // w), generator=generator) < 0.5
        grid[-1, -1] = True
        regions.append(Blocks((h, w), grid.nonzero()))
    for region in regions:
        dense = torch.zeros(shape, dtype=torch.float64)
        change = torch.randn(region.size(shape), generator=generator, dtype=torch.float64)
        region.scatter_(dense, change)
        found = additive.of_region(region, change, shape, transposed=transposed)(x)
        torch.testing.assert_close(found, x @ dense if transposed else x @ dense.t(), rtol=0, atol=1e-13)


class Odd(nn.Module):
    """A matrix read past its module, and a layer that sees all tokens in one row."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.unseen, self.flat = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.flat(self.seen(x).flatten(0, 1)), self.unseen.weight)


def test_a_module_that_cannot_be_routed_is_refused_by_name() -> None:
    model, x = Odd(), torch.randn(2, 3, 4)
    rows = Blocks((1, 4), torch.tensor([(1, 0)]))
    deltas = Deltas(model, {name: tuned(model, {f"{name}.weight": rows}) for name in ("seen", "unseen", "flat")})
    with deltas.route(["seen", None]):
        model(x)
        refused(lambda: deltas.activate("flat"), "inside `with deltas.route")
        refused(lambda: deltas.add("more", "folder"), "inside `with deltas.route")
    with deltas.route(["seen", "flat"]):
        refused(lambda: model(x), "^route: flat sees 6 rows for 2 requests")

    def unseen() -> None:
        with deltas.route([None, "unseen"]):
            model(x)

    refused(unseen, "^route: unseen was not called")
    refused(lambda: deltas.route([]).__enter__(), "needs a list with a delta or None for each row")
    refused(lambda: deltas.route("seen").__enter__(), "needs a list with a delta or None for each row")
    refused(lambda: deltas.route(["sen"]).__enter__(), "unknown delta 'sen'; did you mean 'seen'")


def test_stacked_experts_are_refused_by_name() -> None:
    model, name = build("mixtral", layers=1).eval(), "model.layers.0.mlp.experts"
    deltas = Deltas(
        model, {"x": tuned(model, {f"{name}.down_proj": Blocks((8, 8), torch.tensor([(0, 0, 0), (3, 1, 1)]))})}
    )
    with deltas.route(["x", None]):
        refused(lambda: model(**padded(2, 6)), f"^route: {name} sees 12 rows for 2 requests")


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}  # views and in-place writes
        made = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)]
        sizes = [t.numel() for t in made if t.untyped_storage().data_ptr() not in read]
        self.numbers = max([self.numbers, *sizes])
        return out


@pytest.mark.parametrize(
    "region",
    [Blocks((8, 8), torch.tensor([(0, 0), (3, 5), (7, 7)])), Entries(torch.arange(0, 4096, 97)), LowRank(2, 2.0)],
    ids=lambda region: region.kind,
)
def test_the_additive_form_makes_nothing_of_the_matrix_size(region: Region) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    deltas, x = Deltas(model, {"x": tuned(model, {"0.weight": region})}), torch.randn(2, 3, 64)
    with torch.no_grad(), deltas.route(["x", None]):
        model(x)
        with Largest() as seen:
            model(x)
    assert 0 < seen.numbers < 64 * 64 / 4
