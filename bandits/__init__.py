"""Bandit policies, environments and off-policy evaluation. Empty so far: there are no public names yet."""
