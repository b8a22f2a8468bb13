"""Which expert stacks a checkpoint has and how they are stored."""
