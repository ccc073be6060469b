"""Heads: what was trained behind the cut, saved, loaded and pushed without the frozen part that everybody has."""
