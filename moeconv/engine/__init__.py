"""The only code that writes: tiles to files, files to a committed output."""
