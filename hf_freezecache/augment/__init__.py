"""What is random in a sample, and what of it can be repeated on cached features."""
