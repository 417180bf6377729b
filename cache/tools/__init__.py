"""Work on whole caches: verify, repair, extend, copy, merge, convert, export, import, info."""
