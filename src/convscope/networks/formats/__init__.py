"""Model files: what each kind holds, read with our own readers before a framework sees it."""
