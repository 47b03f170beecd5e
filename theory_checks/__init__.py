"""Claims that algorithms rest on, executed with their controls; ``corollary check`` runs them.

The names are in the modules: ``check`` (declare one), ``run`` (run it), ``solvers``, ``families``, ``report``.
"""
