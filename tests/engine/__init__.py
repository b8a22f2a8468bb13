"""How bytes move: by which method, how many of them, and always the same ones."""
