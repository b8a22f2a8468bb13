"""One process of an expert-parallel forward: `python -m tests.runtime.forward JOB.json RANK`.

The model is transformers' own, its experts cut to this rank's slots and filled by `load_into`.
Each process has a part of the batch. Hidden states and routes are gathered, each rank computes
what its slots are asked for, and the sum comes back: the simplest dispatch there is, by nothing
but the placement that the set says.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate import init_empty_weights
from torch import nn

import moeconv.runtime
from tests.oracle.tiny import keep_in_float32

Routes = Callable[[torch.Tensor], torch.Tensor]  # logical ids [T, k] -> local slots, S: elsewhere


def empty_model(config_folder: str, dtype: torch.dtype, experts: str) -> nn.Module:
    """A model with parameters on meta; its buffers, which no checkpoint has, are real."""
    config = transformers.AutoConfig.from_pretrained(config_folder)
    config._experts_implementation = experts
    model_class: Any = getattr(transformers, config.architectures[0])
    with init_empty_weights(include_buffers=False):
        model: nn.Module = model_class._from_config(config, dtype=dtype)
    keep_in_float32(model)
    return model.eval()


def experts_of(model: nn.Module) -> dict[str, Any]:
    """The modules that hold routed experts, by name."""
    return {
        n: m
        for n, m in model.named_modules()
        if hasattr(m, "gate_up_proj") and hasattr(m, "num_experts")
    }


def cut_to_slots(model: nn.Module, slots: int) -> None:
    """Let each module have so many experts."""
    for module in experts_of(model).values():
        module.num_experts = slots
        for name in ("gate_up_proj", "down_proj"):
            old = getattr(module, name)
            new = torch.empty((slots, *old.shape[1:]), dtype=old.dtype, device="meta")
            setattr(module, name, nn.Parameter(new, requires_grad=False))


def routes(row: tuple[int, ...], rank: int, ranks: int, *, spread: bool) -> Routes:
    """Physical slots by the placement: replicas in turn (spread), or always the first."""
    share = len(row) // ranks
    replicas: dict[int, list[int]] = {}
    for slot, expert in enumerate(row):
        replicas.setdefault(expert, []).append(slot)

    def local(logical: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(logical)
        for token, ids in enumerate(logical.tolist()):
            for k, expert in enumerate(ids):
                choice = replicas[expert]
                slot = choice[token % len(choice)] if spread else choice[0]
                out[token, k] = slot - rank * share if slot // share == rank else share
        return out

    return local


def dispatched(module: Any, route: Routes, ranks: int) -> None:
    """Replace a module's forward by the same over all ranks' tokens, with this rank's slots."""
    stock = module.forward

    def forward(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if ranks == 1:
            result: torch.Tensor = stock(hidden, route(index), weights)
            return result
        everywhere = [gathered(t) for t in (hidden, index, weights)]
        summed: torch.Tensor = stock(everywhere[0], route(everywhere[1]), everywhere[2])
        dist.all_reduce(summed)
        rank, tokens = dist.get_rank(), hidden.shape[0]
        return summed[rank * tokens : (rank + 1) * tokens]

    module.forward = forward


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """All ranks' rows, in the order of ranks."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def run(job: dict[str, Any], rank: int) -> torch.Tensor:
    """This process's logits."""
    ranks: int = job["ranks"]
    if ranks > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{job['meet']}", rank=rank, world_size=ranks
        )
    torch.set_num_threads(1)
    model = empty_model(job["config"], getattr(torch, job["dtype"]), job["experts"])
    shard = moeconv.runtime.open(job["set"], ep_rank=rank, ep_size=ranks)
    slots = {len(shard.logical_experts(stack)) for stack in shard.stacks}
    cut_to_slots(model, slots.pop())
    shard.load_into(model, cast=job["dtype"] == "float32")
    for name, module in experts_of(model).items():
        route = routes(shard.placement[name], rank, ranks, spread=job["spread"])
        dispatched(module, route, ranks)
    ids = torch.tensor(job["ids"])
    mine = ids.chunk(ranks)[rank]
    with torch.inference_mode():
        out: Any = model(input_ids=mine, use_cache=False)
    if ranks > 1:
        dist.destroy_process_group()
    logits: torch.Tensor = out.logits
    return logits


def main() -> None:
    """Save the logits of each job beside it; the rank is the first argument."""
    rank = int(sys.argv[1])
    for path in map(Path, sys.argv[2:]):
        torch.save(run(json.loads(path.read_text()), rank), path.with_suffix(f".{rank}.pt"))


if __name__ == "__main__":
    main()
