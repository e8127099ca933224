"""safetensors files written and read a tensor at a time, against the library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from thrifty.core.errors import ThriftyError
from thrifty.core.tensor_file import TensorFile, TensorWriter

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
CASES = st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=8)


@settings(max_examples=80, deadline=None)
@given(CASES, st.booleans())
def test_both_ways_agree_with_the_library(
    tmp_path_factory: pytest.TempPathFactory, case: list[tuple[torch.dtype, list[int]]], strided: bool
) -> None:
    tensors = {}
    for number, (dtype, shape) in enumerate(case):
        tensor = torch.randint(0, 2, shape).to(dtype)
        tensors[f"t{number}"] = tensor.t() if strided and tensor.ndim == 2 else tensor
    folder = tmp_path_factory.mktemp("file")
    with TensorWriter(folder / "ours", metadata={"format": "pt"}) as file:
        for name, tensor in tensors.items():
            file.add(name, tensor)
    assert [path.name for path in folder.iterdir()] == ["ours"]
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "theirs")
    for found in (load_file(folder / "ours"), TensorFile(folder / "ours"), TensorFile(folder / "theirs")):
        assert set(found) == set(tensors)
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
    with safe_open(folder / "ours", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def write_twice(path: Path, *, fail: bool) -> None:
    with TensorWriter(path) as file:
        file.add("a", torch.ones(3))
        assert not fail, "on the way"
        file.add("a", torch.ones(3))


def test_an_error_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="on the way"):
        write_twice(tmp_path / "f", fail=True)
    with pytest.raises(ValueError, match="a is written twice"):
        write_twice(tmp_path / "f", fail=False)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_replaced_is_still_the_one_that_was_opened(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "f")
    opened = TensorFile(tmp_path / "f")
    save_file({"a": torch.zeros(4)}, tmp_path / "g")
    (tmp_path / "g").rename(tmp_path / "f")
    assert torch.equal(opened["a"], torch.ones(4))
    assert opened.outlines["a"].nbytes == 16


def test_what_a_reader_could_take_two_ways_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "f")
    data = (tmp_path / "f").read_bytes()
    for wrong in (data[:20], data[:-1], data + b"1", b"", b"\xff" * 40):
        (tmp_path / "f").write_bytes(wrong)
        with pytest.raises(ThriftyError, match="f is damaged or incomplete"):
            TensorFile(tmp_path / "f")


_STREAM = """
import resource, sys
from pathlib import Path
import torch
from thrifty.core.region import Whole
from thrifty.delta import Delta, Piece
from thrifty.delta.algebra import combine
from thrifty.core.plan import Plan
from thrifty.delta.piece import LazyPieces

folder, numbers, count = Path(sys.argv[1]), 2_000_000, 24
def piece(name):
    base = torch.full((numbers,), 1.0)
    return Piece.of(base, base + int(name), Whole())
plan = Plan({str(n): Whole() for n in range(count)}, shapes={str(n): (numbers,) for n in range(count)}, total=1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
piece("0")
start = peak()
Delta(LazyPieces(plan, piece), method={}, total=1).save(folder / "one")
one = Delta.load(folder / "one")
combine([(one, 0.5)]).save(folder / "half")
assert float(Delta.load(folder / "half").pieces["4"].values[-1]) == 3.0
print((folder / "half" / "delta.safetensors").stat().st_size // 2**20, peak() - start)
"""


def test_a_delta_of_hundreds_of_megabytes_passes_through_little_memory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _STREAM, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    size, grown = map(int, done.stdout.split())
    assert size > 350
    assert grown < 160  # MiB: float64 forms of one tensor of 8, not 24 of them
