"""Which slot holds which expert: maps, their checks, and other systems' file formats. Pure."""
