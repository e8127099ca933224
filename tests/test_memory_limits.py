"""How much memory there is, where a container or a process has less than the machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from thrifty.core import memory

GIB = 2**30


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
    return tmp_path


def test_the_tightest_group_of_version_2_counts(groups: Path) -> None:
    (groups / "own").write_text("0::/pod/run\n")
    group(groups / "cgroup/pod", memory__max=3 * GIB // 2, memory__current=GIB)
    group(groups / "cgroup/pod/run", memory__max="max", memory__current=GIB // 4)
    assert memory.total_memory() == 3 * GIB // 2
    assert memory.free_memory() == GIB // 2
    group(groups / "cgroup/pod", memory__stat=f"anon 5\ninactive_file {GIB // 4}")
    assert memory.free_memory() == 3 * GIB // 4  # files' pages are given back


def test_version_1(groups: Path) -> None:
    (groups / "own").write_text("7:cpu:/\n4:memory:/docker/a\n0::/\n")
    group(groups / "cgroup/memory/docker/a", memory__limit_in_bytes=GIB, memory__usage_in_bytes=GIB // 2)
    group(groups / "cgroup/memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=GIB)
    assert (memory.total_memory(), memory.free_memory()) == (GIB, GIB // 2)


def test_no_groups_no_limits(groups: Path) -> None:
    assert memory.total_memory() == psutil.virtual_memory().total
    assert 0 < memory.free_memory() <= memory.total_memory()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's address space")
def test_a_process_may_be_limited() -> None:
    said = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36)); import thrifty.core.memory as m; "
    said += "print(m.total_memory(), m.free_memory(), min(2**36, __import__('psutil').virtual_memory().total))"
    found = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True).stdout.split()
    assert found[0] == found[2]
    assert int(found[1]) < int(found[0])
