r"""Objectives of policy optimisation: surrogates, penalties, preference and value losses, as pure functions.

One definition serves deep agents, language-model losses, tabular checks and notebooks. All functions follow the same
rules, which their docstrings do not repeat:

* They work element by element on log-probabilities of any one shape (``[S, B]`` of an agent's minibatch, ``[B, T]``
  of a language model's tokens) and return a value per element. The caller masks and averages.
* Losses are to be minimised. All tensors of a call must have exactly the same shape: nothing is broadcast.
* Old log-probabilities, advantages, targets and weights are constants: no gradient flows into them. Where one does,
  because actions are reparametrised or either argument may be the policy, the docstring says so.
* ``r = exp(log_prob - old_log_prob)`` is the probability ratio. Its logarithm is capped at 20 (r < 4.9e8), which
  keeps every value and gradient finite in float32; a sample beyond the cap has no gradient. Uncapped, PPO's gradient
  would be 0 * inf = NaN just where clipping makes it 0.

`SURROGATES` pairs each loss on the sampled action's log-probability with its derivative ``dL / d log_prob`` in closed
form, the gradient coefficient: exact where a theory check needs it, and what the tests hold autograd to.

Closed-form ``kl(p, q)`` and entropies belong to the distributions in `corollary.core.distributions`; what SAC shares
with offline methods is in `corollary.core.actor_critic`. The direction of
a divergence is the method's choice: KL(old || new) for TRPO (constraint on its mean), PPO with penalty and FixPO
(constraint on its maximum), KL(new || old) for MDPO, KL(target || behaviour) for PROPS.

Sources; [code]: checked with the reference implementation named, [memory]: written from knowledge of the paper.

* TRPO: J. Schulman et al., ICML 2015, arXiv 1502.05477 (the unclipped surrogate) [code: openai/baselines].
* PPO: J. Schulman et al., 2017, arXiv 1707.06347, eq. (7) clip, eq. (8) and section 4 penalty [code: openai/baselines,
  vwxyzjn/cleanrl; the penalty's rule: memory]. Value clipping is openai/baselines', not the paper's.
* Dual clip: D. Ye et al., AAAI 2020, arXiv 1912.09729, eq. (5) [memory]; language models use c = 3.
* Unequal bounds: Q. Yu et al. (DAPO), 2025, arXiv 2503.14476 [memory].
* SPO: Z. Xie et al., ICML 2025, arXiv 2401.16025v8 [code: MyRepositories-hub/Simple-Policy-Optimization].
* BPO, GBPO: arXiv 2604.18578 [code: bounded-ratio-rl/bounded_ratio_rl].
* MDPO: M. Tomar et al., ICLR 2022, arXiv 2005.09814 [code: manantomar/Mirror-Descent-Policy-Optimization].
* FixPO: K. R. Zentner et al., 2023, arXiv 2312.05405 [code: uscresl/stabilized-rl].
* PROPS: N. Corrado, J. Hanna, arXiv 2311.08290 [code: NicholasCorrado/PROPS].
* DPO: R. Rafailov et al., NeurIPS 2023, arXiv 2305.18290, eq. (7). IPO: M. G. Azar et al., AISTATS 2024, arXiv
  2310.12036, eq. (17) [memory].
* CoPG: Y. Flet-Berliac et al., EMNLP 2024, arXiv 2406.19185. REBEL: Z. Gao et al., NeurIPS 2024, arXiv 2404.16767,
  Algorithm 1. A*-PO: K. Brantley et al., 2025, arXiv 2505.20686 [memory].
* Group-relative advantages: Z. Shao et al. (GRPO), 2024, arXiv 2402.03300; Z. Liu et al. (Dr. GRPO), 2025, arXiv
  2503.20783; A. Ahmadian et al. (RLOO), ACL 2024, arXiv 2402.14740 [memory].
* k1, k2, k3: J. Schulman, "Approximating KL Divergence", 2020, joschu.net/blog/kl-approx.html [memory].
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.actor_critic import check_same_shapes, constant_weight

Interval = float | tuple[float, float]
"""Half-widths of an interval of ratios: ``[1 - low, 1 + high]`` for a pair, equal for one number; both >= 0."""

KLEstimator = Literal["k1", "k2", "k3"]

GroupBaseline = Literal["mean", "leave_one_out", "none"]
GroupScale = Literal["none", "sample_std", "population_std"]

_LOG_RATIO_CAP = 20.0

# ------------------------------------------------------------------------------------------------------- surrogates


def probability_ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """``r = exp(min(log_prob - old_log_prob, 20))``; the old log-probability is a constant."""
    check_same_shapes(log_prob=log_prob, old_log_prob=old_log_prob)
    return (log_prob - old_log_prob.detach()).clamp(max=_LOG_RATIO_CAP).exp()


def policy_gradient_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor) -> Tensor:
    """``-r A``: the surrogate whose gradient at r = 1 is the policy gradient; TRPO's, and the linear part of others."""
    check_same_shapes(log_prob=log_prob, advantage=advantage)
    return -advantage.detach() * probability_ratio(log_prob, old_log_prob)


@torch.no_grad()
def policy_gradient_coefficient(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor) -> Tensor:
    """``-r A``."""
    return -advantage * _ratio_derivative(log_prob, old_log_prob)


def ppo_clip_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, *, clip: Interval = 0.2, dual_clip: float | None = None
) -> Tensor:
    """``-min(r A, clip(r, 1 - low, 1 + high) A)``, and with a dual clip c ``-max(min(...), c A)`` where A < 0.

    The minimum keeps the clipped branch only where r has already moved the way A asks, so clipping is one-sided:
    from above for A > 0, from below for A < 0, where the dual clip c > 1 + high is the upper side. That is how it is
    computed, on the logarithm. A clipped sample has no gradient; an infinite `clip` leaves `policy_gradient_loss`.
    """
    check_same_shapes(log_prob=log_prob, old_log_prob=old_log_prob, advantage=advantage)
    log_ratio = log_prob - old_log_prob.detach()
    bounded = _clip_one_side(log_ratio.detach(), advantage, clip, dual_clip)
    # One node for autograd instead of three: a clipped sample becomes a constant.
    return -advantage.detach() * torch.where(bounded == log_ratio, log_ratio, bounded).exp()


@torch.no_grad()
def ppo_clip_coefficient(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, *, clip: Interval = 0.2, dual_clip: float | None = None
) -> Tensor:
    """``-r A``, but 0 where A > 0 and r > 1 + high, or A < 0 and (r < 1 - low or r > c)."""
    log_ratio = log_prob - old_log_prob
    clipped = _clip_one_side(log_ratio, advantage, clip, dual_clip)
    return (-advantage * clipped.exp()).masked_fill_(clipped != log_ratio, 0.0)


def _clip_one_side(log_ratio: Tensor, advantage: Tensor, clip: Interval, dual_clip: float | None) -> Tensor:
    """Clip the logarithm of the ratio on the side that the advantage's sign asks for, or on both with a dual clip."""
    low, high = _interval("clip", clip)
    if dual_clip is not None and not dual_clip > 1 + high:
        raise ValueError(f"dual_clip is {dual_clip}; it must exceed the clip's upper bound {1 + high}.")
    least = math.log1p(-low) if low < 1 else -math.inf
    most = _LOG_RATIO_CAP if dual_clip is None else min(math.log(dual_clip), _LOG_RATIO_CAP)
    if_good, if_bad = log_ratio.clamp(max=min(math.log1p(high), _LOG_RATIO_CAP)), log_ratio.clamp(least, most)
    return torch.where(advantage > 0, if_good, if_bad)


def spo_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, *, epsilon: float = 0.2) -> Tensor:
    """``|A| (r - 1)^2 / (2 epsilon) - r A``, least at ``r = 1 + sign(A) epsilon``.

    Up to a constant it is ``|A| / (2 epsilon)`` times the squared distance of r to that point: samples outside the
    interval are pulled back, with gradients that grow like r^2, so clip the gradient's norm. An infinite epsilon > 0
    leaves `policy_gradient_loss`.
    """
    check_same_shapes(log_prob=log_prob, advantage=advantage)
    _check_positive("epsilon", epsilon)
    advantage = advantage.detach()
    ratio = probability_ratio(log_prob, old_log_prob)
    return advantage.abs() * (0.5 / epsilon) * (ratio - 1).square() - ratio * advantage


@torch.no_grad()
def spo_coefficient(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, *, epsilon: float = 0.2) -> Tensor:
    """``r (|A| (r - 1) / epsilon - A)``."""
    pull = advantage.abs() * (probability_ratio(log_prob, old_log_prob) - 1) / epsilon
    return (pull - advantage) * _ratio_derivative(log_prob, old_log_prob)


def bpo_target_ratio(q: Tensor, median: Tensor, *, epsilon: Interval = 0.3, temperature: float = 0.001) -> Tensor:
    """``r* = 1 - low + (low + high) sigma((q - u) / temperature)``, a constant.

    ``r = 1 - epsilon + 2 epsilon y`` with y = sigma(...) maximises ``E[r q] + 2 epsilon temperature E[H(y)]``, H the
    binary entropy, under ``E r = 1``, all under the old policy at one state, if u solves ``E sigma(...) = 1/2``;
    `bpo_median_loss` finds that u. As temperature -> 0, u becomes the median of q and r* one of the two ends, or their
    middle where q = u: an atom at the median needs a positive temperature to keep ``E r* = 1``. Unequal bounds are
    GBPO's (q and u: reward and median over the standard deviation, of a group); there ``E r*`` is not 1.
    """
    check_same_shapes(q=q, median=median)
    low, high = _interval("epsilon", epsilon)
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; it must be >= 0.")
    gap = (q - median).detach()
    return 1 - low + (low + high) * torch.sigmoid(gap / max(temperature, torch.finfo(gap.dtype).tiny))


def bpo_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, target_ratio: Tensor) -> Tensor:
    """``|A| |r - r*|`` for the target of `bpo_target_ratio`; the weight |A| is |q - V|, GBPO's |R - mean| / std."""
    check_same_shapes(log_prob=log_prob, advantage=advantage, target_ratio=target_ratio)
    return advantage.detach().abs() * (probability_ratio(log_prob, old_log_prob) - target_ratio.detach()).abs()


@torch.no_grad()
def bpo_coefficient(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, target_ratio: Tensor) -> Tensor:
    """``r |A| sign(r - r*)``."""
    side = (probability_ratio(log_prob, old_log_prob) - target_ratio).sign()
    return advantage.abs() * side * _ratio_derivative(log_prob, old_log_prob)


def bpo_median_loss(median: Tensor, q: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``T softplus((q - u) / T) - (q - u) / 2``: its mean is least where the mean of ``sigma((q - u) / T)`` is 1/2.

    As T -> 0 it tends to ``|q - u| / 2``, the median's loss. The released code has T = 1 whatever the target's
    temperature, so its u is not the u that makes ``E r* = 1``.
    """
    check_same_shapes(median=median, q=q)
    _check_positive("temperature", temperature)
    gap = q.detach() - median
    # From gap = 40 T on softplus is the identity to float64's precision; torch's own threshold, 20, is for float32.
    return F.softplus(gap, beta=1 / temperature, threshold=40) - 0.5 * gap


def props_loss(log_prob: Tensor, old_log_prob: Tensor, *, clip: float = 0.3) -> Tensor:
    """``max(r, clip(r, 1 - clip, 1 + clip)) = max(r, 1 - clip)``, r of the behaviour policy over the target policy.

    `ppo_clip_loss` with A = -1 throughout: actions in the buffer become less likely, by at most `clip`.
    """
    low, _ = _interval("clip", clip)
    return probability_ratio(log_prob, old_log_prob).clamp(min=1 - low)


@torch.no_grad()
def props_coefficient(log_prob: Tensor, old_log_prob: Tensor, *, clip: float = 0.3) -> Tensor:
    """``r``, but 0 where r < 1 - clip."""
    derivative = _ratio_derivative(log_prob, old_log_prob)
    return derivative.masked_fill(derivative < 1 - clip, 0.0)


# ---------------------------------------------------------------------------------------- divergences and penalties


def kl_estimate(log_p: Tensor, log_q: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """Estimate KL(p || q) from samples of p, with ``x = log_q - log_p``: k1 ``-x``, k2 ``x^2 / 2``, k3 ``e^x - 1 - x``.

    k1 and k3 are unbiased, k3 is never negative; x is capped at 20 in k3. The order is that of ``kl(p, q)``: an
    agent's step size is ``kl_estimate(old_log_prob, log_prob)``, a language model's distance to its reference
    ``kl_estimate(log_prob, reference_log_prob)``. Gradients flow into both arguments.
    """
    check_same_shapes(log_p=log_p, log_q=log_q)
    x = log_q - log_p
    if estimator == "k1":
        return -x
    if estimator == "k2":
        return 0.5 * x.square()
    if estimator == "k3":
        x = x.clamp(max=_LOG_RATIO_CAP)
        return torch.expm1(x) - x  # exp(x) - 1 would lose the digits of a small step in float32
    raise ValueError(f"estimator is {estimator!r}; choose 'k1', 'k2' or 'k3'.")


@torch.no_grad()
def kl_estimate_coefficient(log_p: Tensor, log_q: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """Derivative in `log_p`: k1 ``1``, k2 ``-x``, k3 ``1 - e^x``; minus that is the derivative in `log_q`."""
    x = log_q - log_p
    if estimator == "k1":
        return torch.ones_like(x)
    return -x if estimator == "k2" else torch.where(x <= _LOG_RATIO_CAP, -torch.expm1(x), 0.0)


def kl_penalised_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, divergence: Tensor, weight: float | Tensor
) -> Tensor:
    """``-r A + sg(weight) * divergence``: PPO with a penalty, FixPO's primary loss, MDPO's inner objective.

    The divergence is the closed-form ``kl`` at each sample's state, in the method's direction (the module's head), or
    an estimate; gradients flow into it. A ``kl`` is stationary at the old policy, so the first step there is the policy
    gradient's. Over all policies MDPO's minimiser is ``pi_old exp(t A) / Z``. The weight is beta or 1 / t_k >= 0; as a
    tensor, say one number per seed, it has as many axes as `log_prob`, or none.
    """
    check_same_shapes(log_prob=log_prob, divergence=divergence)
    return policy_gradient_loss(log_prob, old_log_prob, advantage) + constant_weight(weight, log_prob) * divergence


@torch.no_grad()
def adaptive_kl_coefficient(coefficient: Tensor, divergence: Tensor, target: float) -> Tensor:
    """PPO's rule after an update: beta / 2 where KL < target / 1.5, 2 beta where KL > 1.5 target, else beta."""
    check_same_shapes(coefficient=coefficient, divergence=divergence)
    halved = torch.where(divergence < target / 1.5, coefficient / 2, coefficient)
    return torch.where(divergence > target * 1.5, coefficient * 2, halved)


def fixpo_multiplier_loss(multiplier: Tensor, max_kl: Tensor, *, bound: float, margin: float = 3.0) -> Tensor:
    """``beta sg[bound - margin * max KL]``: descent raises beta while the largest KL exceeds bound / margin.

    `multiplier` and `max_kl` (the largest KL(old || new) over a minibatch's states) have one entry per seed. After
    the step the caller clamps beta at 0.
    """
    check_same_shapes(multiplier=multiplier, max_kl=max_kl)
    return multiplier * (bound - margin * max_kl.detach())


# ---------------------------------------------------------------------------------- off-policy, reparametrised actions


def tsallis_log(log_density: Tensor, index: float) -> Tensor:
    """``log_q(x) = (x^(q-1) - 1) / (q - 1)`` of ``x = exp(log_density)``, ``log x`` at index q = 1, the limit.

    MDPO applies it to each action dimension's density and then sums over dimensions; index 2 - q of the usual
    convention, in [1, 2] there. Densities above 1 grow like x^(q-1). Gradients flow. The released code raises x to at
    least 1e-6, which a logarithmic density does not need.
    """
    if index == 1:
        return log_density
    return torch.expm1((index - 1) * log_density) / (index - 1)


def mdpo_off_policy_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    q: Tensor,
    *,
    kl_coefficient: float = 1.0,
    entropy_coefficient: float = 0.2,
    index: float = 1.0,
) -> Tensor:
    """``c log pi(a~|s) + index (lambda - c) log pi_old(a~|s) - Q(s, a~)``, a~ from pi, c and lambda the coefficients.

    With index 1 its minimiser over policies is ``pi_old^(1 - t lambda) exp(t Q) / Z``, t = 1/c; with c = lambda it is
    `sac_policy_loss`. Any other index wants both log-probabilities as sums of `tsallis_log` with that index. Gradients
    flow into all three tensors, through the action.
    """
    check_same_shapes(log_prob=log_prob, old_log_prob=old_log_prob, q=q)
    return kl_coefficient * log_prob + index * (entropy_coefficient - kl_coefficient) * old_log_prob - q


# ---------------------------------------------------------------------------------- responses: preferences, regressions
# Responses y to one prompt, as a whole: h(y) = log pi(y) - log mu(y) is a sum over tokens, the anchor mu a constant.


def dpo_loss(log_ratio: Tensor, other_log_ratio: Tensor, *, beta: float) -> Tensor:
    """``-log sigma(beta (h - h'))``: y is preferred to y'.

    With labels of probability ``sigma(R - R')`` and pairs that cover everything, the minimiser over all policies is
    ``mu exp(R / beta) / Z``. A label of probability p is the mixture of both orders. Gradients flow into both ratios.
    """
    check_same_shapes(log_ratio=log_ratio, other_log_ratio=other_log_ratio)
    _check_positive("beta", beta)
    return -F.logsigmoid(beta * (log_ratio - other_log_ratio))


def ipo_loss(log_ratio: Tensor, other_log_ratio: Tensor, *, beta: float) -> Tensor:
    """``(h - h' - 1 / (2 beta))^2``: y is preferred to y'.

    With both responses from one law, any preferences P(y > y') and everything covered, the minimiser over all policies
    is ``mu exp(P(y > law) / beta) / Z``. Gradients flow into both ratios.
    """
    check_same_shapes(log_ratio=log_ratio, other_log_ratio=other_log_ratio)
    _check_positive("beta", beta)
    return (log_ratio - other_log_ratio - 0.5 / beta).square()


def reward_difference_loss(
    log_ratio: Tensor, other_log_ratio: Tensor, reward: Tensor, other_reward: Tensor, *, beta: float
) -> Tensor:
    """``(beta (h - h') - (R - R'))^2``, 0 for every pair at ``mu exp(R / beta) / Z``, whatever law pairs come from.

    With the reference policy for mu it is CoPG's loss times 2 beta; with the policy before the update, and beta the
    reciprocal of its step size, REBEL's times beta^2. Gradients flow into both ratios.
    """
    check_same_shapes(log_ratio=log_ratio, other_log_ratio=other_log_ratio, reward=reward, other_reward=other_reward)
    _check_positive("beta", beta)
    return (beta * (log_ratio - other_log_ratio) - (reward - other_reward).detach()).square()


def optimal_value_loss(log_ratio: Tensor, reward: Tensor, value: Tensor, *, beta: float) -> Tensor:
    """``(beta h - (R - V))^2``, A*-PO's second stage: 0 at ``mu exp(R / beta) / Z`` if V is `soft_value` for this beta.

    The published settings have another beta there than here; the optimum is then another one.
    """
    check_same_shapes(log_ratio=log_ratio, reward=reward, value=value)
    _check_positive("beta", beta)
    return (beta * log_ratio - (reward - value).detach()).square()


@torch.no_grad()
def soft_value(reward: Tensor, *, beta: float) -> Tensor:
    """``beta log mean exp(R / beta)`` over the last axis ``[..., N]``: A*-PO's first stage, from N samples of mu.

    With the number of samples it rises on average to ``beta log E_mu exp(R / beta)``, the value of the best policy
    under the penalty beta KL(pi || mu).
    """
    _check_positive("beta", beta)
    return beta * (torch.logsumexp(reward / beta, -1) - math.log(reward.shape[-1]))


@torch.no_grad()
def group_advantage(
    reward: Tensor, *, baseline: GroupBaseline = "mean", scale: GroupScale = "none", epsilon: float = 0.0
) -> Tensor:
    """``(R_i - b_i) / (std + epsilon)`` over the last axis ``[..., G]``, the G responses to one prompt.

    b is the group's mean (Dr. GRPO), the mean of the others (RLOO) or 0; `scale` divides by the group's standard
    deviation with G - 1 (GRPO as it is run, with epsilon 1e-6 to 1e-4) or with G. A group of equal rewards has the
    advantage 0 under any baseline but "none". Centred by its mean, the estimate of the policy gradient is (G - 1) / G
    of it on average, by the others exactly it.
    """
    n = reward.shape[-1]
    if baseline not in get_args(GroupBaseline) or scale not in get_args(GroupScale):
        raise ValueError(
            f"baseline is {baseline!r} and scale {scale!r}; choose of {', '.join(get_args(GroupBaseline))} and of "
            f"{', '.join(get_args(GroupScale))}."
        )
    if n < 2 and (baseline, scale) != ("none", "none"):
        raise ValueError(f"A group has {n} response; statistics of the group need at least 2.")
    if not epsilon >= 0:
        raise ValueError(f"epsilon is {epsilon}; it must be >= 0.")
    centred = reward - reward.mean(-1, keepdim=True)
    # Equal rewards: rounding of their mean would leave a remainder, which a division by its own size makes 1.
    varied = reward.amax(-1, keepdim=True) > reward.amin(-1, keepdim=True)
    centred = torch.where(varied, centred, 0.0)
    advantage = {"none": reward, "mean": centred, "leave_one_out": centred * n / max(n - 1, 1)}[baseline]
    if scale == "none":
        return advantage
    std = reward.std(-1, correction=int(scale == "sample_std"), keepdim=True)
    return advantage / torch.where(varied, std + epsilon, 1.0)


# --------------------------------------------------------------------------------------------------- value functions


def value_loss(value: Tensor, target: Tensor) -> Tensor:
    """``(V - R)^2 / 2``.

    openai/baselines and CleanRL have the 1/2; Stable-Baselines3, Tianshou, FixPO and MDPO do not: double the
    coefficients that they publish.
    """
    check_same_shapes(value=value, target=target)
    return 0.5 * (value - target.detach()).square()


def clipped_value_loss(value: Tensor, old_value: Tensor, target: Tensor, *, clip: float = 0.2) -> Tensor:
    """``max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2) / 2``; an infinite clip > 0 is `value_loss`.

    The bound is in the units of the value, so it depends on the scale of rewards.
    """
    check_same_shapes(value=value, old_value=old_value, target=target)
    _check_positive("clip", clip)
    old_value, target = old_value.detach(), target.detach()
    clipped = old_value + (value - old_value).clamp(-clip, clip)
    return 0.5 * torch.maximum((value - target).square(), (clipped - target).square())


@torch.no_grad()
def value_coefficient(value: Tensor, target: Tensor) -> Tensor:
    """``V - R``, the derivative of `value_loss` in the value."""
    return value - target


@torch.no_grad()
def clipped_value_coefficient(value: Tensor, old_value: Tensor, target: Tensor, *, clip: float = 0.2) -> Tensor:
    """``V - R``, but 0 where V left the interval and the clipped error is the larger one."""
    move, error = value - old_value, value - target
    near = move.clamp(-clip, clip)
    return error.masked_fill_((near != move) & ((old_value + near - target).abs() > error.abs()), 0.0)


# -------------------------------------------------------------------------------------------------------- diagnostics


@torch.no_grad()
def ratio_diagnostics(log_prob: Tensor, old_log_prob: Tensor, *, clip: Interval = 0.2) -> dict[str, Tensor]:
    """How far each sample's ratio has moved, to be averaged (or maximised) by the caller.

    ``kl_k1`` and ``kl_k3`` estimate KL(old || new), ``ratio_deviation`` is |r - 1|, and the mean of ``clip_fraction``
    the share of ratios outside the clip's interval, whatever the advantage.
    """
    check_same_shapes(log_prob=log_prob, old_log_prob=old_log_prob)
    low, high = _interval("clip", clip)
    log_ratio = log_prob - old_log_prob
    capped = log_ratio.clamp(max=_LOG_RATIO_CAP)
    move = torch.expm1(capped)  # r - 1
    return {
        "kl_k1": -log_ratio,
        "kl_k3": move - capped,
        "ratio_deviation": move.abs(),
        "clip_fraction": (move != move.clamp(-low, high)).to(move.dtype),
    }


@torch.no_grad()
def explained_variance(value: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """``1 - Var(R - V) / Var(R)`` over the last axis: 1 is perfect, 0 no better than a constant.

    With `weight`, of the same shape, variances are weighted. A constant error is not counted. Where R itself is
    constant the result is not finite.
    """
    check_same_shapes(value=value, target=target)
    if weight is None:
        return 1 - (target - value).var(-1, correction=0) / target.var(-1, correction=0)
    check_same_shapes(value=value, weight=weight)

    def variance(x: Tensor) -> Tensor:
        mean = (weight * x).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True)
        return (weight * (x - mean).square()).sum(-1)

    return 1 - variance(target - value) / variance(target)


# ------------------------------------------------------------------------------------------------------------ registry


@dataclass(frozen=True)
class Surrogate:
    """A loss per sample and its derivative with respect to its first argument, both functions of the same arguments."""

    loss: Callable[..., Tensor]
    coefficient: Callable[..., Tensor]


def _kl_surrogate(estimator: KLEstimator) -> Surrogate:
    return Surrogate(*(partial(f, estimator=estimator) for f in (kl_estimate, kl_estimate_coefficient)))


SURROGATES: Mapping[str, Surrogate] = MappingProxyType(
    {
        "policy_gradient": Surrogate(policy_gradient_loss, policy_gradient_coefficient),
        "ppo_clip": Surrogate(ppo_clip_loss, ppo_clip_coefficient),
        "spo": Surrogate(spo_loss, spo_coefficient),
        "bpo": Surrogate(bpo_loss, bpo_coefficient),
        "props": Surrogate(props_loss, props_coefficient),
        "kl_k1": _kl_surrogate("k1"),
        "kl_k2": _kl_surrogate("k2"),
        "kl_k3": _kl_surrogate("k3"),
    }
)


def _ratio_derivative(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """``dr / d log_prob``: r itself, 0 beyond the cap."""
    log_ratio = log_prob - old_log_prob
    return torch.where(log_ratio <= _LOG_RATIO_CAP, log_ratio.exp(), 0.0)


def _interval(name: str, half_widths: Interval) -> tuple[float, float]:
    low, high = half_widths if isinstance(half_widths, tuple) else (half_widths, half_widths)
    if not (low >= 0 and high >= 0):
        raise ValueError(f"{name} is {half_widths}; it must be >= 0, or a pair of such numbers (low, high).")
    return low, high


def _check_positive(name: str, number: float) -> None:
    if not number > 0:
        raise ValueError(f"{name} is {number}; it must be > 0.")
