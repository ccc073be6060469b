"""Cached features on disk: codecs, the format of a store, its fingerprint, and stores that are no longer needed."""
