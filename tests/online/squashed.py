"""What the tests of SAC and off-policy MDPO share: policies set by hand, and noise whose moments are exact."""

import torch
from torch import Tensor

from corollary.core.distributions import DiagonalGaussian, SquashedGaussian
from corollary.core.policies import SquashedGaussianPolicy


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def set_policy(policy: SquashedGaussianPolicy, mean: list[float], log_std: list[float]) -> SquashedGaussian:
    """Let every seed's policy be one squashed Gaussian whatever the state, and return it."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
        policy.net.biases[-1].copy_(f64(mean + log_std))
    return SquashedGaussian(DiagonalGaussian(f64(mean), f64(log_std)))


def balanced_noise(n: int) -> Tensor:
    """``[2, n, 2]`` with mean 0 and mean square 1 in each column, so that the mean score of a Gaussian is exactly 0."""
    noise = torch.randn(2, n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = noise - noise.mean(1, keepdim=True)
    return noise / noise.square().mean(1, keepdim=True).sqrt()
