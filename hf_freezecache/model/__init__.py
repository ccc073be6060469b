"""The model as a chain of blocks: finding them, freezing them, running them alone, bypassing them."""
