"""Algorithms that learn from an environment, one file each. Empty so far: there are no public names yet."""
