r"""Losses that several actor-critic methods share, with a dataset or an environment; pure functions for one seed.

Every axis in front of those named is a batch of independent seeds: ``B`` rows, ``M`` critics of an ensemble. A
`weight` ``[..., B]`` multiplies each row's share of the loss; ``None`` stands for ones, and weights of mean 1 leave
the scale of a loss as it is.
"""

import torch
from torch import Tensor


def weighted_mean(values: Tensor, weight: Tensor | None = None) -> Tensor:
    """``mean_b w_b x_b`` over the last axis of ``[..., B]``; the plain mean without weights."""
    return values.mean(-1) if weight is None else (weight * values).mean(-1)


def average(values: Tensor, weight: Tensor | None = None) -> Tensor:
    """``sum_b w_b x_b / sum_b w_b`` over the last axis of ``[..., B]``; the plain mean where no weight is positive.

    For what a loss divides by: with :func:`weighted_mean` there, a batch's total weight would cancel from the loss.
    """
    if weight is None:
        return values.mean(-1)
    total = weight.mean(-1)
    weighed = weighted_mean(values, weight) / total.clamp(min=torch.finfo(total.dtype).tiny)
    return torch.where(total > 0, weighed, values.mean(-1))


def td_target(reward: Tensor, terminated: Tensor, next_value: Tensor, discount: float) -> Tensor:
    """``r + gamma (1 - d) v'`` over ``[..., B]``: only a true termination stops the bootstrap."""
    return reward + discount * (1 - terminated) * next_value


def critic_loss(q: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """``sum_m mean_b w_b (Q_m - y)^2`` for values ``[..., M, B]`` and targets ``[..., B]``; shape ``[...]``."""
    per_row = (q - target.unsqueeze(-2)).square()
    return weighted_mean(per_row, None if weight is None else weight.unsqueeze(-2)).sum(-1)


def sac_policy_loss(log_prob: Tensor, q: Tensor, entropy_coefficient: float | Tensor) -> Tensor:
    """``sg(alpha) log pi(a~|s) - Q(s, a~)`` at reparametrised actions: gradients flow into both tensors.

    Raises:
        ValueError: if the shapes of `log_prob` and `q` differ, or alpha has another number of axes.
    """
    check_same_shapes(log_prob=log_prob, q=q)
    return constant_weight(entropy_coefficient, log_prob) * log_prob - q


def entropy_coefficient_loss(
    log_coefficient: Tensor, log_prob: Tensor, target_entropy: float, weight: Tensor | None = None
) -> Tensor:
    """``-log alpha mean (sg[log pi] + H)`` for ``log alpha [...]``, ``log pi [..., B]``: alpha rises if entropy < H."""
    return -log_coefficient * weighted_mean(log_prob.detach() + target_entropy, weight)


def constant_weight(weight: float | Tensor, like: Tensor) -> float | Tensor:
    """Hold a weight constant; refuse one per seed that would line up with the last axis instead."""
    if not isinstance(weight, Tensor):
        return weight
    if weight.ndim not in (0, like.ndim):
        raise ValueError(
            f"The weight has shape {list(weight.shape)} for log-probabilities {list(like.shape)}; "
            "give it the same number of axes, for example weight.unsqueeze(-1)."
        )
    return weight.detach()


def check_same_shapes(**tensors: Tensor) -> None:
    """Raise a ValueError unless all are tensors of the first one's shape."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}; pass a torch.Tensor.")
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)} but {first_name} {list(first.shape)}; they must be the same."
            )
