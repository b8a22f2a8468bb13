"""Coverage-guided fuzzing of one parser: `python -m tests.fuzz.harness header -max_total_time=60`.

Needs atheris (`pip install -e '.[fuzz]'`). What comes after the parser's name goes to libFuzzer. A
document that takes longer than 5 s or more than 256 MB is a finding, as is every exception that is
not one of our error classes.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["moeconv"]):
    from tests.fuzz.targets import TARGETS, tried

BOUNDS = ["-timeout=5", "-rss_limit_mb=1024", "-max_len=65536"]
MEMORY_BYTES = 256 * 1024 * 1024


def main() -> None:
    """Fuzz until told to stop."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        raise SystemExit(f"which parser? {', '.join(TARGETS)}")
    target = TARGETS[sys.argv[1]]
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(target.seeds):
            (Path(corpus) / f"seed-{number}").write_bytes(seed)
        arguments = [sys.argv[0], *BOUNDS, *sys.argv[2:], corpus]
        # libFuzzer's own limit needs a sanitizer's malloc: here Python itself raises MemoryError
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        atheris.Setup(arguments, lambda raw: tried(target, raw) and None)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
