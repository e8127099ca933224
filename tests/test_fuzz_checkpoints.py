"""Checkpoints that somebody changed, sums and all: each part reads, or one line says that it does not."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import Outcomes, changed, damaged, fuzz
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import configuration, prepare

from thrifty.core.files import file_sha256
from thrifty.run.checkpoint import Checkpoint, checkpoints, find_checkpoint
from thrifty.run.config import load_config
from thrifty.run.model import load_model
from thrifty.run.resumed import refuse_changes
from thrifty.run.saving import load_optimizer_and_scheduler, load_random, load_running
from thrifty.run.train import train
from thrifty.run.trainer import ThriftyTrainer
from thrifty.update.tuning import attach_with


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any], ThriftyTrainer]]:
    """A checkpoint's folder, its configuration, and the trainer that wrote it."""
    folder = prepare(tmp_path_factory.mktemp("fuzzed"))
    trainers: list[ThriftyTrainer] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "thrifty.run.train.finished", lambda tuning, trainer, **_: trainers.append(trainer) or trainer.model
        )
        patch.setattr("thrifty.run.evaluate.exact_match", None, raising=False)
        train(configuration(folder, max_steps=2, eval={"loss": False}))
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield checkpoints(folder / "out")[-1].folder, load_config(configuration(folder)).to_dict(), trainers[0]
    random.setstate(kept[0])
    np.random.set_state(kept[1])
    torch.set_rng_state(kept[2])


def seal(folder: Path) -> None:
    """Correct the sums, as whoever means harm would."""
    files = [file for file in folder.iterdir() if file.name != "complete.json"]
    (folder / "complete.json").write_text(json.dumps({f.name: [f.stat().st_size, file_sha256(f)] for f in files}))


def read(folder: Path, config: dict[str, Any], trainer: ThriftyTrainer) -> None:
    """All that a resumed run reads, in its order."""
    found = find_checkpoint("auto", output_dir=folder.parent)
    assert found is not None
    with found.reading():
        refuse_changes(found, config=found.record()["config"], processes=1)
    found.carried()
    found.best_step()
    trainer._init_training_state(9, 3, 3, str(folder), None)
    model = load_model(config["model"])
    with found.reading():
        attach_with(model, config["method"], budget=0.05, plan=found.plan())
    trainer._load_from_checkpoint(str(folder))
    load_optimizer_and_scheduler(trainer, found)
    load_running(trainer, found)
    load_random(trainer, found)


def test_checkpoints(trained: tuple[Path, dict[str, Any], ThriftyTrainer], tmp_path: Path) -> None:
    source, config, trainer = trained
    counts, folder = Outcomes(), tmp_path / source.name
    read(source, config, trainer)
    names = sorted(file.name for file in source.iterdir())
    values = {name: json.loads((source / name).read_text()) for name in names if name.endswith(".json")}
    whole = {name: (source / name).read_bytes() for name in names}
    inside = st.sampled_from(sorted(set(values) - {"complete.json", "random.json"})).flatmap(
        lambda name: changed(values[name]).map(lambda value: (name, json.dumps(value).encode(), True))
    )
    outside = st.sampled_from(names).flatmap(lambda n: st.tuples(st.just(n), damaged([whole[n]]), st.booleans()))

    @fuzz(120)
    @given(inside | outside)
    def one(change: tuple[str, bytes, bool]) -> None:
        name, data, sealed = change
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        (folder / name).write_bytes(data)
        if sealed:
            seal(folder)
        counts.of(lambda: read(folder, config, trainer))

    one()
    counts.tell("checkpoints")
    assert Checkpoint(source).step == 2
