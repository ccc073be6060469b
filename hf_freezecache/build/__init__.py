"""Making a store: what it will be, where its features come from, and writing it."""
