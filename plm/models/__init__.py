"""One file per family, each read top to bottom without opening another."""
