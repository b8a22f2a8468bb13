"""Local files and the Hub: paths, descriptors, reads and writes; names are checked here, once."""
