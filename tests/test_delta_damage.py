"""Damaged delta folders: always one line that says so, never a traceback from below, and nothing is touched."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_cases import KINDS, bits, moved, tensors
from delta_cases import model as small
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from thrifty import attach
from thrifty.core.entries import Entries
from thrifty.core.errors import ThriftyError
from thrifty.core.low_rank import LowRank
from thrifty.core.region import Blocks, Whole
from thrifty.delta import Delta

NAME = "0.weight"


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9, bias=False), nn.Linear(9, 6, bias=False))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good delta with ragged blocks."""
    tuning = attach(model(), {"random_blocks": {"block_size": 4}}, budget=0.8)
    for leaf in tuning.parameters():
        leaf.data.add_(1.0)
    tuning.sync()
    tuning.delta().save(folder := tmp_path_factory.mktemp("whole") / "d")
    return folder


def parts(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Without the checksums, which whoever means harm would correct too."""
    head = json.loads((folder / "delta.json").read_text())
    del head["sha256"]
    for entry in head["tensors"].values():
        del entry["sha256"]
    return head, load_file(folder / "delta.safetensors")


def write(folder: Path, head: Any, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    (folder / "delta.json").write_text(json.dumps(head))
    save_file(tensors, folder / "delta.safetensors")
    return folder


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ThriftyError, match=message) as error:
        Delta.load(folder)
    assert "\n" not in str(error.value)


def test_the_good_folder_loads_and_applies(whole: Path, tmp_path: Path) -> None:
    Delta.load(whole).apply(model())
    Delta.load(write(tmp_path / "d", *parts(whole))).apply(model())


def record(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any], dict[str, Tensor]], Any]:
    return lambda head, tensors: change(head["tensors"][NAME])


def tensor(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any], dict[str, Tensor]], Any]:
    return lambda head, tensors: tensors.update({f"{key}:{NAME}": change(tensors[f"{key}:{NAME}"])})


DAMAGE = {
    "no tensor": (lambda h, t: t.pop(f"values:{NAME}"), f"values:{NAME}"),
    "no original": (lambda h, t: t.pop(f"base:{NAME}"), f"base:{NAME}"),
    "no index": (lambda h, t: t.pop(f"index:{NAME}"), "needs an integer index tensor"),
    "fewer values": (tensor("values", lambda v: v.flatten()[1:].clone()), f"{NAME}: the delta holds .* it is damaged"),
    "fewer originals": (tensor("base", lambda v: v.flatten()[1:].clone()), f"{NAME}: .* it is damaged"),
    "other dtype": (tensor("values", lambda v: v.double()), f"{NAME}: .* damaged"),
    "index outside": (tensor("index", lambda i: i + 9), f"block .* lies outside {NAME}"),
    "negative index": (tensor("index", lambda i: i - 1), f"block .* lies outside {NAME}"),
    "float index": (tensor("index", lambda i: i.float()), "needs an integer index tensor"),
    "flat index": (tensor("index", lambda i: i.flatten()), "block index must be"),
    "index twice": (tensor("index", lambda i: torch.cat([i, i[:1]])), "listed twice"),
    "empty index": (tensor("index", lambda i: i[:0].clone()), "has no block in the plan"),
    "no region": (record(lambda r: r.pop("region")), "'region'"),
    "region a list": (record(lambda r: r.update(region=[])), "make or copy the delta again"),
    "other region": (record(lambda r: r["region"].update(kind="block")), "unknown kind of region 'block'"),
    "region shape": (record(lambda r: r["region"].update(shape=[4])), "needs a shape of two integers"),
    "zero region": (record(lambda r: r["region"].update(shape=[0, 4])), "two positive numbers"),
    "shape of words": (record(lambda r: r.update(of=["nine", 6])), "make or copy the delta again"),
    "other shape": (record(lambda r: r.update(of=[90, 6])), f"{NAME}: .* it is damaged"),
    "flat shape": (record(lambda r: r.update(of=[54])), f"{NAME} has shape"),
    "negative shape": (record(lambda r: r.update(of=[-9, 6])), "make or copy the delta again|lies outside"),
    "huge shape": (record(lambda r: r.update(of=[10**30, 6])), "make or copy the delta again|damaged"),
    "no tensors": (lambda h, t: h.pop("tensors"), "lacks or garbles 'tensors'"),
    "tensors a list": (lambda h, t: h.update(tensors=[]), "make or copy the delta again"),
    "no method": (lambda h, t: h.pop("method"), "'method'"),
    "total a word": (lambda h, t: h.update(total="many"), "make or copy the delta again"),
    "newer format": (lambda h, t: h.update(format=2), "has format 2, this version reads 1: upgrade thrifty"),
    "other kind": (lambda h, t: h.update(kind="patch"), "describes no delta that this version knows"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(whole: Path, tmp_path: Path, damage: str) -> None:
    head, tensors = parts(whole)
    change, message = DAMAGE[damage]
    change(head, tensors)
    refused(write(tmp_path / "d", head, tensors), message)


def test_missing_and_half_files(whole: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "is no delta folder: it holds no delta.json")
    folder = write(tmp_path / "d", *parts(whole))
    text = (folder / "delta.json").read_text()
    for half in ("", text[:-30], "[]", "\udcff", '{"kind": "regions"'):
        (folder / "delta.json").write_bytes(half.encode("utf-8", "surrogatepass"))
        refused(folder, "delta.json (is damaged|describes no delta)")
    (folder / "delta.json").write_text(text)
    (folder / "delta.safetensors").unlink()
    refused(folder, "delta.safetensors is damaged or incomplete")


@pytest.mark.parametrize("key", ["values", "base", "index"])
def test_a_flipped_byte_is_noticed(whole: Path, tmp_path: Path, key: str) -> None:
    folder = shutil.copytree(whole, tmp_path / "d")
    tensors = load_file(folder / "delta.safetensors")
    tensors[f"{key}:{NAME}"].view(-1)[0] += 1
    save_file(tensors, folder / "delta.safetensors")
    base = model()
    before = [p.detach().clone() for p in base.parameters()]
    with pytest.raises(ThriftyError, match=f"{key} of {NAME} is not what was saved: make or copy the delta again"):
        Delta.load(folder).apply(base)
    assert all(torch.equal(p, b) for p, b in zip(base.parameters(), before, strict=True))


def test_an_edited_record_is_noticed(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "d")
    text = (folder / "delta.json").read_text()
    (folder / "delta.json").write_text(text.replace('"random_blocks"', '"random_block"'))
    refused(folder, "delta.json is not what was saved: make or copy the delta again")


def test_a_key_that_comes_twice_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "d")
    text = (folder / "delta.json").read_text()
    (folder / "delta.json").write_text(text.replace('"total"', '"total": 1, "total"', 1))
    refused(folder, "the key 'total' comes twice")
    (folder / "delta.json").write_text(text)
    data = (folder / "delta.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    entry, first = data[8 : 8 + size].rstrip(), json.loads(data[8 : 8 + size])
    name = next(iter(first))
    twice = entry[:-1] + f",{json.dumps(name)}:{json.dumps(first[name])}}}".encode()
    (folder / "delta.safetensors").write_bytes(len(twice).to_bytes(8, "little") + twice + data[8 + size :])
    refused(folder, "delta.safetensors is damaged or incomplete")


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(whole: Path, tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    folder = write(tmp_path_factory.mktemp("cut") / "d", *parts(whole))
    data = (folder / "delta.safetensors").read_bytes()
    (folder / "delta.safetensors").write_bytes(data[: int(share * len(data))])
    refused(folder, "delta.safetensors is damaged or incomplete .*: make or copy it again")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every position in a JSON value."""
    found = [path]
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += places(child, (*path, key))
    return found


JUNK = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3)
JUNK |= st.lists(st.integers(-3, 9), max_size=3) | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_junk_anywhere_in_the_record_is_refused_or_harmless(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    good, tensors = parts(whole)
    head = copy.deepcopy(good)
    *way, last = data.draw(st.sampled_from(places(head)[1:]))
    inner = head
    for key in way:
        inner = inner[key]
    inner[last] = data.draw(JUNK)
    base = model()
    before = [p.detach().clone() for p in base.parameters()]
    try:
        delta = Delta.load(write(tmp_path_factory.mktemp("junk") / "d", head, tensors))
        delta.apply(base)
    except ThriftyError as error:
        lines = str(error).splitlines()
        changed = [not torch.equal(p, b) for p, b in zip(base.parameters(), before, strict=True)]
        assert (len(lines), any(changed)) == (1, False), error  # noqa: PT017 (both ways out are right)
        return
    delta.remove(base)
    assert all(torch.equal(p, b) for p, b in zip(base.parameters(), before, strict=True))


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One good delta of each kind of region, most of them beside other tensors."""
    found = {}
    for number, kind in enumerate(KINDS):
        regions = {"matrix": kind, "experts": "blocks", "vector": "entries"} if kind != "low_rank" else {"matrix": kind}
        delta = moved(tensors(small()), {name: REGIONS[name, chosen] for name, chosen in regions.items()}, seed=number)
        delta.save(folder := tmp_path_factory.mktemp("good") / kind)
        found[kind] = folder
    return found


REGIONS = {
    ("matrix", "whole"): Whole(),
    ("matrix", "blocks"): Blocks((4, 3), torch.tensor([[0, 0], [2, 2]])),
    ("matrix", "rows"): Blocks((1, 7), torch.tensor([[2, 0], [8, 0]])),
    ("matrix", "columns"): Blocks((9, 1), torch.tensor([[0, 5]])),
    ("matrix", "entries"): Entries(torch.tensor([0, 9, 62])),
    ("matrix", "low_rank"): LowRank(2, 4.0),
    ("experts", "blocks"): Blocks((3, 3), torch.tensor([[0, 0, 0], [1, 1, 1]])),
    ("vector", "entries"): Entries(torch.tensor([1, 10])),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None)
@given(st.data())
def test_any_bytes_changed_in_either_file(
    every_kind: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    """One line that says so, or a delta that goes on and comes off exactly: never half of one."""
    folder = shutil.copytree(every_kind[kind], tmp_path_factory.mktemp("bytes") / "d")
    file = folder / data.draw(st.sampled_from(["delta.json", "delta.safetensors"]))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        way = data.draw(st.sampled_from(["flip", "drop", "insert"]))
        if way == "flip":
            content[place] ^= data.draw(st.integers(1, 255))
        elif way == "drop":
            del content[place : place + data.draw(st.integers(1, 40))]
        else:
            content[place:place] = data.draw(st.binary(min_size=1, max_size=20))
        if not content:
            break
    file.write_bytes(bytes(content))
    base = small()
    start = bits(base)
    try:
        delta = Delta.load(folder)
        delta.apply(base)
    except ThriftyError as error:
        assert "\n" not in str(error)  # noqa: PT017 (both ways out are right)
        assert bits(base) == start
        return
    good = small()
    Delta.load(every_kind[kind]).apply(good)
    assert bits(base) == bits(good)  # the values are checked by their sums
    delta.remove(base)
    assert bits(base) == start
