"""Policy distributions as small immutable values: log-probability, entropy, divergence, sampling from given noise."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class DiagonalGaussian:
    r"""``N(mean, diag(exp(log_std))^2)`` over the last axis; leading axes are batch.

    Attributes:
        mean: ``[..., d]``.
        log_std: broadcasts against `mean`.
    """

    mean: Tensor
    log_std: Tensor

    def log_prob(self, action: Tensor) -> Tensor:
        r"""``sum_i -((a_i - mu_i) / sigma_i)^2 / 2 - log sigma_i - log(2 pi) / 2``, shape ``[...]``."""
        standardised = (action - self.mean) * torch.exp(-self.log_std)
        return (-0.5 * standardised.square() - self.log_std - 0.5 * _LOG_2PI).sum(-1)

    def entropy(self) -> Tensor:
        """``sum_i log(2 pi e sigma_i^2) / 2``, shape ``[...]``."""
        return (self.log_std + 0.5 * (_LOG_2PI + 1)).expand_as(self.mean).sum(-1)

    def sample(self, noise: Tensor) -> Tensor:
        """``mean + sigma * noise`` for standard normal `noise` ``[..., d]``; differentiable in the parameters."""
        return self.mean + torch.exp(self.log_std) * noise


def kl(p: DiagonalGaussian, q: DiagonalGaussian) -> Tensor:
    r"""``KL(p || q) = sum_i log(s_q/s_p) + (s_p^2 + (m_p - m_q)^2) / (2 s_q^2) - 1/2``, shape ``[...]``.

    Summed, never averaged, over action dimensions; the order of the arguments is the direction.
    """
    variance_ratio = torch.exp(2 * (p.log_std - q.log_std))
    mean_gap = (p.mean - q.mean) * torch.exp(-q.log_std)
    return (q.log_std - p.log_std + 0.5 * (variance_ratio + mean_gap.square()) - 0.5).sum(-1)
