"""One flipped bit anywhere in a set: found and named, at hundreds of places in every file."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import moeconv
from tests.manifest import epsamples
from tests.manifest.samples import FILES

SEED = 20_251_122
FLIPS = 150
EP_FILES = (
    epsamples.COMMON_FILE,
    epsamples.RANK_0_FILE,
    epsamples.RANK_1_FILE,
    epsamples.COMMON,
    epsamples.RANK_1,
    "moeconv.json",
    "moeconv/origin",
    "config.json",
    "tokenizer.json",
)


def _places(name: str, raw: bytes) -> Iterator[tuple[int, int]]:
    """Positions and bits, the same in every run; a data file's padding gets its share only."""
    chance = random.Random(f"{SEED} {name}")
    size = len(raw)
    stretches = [(0, size)]
    if name.endswith(".safetensors"):
        text = len(raw[:4096].rstrip())
        stretches = [(0, text), (text, 4096), (4096, size)]
    for number in range(FLIPS):
        start, stop = stretches[number % len(stretches)]
        yield chance.randrange(start, stop), chance.randrange(8)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_and_named(made: Path, name: str):
    _flip(made, name)


@pytest.mark.parametrize("name", EP_FILES)
def test_a_flipped_bit_of_a_sharded_output_is_found_and_named(tmp_path: Path, name: str):
    _flip(epsamples.fresh(tmp_path, "fused"), name)


def _flip(made: Path, name: str) -> None:
    path = made / name
    raw = path.read_bytes()
    unnoticed, unnamed, raised = [], [], []
    for at, bit in _places(name, raw):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :])
        try:
            report = moeconv.verify(made, level="digest", jobs=1)
        except Exception as failure:  # noqa: BLE001 - verify must not raise, whatever the class
            raised.append((at, bit, repr(failure)))
            continue
        if report.ok:
            unnoticed.append((at, bit))
        elif not any(name in str(problem) for problem in report.problems):
            unnamed.append((at, bit, report.problems))
    path.write_bytes(raw)
    assert not unnoticed, f"{len(unnoticed)} of {FLIPS} unnoticed: {unnoticed[:3]}"
    assert not raised, f"{len(raised)} of {FLIPS} raised: {raised[:3]}"
    assert not unnamed, f"{len(unnamed)} of {FLIPS} not named: {unnamed[:3]}"
    assert moeconv.verify(made).ok
