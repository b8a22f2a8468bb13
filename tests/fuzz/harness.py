"""Coverage-guided fuzzing of one parser: `python -m tests.fuzz.harness header -max_total_time=60`.

Needs atheris (`pip install -e '.[fuzz]'`). What comes after the parser's name goes to libFuzzer;
the bounds below are its: a document that takes longer than 5 s, or more than 256 MB at once, is a
finding, as is every exception that is not one of our error classes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["moeconv"]):
    from tests.fuzz.targets import TARGETS, tried

BOUNDS = ["-timeout=5", "-malloc_limit_mb=256", "-rss_limit_mb=1024", "-max_len=65536"]


def main() -> None:
    """Fuzz until told to stop."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        raise SystemExit(f"which parser? {', '.join(TARGETS)}")
    target = TARGETS[sys.argv[1]]
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(target.seeds):
            (Path(corpus) / f"seed-{number}").write_bytes(seed)
        arguments = [sys.argv[0], *BOUNDS, *sys.argv[2:], corpus]
        atheris.Setup(arguments, lambda raw: tried(target, raw) and None)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
