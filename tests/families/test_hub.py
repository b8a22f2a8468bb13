"""Published checkpoints in the names, dtypes and shapes of their real headers, a few layers each.

tests/data/hub.json: rows of safetensors headers on the Hub, with fewer layers and experts; `stacks`
are E, I, H and layout by name, `fused` a tensor that must be made, `alone` a pattern of those that
are no routed expert's, whatever they are called.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import moeconv
from tests.phantoms import phantom, rows

DATA = Path(__file__).resolve().parents[1] / "data" / "hub.json"
MODELS: dict[str, Any] = json.loads(DATA.read_bytes())


@pytest.mark.parametrize("name", MODELS)
def test_found_planned_and_accounted_for(name: str, tmp_path: Path):
    model = MODELS[name]
    tensors = rows("\n".join(model["rows"]))
    src = phantom(tmp_path / "src", tensors, model["config"])
    result = moeconv.fuse(src, tmp_path / "out", dry_run=True)
    stacks = result.source.detection.stacks
    assert model["stacks"] == {
        s.name: [s.sizes.experts, s.sizes.width, s.sizes.hidden, s.layout.name] for s in stacks
    }
    made = {t.name: (t.dtype, t.shape) for f in result.plan.files for t in f.tensors}
    assert rows(model["fused"]).items() <= made.items()
    left = {t.name for t in result.source.detection.others}
    assert left == {n for n in tensors if model["alone"] and re.search(model["alone"], n)}
    assert made.items() >= {n: tensors[n] for n in left}.items()
    assert {entry.source for entry in result.plan.ledger} == tensors.keys()
    verbs = {entry.source: entry.verb for entry in result.plan.ledger}
    assert {verbs[n] for n in left} <= {"copied"}
