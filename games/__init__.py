"""Normal- and extensive-form games and their solvers. Empty so far: there are no public names yet."""
