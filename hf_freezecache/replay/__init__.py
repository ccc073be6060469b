"""Cached features as training batches."""
