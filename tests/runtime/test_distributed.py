"""Four processes over gloo: EP x FSDP2, DTensors of all kinds, and not a word between them."""

import subprocess
import sys
from pathlib import Path

from tests.runtime.workers import SCENARIOS, WORLD


def test_four_processes(tmp_path: Path):
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.runtime.workers", str(rank), str(tmp_path)],
            cwd=root,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    said = []
    for process in processes:
        try:
            _, errors = process.communicate(timeout=100)
        finally:
            process.kill()
        said.append(errors)
        if process.returncode:
            for other in processes:
                other.kill()
    assert all(p.returncode == 0 for p in processes), "\n".join(said)
    for rank in range(WORLD):
        done = (tmp_path / f"done{rank}").read_text().split()
        assert done == [s.__name__ for s in SCENARIOS]
