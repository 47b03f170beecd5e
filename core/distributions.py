r"""Policy distributions as small immutable values: log-probability, entropy, divergence, sampling from given noise.

An action is a row ``[..., d_a]``: floats for :class:`DiagonalGaussian`, category indices for :class:`Categorical`. The
leading axes are batch, for example ``[S, B]``. What is the same for both has the same name, so that an algorithm need
not ask which one it holds; results are summed, never averaged, over the components of the action.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

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

    noise: ClassVar[Literal["normal", "uniform"]] = "normal"

    def log_prob(self, action: Tensor) -> Tensor:
        r"""``sum_i -((a_i - mu_i) / sigma_i)^2 / 2 - log sigma_i - log(2 pi) / 2``, shape ``[...]``."""
        standardised = (action - self.mean) / torch.exp(self.log_std)
        surprise = torch.addcmul(self.log_std, standardised, standardised, value=0.5).sum(-1)
        return -0.5 * _LOG_2PI * standardised.shape[-1] - surprise

    def entropy(self) -> Tensor:
        """``sum_i log(2 pi e sigma_i^2) / 2``, shape ``[...]``."""
        return (self.log_std + 0.5 * (_LOG_2PI + 1)).expand_as(self.mean).sum(-1)

    def mode(self) -> Tensor:
        """Return the most likely action, the mean ``[..., d]``."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """``mean + sigma * noise`` for standard normal `noise` ``[..., d]``; differentiable in the parameters."""
        return self.mean + torch.exp(self.log_std) * noise

    def parameters_tensor(self) -> Tensor:
        """Return mean, then log_std, as one tensor ``[..., 2 d]``."""
        return torch.cat([self.mean, self.log_std.expand_as(self.mean)], -1)

    def rebuild(self, parameters: Tensor) -> "DiagonalGaussian":
        """Return the distribution of this kind with the given :meth:`parameters_tensor`."""
        mean, log_std = parameters.chunk(2, -1)
        return DiagonalGaussian(mean, log_std)

    def log_prob_gradient(self, action: Tensor) -> Tensor:
        """Derivative of :meth:`log_prob` in the parameters, ``((a - mu) / sigma^2, ((a - mu) / sigma)^2 - 1)``."""
        standardised = (action - self.mean) * torch.exp(-self.log_std)
        return torch.cat([standardised * torch.exp(-self.log_std), standardised.square() - 1], -1)

    def entropy_gradient(self) -> Tensor:
        """Derivative of :meth:`entropy` in the parameters, ``(0, 1)``."""
        return torch.cat([torch.zeros_like(self.mean), torch.ones_like(self.mean)], -1)

    def fisher_product(self, vector: Tensor) -> Tensor:
        r"""Multiply `vector` ``[..., 2 d]`` by the Fisher matrix in the parameters, ``diag(1 / sigma^2, 2)``.

        The matrix is the Hessian of ``kl(p, q)`` in the parameters of q (or of p) at ``q = p``.
        """
        along_mean, along_log_std = vector.chunk(2, -1)
        return torch.cat([along_mean * torch.exp(-2 * self.log_std), 2 * along_log_std], -1)


@dataclass(frozen=True)
class Categorical:
    r"""Independent categorical variables with ``p(k) = exp(logit_k) / sum_j exp(logit_j)``; leading axes are batch.

    Attributes:
        logits: ``[..., sum(sizes)]``, the components one after the other.
        sizes: number of categories of each of the ``d_a`` components.
    """

    logits: Tensor
    sizes: tuple[int, ...]

    noise: ClassVar[Literal["normal", "uniform"]] = "uniform"

    @cached_property
    def log_table(self) -> Tensor:
        """Log-probabilities, ``[..., n]`` for one component, else ``[..., d_a, n]`` with n the greatest size.

        Entries beyond a component's size have the probability 0 and a log-probability that is finite, so that a
        product of the two is 0.
        """
        return torch.log_softmax(self._table(self.logits, padding=-1e30), -1)

    @cached_property
    def table(self) -> Tensor:
        """Probabilities, in the layout of :attr:`log_table`."""
        return self.log_table.exp()

    def log_prob(self, action: Tensor) -> Tensor:
        """``sum_i log p_i(a_i)`` for int64 `action` ``[..., d_a]`` with as many axes as the logits, shape ``[...]``."""
        if len(self.sizes) == 1:
            return torch.take_along_dim(self.log_table, action, -1).squeeze(-1)
        return torch.take_along_dim(self.log_table, action.unsqueeze(-1), -1).sum((-2, -1))

    def entropy(self) -> Tensor:
        """``-sum_i sum_k p_i(k) log p_i(k)``, shape ``[...]``."""
        return -(self.table * self.log_table).sum(self._summed)

    def mode(self) -> Tensor:
        """Return the most likely category of each component, int64 ``[..., d_a]``."""
        return self.log_table.argmax(-1, keepdim=len(self.sizes) == 1)

    def sample(self, noise: Tensor) -> Tensor:
        """Return the category in whose piece of [0, 1) each `noise` ``[..., d_a]`` lies, int64 ``[..., d_a]``.

        The pieces are as long as the probabilities and stand in the order of the categories: the inverse of the
        distribution function, applied to noise that is uniform on [0, 1).
        """
        cumulative = self.table.cumsum(-1)
        # Rounding lets the sum of the probabilities miss 1. As a share of that sum, noise below 1 stays below it.
        level = (noise if len(self.sizes) == 1 else noise.unsqueeze(-1)) * cumulative[..., -1:]
        index = (level >= cumulative).sum(-1, keepdim=len(self.sizes) == 1)
        if len(set(self.sizes)) == 1:
            return index
        return torch.minimum(index, _last_category(self.sizes, index.device))  # where a parallel sum rounds differently

    def parameters_tensor(self) -> Tensor:
        """Return the logits ``[..., sum(sizes)]``."""
        return self.logits

    def rebuild(self, parameters: Tensor) -> "Categorical":
        """Return the distribution of this kind with the given :meth:`parameters_tensor`."""
        return Categorical(parameters, self.sizes)

    def log_prob_gradient(self, action: Tensor) -> Tensor:
        """Derivative of :meth:`log_prob` in the logits: 1 at the category taken, minus the probabilities."""
        if len(self.sizes) == 1:
            return (-self.table).scatter_add_(-1, action, torch.ones_like(action, dtype=self.logits.dtype))
        chosen = action.unsqueeze(-1)
        return self._flat((-self.table).scatter_add_(-1, chosen, torch.ones_like(chosen, dtype=self.logits.dtype)))

    def entropy_gradient(self) -> Tensor:
        """Derivative of :meth:`entropy` in the logits, ``-p (log p + H_i)`` with the entropy H_i of the component."""
        entropies = -(self.table * self.log_table).sum(-1, keepdim=True)
        return self._flat(-self.table * (self.log_table + entropies))

    def fisher_product(self, vector: Tensor) -> Tensor:
        r"""Multiply `vector` ``[..., sum(sizes)]`` by the Fisher matrix in the logits, ``diag(p) - p p^T`` in blocks.

        The matrix is the Hessian of ``kl(p, q)`` in the logits of q (or of p) at ``q = p``.
        """
        weighted = self.table * self._table(vector, padding=0.0)
        return self._flat(weighted - self.table * weighted.sum(-1, keepdim=True))

    @property
    def _summed(self) -> int | tuple[int, int]:
        return -1 if len(self.sizes) == 1 else (-2, -1)

    def _flat(self, table: Tensor) -> Tensor:
        """Bring the layout of :attr:`log_table` into ``[..., sum(sizes)]``."""
        if len(self.sizes) == 1:
            return table
        return torch.cat([row[..., :n] for row, n in zip(table.unbind(-2), self.sizes, strict=True)], -1)

    def _table(self, flat: Tensor, padding: float) -> Tensor:
        """Bring ``[..., sum(sizes)]`` into the layout of :attr:`log_table`."""
        if len(self.sizes) == 1:
            return flat
        width = max(self.sizes)
        if min(self.sizes) == width:
            return flat.view(*flat.shape[:-1], -1, width)
        parts = flat.split(self.sizes, -1)
        return torch.stack([F.pad(part, (0, width - part.shape[-1]), value=padding) for part in parts], -2)


@dataclass(frozen=True)
class SquashedGaussian:
    r"""``a = tanh(u)`` for ``u ~ base``: an action in (-1, 1)^d; leading axes are batch.

    ``log pi_i(a_i) = log N_i(u_i) - log(1 - tanh(u_i)^2)``, the last logarithm computed as
    ``2 (log 2 - u - softplus(-2 u))``, which keeps its digits where ``1 - tanh^2`` rounds to 0. Densities are asked for
    at u, the latent, which determines a and cannot be recovered from an a that rounds to 1. As tanh is one-to-one,
    divergences are those of the bases: ``kl(p.base, q.base)``.

    Attributes:
        base: the Gaussian of u, ``[..., d]``.
    """

    base: DiagonalGaussian

    noise: ClassVar[Literal["normal", "uniform"]] = "normal"

    def log_densities(self, latent: Tensor) -> Tensor:
        """Log-density of each component of ``tanh(latent)``, ``[..., d]``; the action's is their sum."""
        return self._log_densities(latent, (latent - self.base.mean) / torch.exp(self.base.log_std))

    def draw(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latent for standard normal `noise` ``[..., d]`` and its log-densities, both differentiable.

        As :meth:`log_densities` of that latent, but without the cancellation in ``(u - mean) / sigma`` at a tiny sigma.
        """
        latent = self.base.sample(noise)
        return latent, self._log_densities(latent, noise)

    def sample(self, noise: Tensor) -> Tensor:
        """``tanh(mean + sigma * noise)``."""
        return torch.tanh(self.base.sample(noise))

    def mode(self) -> Tensor:
        """Return ``tanh(mean)``, the median, which the deterministic policy plays."""
        return torch.tanh(self.base.mean)

    def _log_densities(self, latent: Tensor, standardised: Tensor) -> Tensor:
        normal = -0.5 * (standardised.square() + _LOG_2PI) - self.base.log_std
        return normal - 2 * (math.log(2) - latent - F.softplus(-2 * latent))


Distribution = DiagonalGaussian | Categorical


def kl(p: Distribution, q: Distribution) -> Tensor:
    r"""``KL(p || q) = E_p[log p - log q]`` in closed form, shape ``[...]``; the order is the direction.

    Gaussian: ``sum_i log(s_q/s_p) + (s_p^2 + (m_p - m_q)^2) / (2 s_q^2) - 1/2``;
    categorical: ``sum_i sum_k p_i(k) (log p_i(k) - log q_i(k))``.

    Raises:
        TypeError: if p and q are not of the same type.
        ValueError: if they are categorical with different sizes.
    """
    if isinstance(p, DiagonalGaussian) and isinstance(q, DiagonalGaussian):
        log_ratio = 2 * (p.log_std - q.log_std)  # of the variances
        mean_gap = (p.mean - q.mean) / torch.exp(q.log_std)
        # Between close policies exp(x) - 1 - x would lose all its digits without expm1.
        return 0.5 * torch.addcmul(torch.expm1(log_ratio) - log_ratio, mean_gap, mean_gap).sum(-1)
    if isinstance(p, Categorical) and isinstance(q, Categorical):
        if p.sizes != q.sizes:
            raise ValueError(f"kl needs the same categories on both sides; got sizes {p.sizes} and {q.sizes}.")
        return (p.table * (p.log_table - q.log_table)).sum(p._summed)
    raise TypeError(f"kl needs two distributions of one type; got {type(p).__name__} and {type(q).__name__}.")


@lru_cache
def _last_category(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(sizes, device=device) - 1
