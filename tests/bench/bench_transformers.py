"""Loading with transformers: a fused checkpoint against the per-expert one it was made from.

    python -m tests.bench.bench_transformers /fast/disk/folder --layers 4 --rounds 5

Makes a checkpoint of Qwen3-30B-A3B's real shapes with that many layers, fuses it, and loads both
with `from_pretrained`, each time in a process of its own, the order alternating, files in the page
cache, and touches every page of every parameter. The parameters of both are compared once. Prints
median seconds, the memory beside the page cache, and the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import moeconv
from tests.bench.make_checkpoint import write_qwen3_30b

_LOAD = """
import json, sys, time, torch, transformers, xxhash
torch.set_num_threads(2)
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(l.split()[1]) * 1024 for l in status if l.startswith("RssAnon"))
import threading
peak, over, start = anonymous(), threading.Event(), anonymous()
def watch():
    global peak
    while not over.wait(0.01):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
began = time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
for p in model.parameters():  # what is only mapped is read now
    p.data.view(-1).view(torch.uint8)[::4096].sum()
seconds = time.perf_counter() - began
over.set()
watcher.join()
values = {}
if len(sys.argv) > 2:
    for name, p in model.state_dict().items():
        values[name] = xxhash.xxh3_128_hexdigest(p.contiguous().view(torch.uint8).numpy())
print(json.dumps({"seconds": seconds, "peak": peak - start, "values": values}))
"""


def loaded(directory: Path, *, with_values: bool = False) -> tuple[float, int, dict[str, str]]:
    """Load once in a new process: seconds, bytes of memory beyond the start, digests if wanted."""
    command = [sys.executable, "-c", _LOAD, str(directory), *(["values"] if with_values else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    return found["seconds"], found["peak"], found["values"]


def main() -> None:
    """Make both checkpoints, compare what they load as, and time them in turn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as place:
        source, fused = Path(place, "source"), Path(place, "fused")
        write_qwen3_30b(source, layers=options.layers)
        moeconv.fuse(source, fused)
        contenders = {"per expert": source, "fused": fused}
        digests = [loaded(path, with_values=True)[2] for path in contenders.values()]
        if digests[0] != digests[1] or not digests[0]:
            raise SystemExit("the two do not load as the same model")
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        peaks: dict[str, list[int]] = {name: [] for name in contenders}
        for number in range(options.rounds):
            for name in list(contenders)[:: 1 if number % 2 else -1]:
                took, peak, _ = loaded(contenders[name])
                seconds[name].append(took)
                peaks[name].append(peak)
        for name in contenders:
            each = ", ".join(f"{s:.1f}" for s in seconds[name])
            sys.stdout.write(
                f"{name:11} {statistics.median(seconds[name]):6.2f} s ({each}), "
                f"{statistics.median(peaks[name]) / 1e9:6.2f} GB\n"
            )
        faster = statistics.median(
            a / b for a, b in zip(seconds["per expert"], seconds["fused"], strict=True)
        )
        less = statistics.median(peaks["per expert"]) / statistics.median(peaks["fused"])
        sys.stdout.write(f"fused: {faster:.1f} x as fast, 1/{less:.1f} of the memory\n")


if __name__ == "__main__":
    main()
