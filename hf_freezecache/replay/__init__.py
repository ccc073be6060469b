"""How cached features come back as training batches."""
