"""`thrifty compare --ray`: a tiny study on a cluster whose workers and nodes die, beside the same in processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tiny_run import prepare

from thrifty.cli.main import main
from thrifty.core.errors import ThriftyError
from thrifty.study.spec import Spec

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")

STUDY: dict[str, Any] = {
    "run": {"model": "model", "max_length": 48, "max_steps": 4, "per_device_train_batch_size": 4, "probe_units": 2},
    "tasks": {
        "sums": {
            "train": {"path": "train.jsonl", "split": "[:16]"},
            "held_out": {"path": "train.jsonl", "split": "[16:]"},
            "eval": "eval.jsonl",
        }
    },
    "methods": {"smt": {"smt": {"block_size": 8}}, "biases": {"method": "bitfit", "budgets": "own"}},  # the last fails
    "budgets": "5%",
    "search": {"learning_rate": [1e-2], "run": {"max_steps": 2}, "widen": 0},
    "curve": {"every": 2},
}
GOOD = {"base-sums", "search-sums-smt-5pct-1e-2", "final-sums-smt-5pct-s0"}
FAILED = {"search-sums-biases-own-1e-2", "final-sums-biases-own-s0"}


def start(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    with (folder / "said.txt").open("w") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "thrifty", "compare", "mine.yaml", "--threads", "1", *words],
            cwd=folder,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdout=said,
            stderr=subprocess.STDOUT,
        )


def records(folder: Path, study: str) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "studies" / study / "runs").glob("*.json")}


def runs_below(raylet: psutil.Process) -> Iterator[tuple[str, psutil.Process]]:
    """The runs that a node makes at this moment, by the names of their records."""
    for process in raylet.children(recursive=True):
        try:
            words = process.cmdline()
            if "thrifty.study.remote_worker" in words and process.parent() != raylet:
                file = Path(words[words.index("thrifty.study.remote_worker") + 1])
                yield Spec(**json.loads(file.read_text())).name, process
        except (psutil.NoSuchProcess, OSError, ValueError):
            continue  # it ended meanwhile


class Nodes:
    """Two nodes of one CPU each; what their runs leave lies in `left`."""

    def __init__(self, left: Path, sockets: str) -> None:
        from ray.cluster_utils import Cluster

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TMPDIR", str(left))
            patch.setenv("RAY_TMPDIR", sockets)  # their names may not be long
            patch.setenv("RAY_worker_niceness", "0")
            patch.setenv("HF_HUB_OFFLINE", "1")
            self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
            self.second = self.cluster.add_node(num_cpus=1)
        self.raylets = [self.raylet(node) for node in (self.cluster.head_node, self.second)]
        self.left = left

    def raylet(self, node: Any) -> psutil.Process:
        return psutil.Process(node.all_processes["raylet"][0].process.pid)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as sockets:
        made = Nodes(tmp_path_factory.mktemp("left"), sockets)
        yield made
        made.cluster.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepare(tmp_path_factory.mktemp("ray"))
    (folder / "mine.yaml").write_text(yaml.safe_dump(STUDY))
    return folder


@needs_ray
@pytest.mark.timeout(1200)
def test_a_study_outlives_its_workers_and_nodes(folder: Path, nodes: Nodes) -> None:
    # stopped while runs are under way: nothing is left of them
    address = nodes.cluster.address
    child = start(folder, "--ray", address)
    while not (found := [run for raylet in nodes.raylets for _, run in runs_below(raylet)]):
        assert child.poll() is None, (folder / "said.txt").read_text()
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=120) == 130
    _, alive = psutil.wait_procs(found, timeout=60)
    assert not alive
    assert records(folder, "mine") == {}
    assert list(nodes.left.iterdir()) == []

    # goes on; one run loses its Ray worker, another its node
    child = start(folder, "--ray", address)
    tries: dict[str, set[int]] = defaultdict(set)
    killed: dict[int, str] = {}
    while child.poll() is None:
        for place, raylet in enumerate(nodes.raylets):
            for name, run in runs_below(raylet) if raylet.is_running() else ():
                tries[name].add(run.pid)
                if name not in GOOD or place in killed or name in killed.values():
                    continue
                killed[place] = name
                if place == 0:
                    run.parent().kill()
                else:
                    nodes.cluster.remove_node(nodes.second, allow_graceful=False)
                _, alive = psutil.wait_procs([run], timeout=60)
                assert not alive
        time.sleep(0.05)
    said = (folder / "said.txt").read_text()
    assert child.returncode == 0, said
    assert len(killed) == 2
    assert all(len(tries[name]) > 1 for name in killed.values()), (tries, killed)
    assert set(tries) == GOOD | {"search-sums-biases-own-1e-2"}
    assert said.count("FAILED") == 1


def unmeasured(record: dict[str, Any]) -> dict[str, Any]:
    """A record without times and memory."""
    kept = json.loads(json.dumps(record))
    for name in ("created_at", "total_time"):
        del kept["run_info"][name]
    for name in [key for key in kept["train_info"] if "time" in key or "memory" in key or "second" in key]:
        del kept["train_info"][name]
    for entry in kept["train_info"]["metrics"]:
        for name in ("train time", "tokens / sec"):
            entry.pop(name, None)
    return kept


@needs_ray
@pytest.mark.timeout(1200)
def test_its_records_are_those_of_processes(folder: Path) -> None:
    child = start(folder, "--only", "smt", "--workers", "2", "output_dir=studies/plain")
    assert child.wait() == 0, (folder / "said.txt").read_text()
    by_ray, plain = records(folder, "mine"), records(folder, "plain")
    assert set(by_ray) == GOOD | FAILED
    assert set(plain) == GOOD
    for name in GOOD:
        assert unmeasured(by_ray[name]) == unmeasured(plain[name])
    for name in FAILED:
        assert by_ray[name]["train_info"]["status"] == "failed"
    assert "bias" in by_ray["search-sums-biases-own-1e-2"]["run_info"]["error_msg"]


@needs_ray
@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "nothing answers there"),
        ("ray://127.0.0.1:1", "nothing answers there"),
        ("head", "--ray must be local, auto, HOST:PORT or ray://HOST:PORT, not 'head'"),
        ("127.0.0.1:{}", "no Ray cluster answers there within 1 seconds"),
    ],
)
def test_a_wrong_address_is_said_in_one_line(
    folder: Path, address: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("thrifty.study.ray_tasks._ANSWER", 1)
    monkeypatch.chdir(folder)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = address.format(silent.getsockname()[1])
        assert main(["compare", "mine.yaml", "output_dir=studies/none", "--ray", address]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert said in error


def test_without_ray_the_extra_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "thrifty.study.ray_tasks", raising=False)
    assert main(["compare", "mine.yaml", "output_dir=studies/none", "--ray", "local"]) == 2
    assert capsys.readouterr().err == "thrifty: --ray needs Ray: pip install 'thrifty[ray]'\n"


@needs_ray
@pytest.mark.parametrize(
    ("resources", "workers", "threads", "shares"),
    [
        ([{"CPU": 4.0}, {"CPU": 8.0}, {}], None, None, (12, 1, 0)),
        ([{"CPU": 4.0}, {"CPU": 8.0}, {}], None, 3, (3, 3, 0)),
        ([{"CPU": 4.0}, {"CPU": 8.0}, {}], 3, None, (3, 4, 0)),
        ([{"CPU": 4.0}, {"CPU": 8.0}, {}], 1, None, (1, 8, 0)),
        ([{"CPU": 8.0}, {"CPU": 16.0, "GPU": 4.0}], None, None, (4, 4, 1)),
        ([{"CPU": 8.0}, {"CPU": 16.0, "GPU": 4.0}], 2, 2, (2, 2, 1)),
    ],
)
def test_runs_fill_the_cluster(
    resources: list[dict[str, float]],
    workers: int | None,
    threads: int | None,
    shares: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from thrifty.study import ray_tasks

    nodes = [{"Alive": True, "Resources": has} for has in resources] + [{"Alive": False, "Resources": {"CPU": 99.0}}]
    monkeypatch.setattr(ray_tasks.ray, "nodes", lambda: nodes)
    assert ray_tasks._shares(workers, threads) == shares
    with pytest.raises(ThriftyError, match="--threads 32: the largest node of the Ray cluster has"):
        ray_tasks._shares(workers, 32)


@needs_ray
def test_a_node_without_the_studys_folder_is_named() -> None:
    from thrifty.study.ray_tasks import _make

    with pytest.raises(ThriftyError, match="has no folder /nowhere/studies"):
        _make({}, threads=1, folder="/nowhere/studies")
