"""Expert-parallel sets: held against an independent reading, never against the planner."""
