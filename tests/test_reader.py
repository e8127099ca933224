"""`read_config`: every mistake of a configuration, where `load_config` raises the first."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.core.errors import ThriftyError
from thrifty.run.config import load_config
from thrifty.run.reader import read_config

MISTAKES = {
    "lr": (3, "'lr' is called 'learning_rate' here"),
    "max_steps": ("many", "max_steps must be an integer"),
    "packing": ("yes", "packing must be true or false"),
    "seed": (-1, "seed must be 0 or more"),
    "budget": ("none", "budget 'none' is neither a share"),
    "method": ({"smt": {"block_sise": 8, "scope": "all"}}, "'block_sise'; did you mean 'block_size'?"),
    "objective": ("sftt", "unknown objective 'sftt'; did you mean 'sft'?"),
    "evla": ({}, "unknown key 'evla'; did you mean 'eval'?"),
    "early_stopping_patience": (0, "early_stopping_patience must be 1 or more"),
    "do_train": (True, "do_train is not to be set"),
}


@settings(max_examples=30, deadline=None)
@given(chosen=st.lists(st.sampled_from(sorted(MISTAKES)), unique=True))
def test_every_mistake_of_a_file_is_listed(chosen: list[str]) -> None:
    values = {"model": "m", "data": {"train": "x.jsonl"}, **{key: MISTAKES[key][0] for key in chosen}}
    config, reading = read_config(values)
    for key in chosen:
        assert any(MISTAKES[key][1] in text for text in reading.problems), key
    assert len(reading.problems) == len(chosen) + ("method" in chosen), "each once; two of the method's options"
    assert reading.broken == set(chosen)
    if chosen:
        with pytest.raises(ThriftyError) as raised:
            load_config(values)
        assert str(raised.value) in reading.problems
    else:
        assert config == load_config(values)
