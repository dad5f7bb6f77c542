"""A run: data to a trained adapter, what it will cost, and what it has cost."""
