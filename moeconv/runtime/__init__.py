"""The loader: one expert-parallel rank's bytes of an output into tensors, or directly into a model.

Small on purpose: it needs torch and the manifest's reader, reads nothing that the rank does not
need, and communicates with no other process.

>>> import moeconv.runtime
>>> shard = moeconv.runtime.open(OUT, ep_rank=0, ep_size=2)
>>> shard.load_into(model).tensors
5
"""

from __future__ import annotations

from moeconv.integrations import dequantize_fused_fp8
from moeconv.runtime.rebalance import Moves
from moeconv.runtime.shard import Shard, ep_rank_of
from moeconv.runtime.shard import open_shard as open  # noqa: A004 - read as `moeconv.runtime.open`
from moeconv.runtime.updater import Report, Updater

__all__ = ["Moves", "Report", "Shard", "Updater", "dequantize_fused_fp8", "ep_rank_of", "open"]
