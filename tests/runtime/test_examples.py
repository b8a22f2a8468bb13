"""The examples in the docstrings run, as a reader would run them."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch

import moeconv.runtime
from tests.runtime.handmade import checkpoint, write_set
from tests.runtime.models import TinyMoe

MODULES = [
    moeconv.runtime.__name__,
    *(m.name for m in pkgutil.iter_modules(moeconv.runtime.__path__, "moeconv.runtime.")),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(tmp_path: Path, name: str):
    module = importlib.import_module(name)
    out = write_set(tmp_path / "set", checkpoint())
    finder, runner = doctest.DocTestFinder(exclude_empty=True), doctest.DocTestRunner()
    for example in finder.find(module, name):
        shard = moeconv.runtime.open(out, ep_rank=0, ep_size=2)
        example.globs |= {
            "OUT": out,
            "shard": shard,
            "model": TinyMoe(3),
            "moeconv": moeconv,
            "torch": torch,
        }
        runner.run(example)
    assert runner.summarize(verbose=False).failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    documented = {
        t.name.rpartition(".")[2]
        for name in MODULES
        for t in finder.find(importlib.import_module(name))
        if t.examples
    }
    assert documented >= {
        "runtime", "open_shard", "ep_rank_of", "load", "load_into", "global_tensors", "updater",
        "replace",
    }  # fmt: skip
