"""What `moeconv shard` and `fuse` write, of any family and layout, opens and loads."""

import tempfile
from contextlib import suppress
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

import moeconv
import moeconv.runtime
from moeconv.errors import NoTorchDtype, NotVirtual
from tests.models import FAMILIES, Disk, Model, disks, models
from tests.runtime.handmade import raw
from tests.shard.reading import expected
from tests.shard.test_shards import EPS, placements


@settings(max_examples=15)
@given(models(), disks(), st.data())
def test_any_output(model: Model, disk: Disk, data: st.DataObject):
    layouts = list(FAMILIES[model.family].layouts)
    source, target = (data.draw(st.sampled_from(layouts)) for _ in range(2))
    ep = data.draw(st.sampled_from(EPS))
    rows, virtual = data.draw(placements(model, ep)), data.draw(st.booleans())
    with tempfile.TemporaryDirectory() as name:
        src = disk.write(Path(name, "src"), model.tensors(source), model.config)
        out = Path(name, "out")
        try:
            moeconv.shard(
                src, out, ep_size=ep, placement=rows, allow_duplicates=True,
                layout=target, from_layout=source, virtual=virtual,
            )  # fmt: skip
        except NotVirtual:
            return
        wanted = expected(model, target, rows, ep)
        for rank in range(ep):
            shard = moeconv.runtime.open(out, ep_rank=rank, ep_size=ep)
            own = wanted[rank].items() | model.others.items()
            for tensor, (_, _, stored) in own:
                with suppress(NoTorchDtype):
                    assert raw(shard.load(names=[tensor])[tensor]) == stored, tensor
        whole = Path(name, "whole")
        moeconv.fuse(src, whole, layout=target, from_layout=source)
        shard = moeconv.runtime.open(whole, ep_rank=0, ep_size=1)
        assert set(shard.names) == set(model.tensors(target))
