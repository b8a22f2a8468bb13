"""The library: open a checkpoint, convert, shard, merge, verify."""
