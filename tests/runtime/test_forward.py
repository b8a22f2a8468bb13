"""A real MoE forward over ranks: the placement, the set and the loader must agree to the token."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import moeconv
from tests.cli.run import ROOT, environment
from tests.oracle.tiny import inputs, tiny_model

RANKS = 4
MODEL_TYPES = ("qwen3_moe", "deepseek_v3")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Tiny models as transformers saves them, expert by expert."""
    folders = [tmp_path_factory.mktemp("forward") / name for name in MODEL_TYPES]
    for folder in folders:
        model: Any = tiny_model(folder.name)
        model.save_pretrained(folder)
    return folders


def token_ids(source: Path) -> torch.Tensor:
    """Four sequences: [4, 12]."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source)
    return torch.cat([inputs(model, seed=n)["input_ids"] for n in range(2)])


def whole_logits(source: Path, ids: torch.Tensor, dtype: torch.dtype, experts: str) -> torch.Tensor:
    """The unsharded model's, computed rank by rank as the sharded one does."""
    torch.set_num_threads(1)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, experts_implementation=experts
    ).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def rows(source: Path, slots: int, *, ranks: int, seed: int) -> dict[str, tuple[int, ...]]:
    """A permuted placement with redundant experts, no rank with one twice."""
    rng = random.Random(seed)
    out = {}
    for stack in moeconv.open_source(source).detection.stacks:
        experts = stack.sizes.experts
        while True:
            row = [*range(experts), *rng.choices(range(experts), k=slots - experts)]
            rng.shuffle(row)
            share = slots // ranks
            parts = [row[r * share : (r + 1) * share] for r in range(ranks)]
            if all(len(set(p)) == len(p) for p in parts):
                break
        out[stack.name] = tuple(row)
    return out


Job = dict[str, object]


def sharded_logits(jobs: dict[Path, Job], ranks: int) -> list[torch.Tensor]:
    """For each job, in the folder beside it, those of all processes in the order of ranks.

    Processes that do all jobs, one after the other: most of their time is that of imports.
    """
    paths = []
    for folder, job in jobs.items():
        paths.append(folder / "job.json")
        paths[-1].write_text(json.dumps(job | {"ranks": ranks, "meet": str(folder / "meet")}))
    crew = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.runtime.forward", str(rank), *map(str, paths)],
            cwd=ROOT,
            env=environment(OMP_NUM_THREADS="1"),
        )
        for rank in range(ranks)
    ]
    assert [process.wait(timeout=300) for process in crew] == [0] * ranks
    return [
        torch.cat([torch.load(path.with_suffix(f".{rank}.pt")) for rank in range(ranks)])
        for path in paths
    ]


def test_four_ranks_compute_what_one_model_does(sources: list[Path], tmp_path: Path):
    """In float32, so that only the order of a sum of two or three terms is left to differ."""
    jobs: dict[Path, Job] = {}
    for source in sources:
        experts = moeconv.open_source(source).detection.stacks[0].sizes.experts
        slots = -(-experts // RANKS) * RANKS + RANKS
        placement = rows(source, slots, ranks=RANKS, seed=1)
        folder = tmp_path / source.name
        moeconv.shard(source, folder / "set", ep_size=RANKS, placement=placement)
        jobs[folder] = {
            "set": str(folder / "set"), "config": str(source), "dtype": "float32",
            "experts": "eager", "ids": token_ids(source).tolist(), "spread": True,
        }  # fmt: skip
    for source, found in zip(sources, sharded_logits(jobs, RANKS), strict=True):
        wanted = whole_logits(source, token_ids(source), torch.float32, "eager")
        assert torch.isfinite(wanted).all()
        assert wanted.std() > 0.1  # a model that says something
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_one_process_is_bit_equal(sources: list[Path], tmp_path: Path):
    """Permuted and redundant, by `grouped_mm`: each expert sees the same tokens as unsharded."""
    jobs: dict[Path, Job] = {}
    for source in sources:
        experts = moeconv.open_source(source).detection.stacks[0].sizes.experts
        placement = rows(source, experts, ranks=1, seed=2)
        placement = {name: (*row, *row[:2]) for name, row in placement.items()}
        folder = tmp_path / source.name
        more = {"placement": placement, "allow_duplicates": True}
        moeconv.shard(source, folder / "set", ep_size=1, **more)
        jobs[folder] = {
            "set": str(folder / "set"), "config": str(source), "dtype": "bfloat16",
            "experts": "grouped_mm", "ids": token_ids(source).tolist(), "spread": False,
        }  # fmt: skip
    for source, found in zip(sources, sharded_logits(jobs, 1), strict=True):
        wanted = whole_logits(source, token_ids(source), torch.bfloat16, "grouped_mm")
        assert torch.equal(found, wanted)
