"""The `freezecache` command."""
