"""Numerics with a plain reference and fast back ends that are tested against it."""

from .conjugate_gradient import conjugate_gradient
from .mlp import mlp
from .neighbours import NeighbourIndex
from .scans import discounted_sums, gae, lambda_returns
from .streams import RandomStream, torch_generator

__all__ = [
    "NeighbourIndex",
    "RandomStream",
    "conjugate_gradient",
    "discounted_sums",
    "gae",
    "lambda_returns",
    "mlp",
    "torch_generator",
]
