"""Model files: the content of each kind, read with our own readers before a framework gets it."""
