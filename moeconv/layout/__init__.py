"""What the tensors mean: axes, recipes, expert stacks and their logical matrices. Pure."""
