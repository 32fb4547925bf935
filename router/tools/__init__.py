"""Tool calls: what a client offers (`definitions`), how a model is told (`rendering`), how it answers (`families`, `reading`)."""
