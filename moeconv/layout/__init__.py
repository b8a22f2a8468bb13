"""How experts are stored: the axes notation, and recipes that use it. Pure: no disk but recipes."""
