"""One training: what is frozen, where its batches come from, and what it costs."""
