"""The model as a chain of blocks: finding, freezing and running them, and replaying the rest without them."""
