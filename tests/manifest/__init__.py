"""The manifest: every rule of its format, every flipped bit, its exact bytes."""
