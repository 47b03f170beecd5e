"""Claims that algorithms rest on, executed with their controls. Empty so far: there are no public names yet."""
