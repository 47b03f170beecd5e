# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Does the objective hold the probability ratio?
#
# PPO's clip takes the gradient from a sample whose ratio $r = \pi(a|s) / \pi_{old}(a|s)$ has left
# $[1 - \epsilon, 1 + \epsilon]$, but does not bring it back: other samples, through the shared network, carry it
# further. SPO replaces the clip by a square whose bottom is at $r = 1 + \mathrm{sign}(A)\,\epsilon$, so that a sample
# outside the interval is pulled back.
#
# **Claim.** After 160 full-batch Adam steps on one batch with random advantages, at the large learning rate 0.03, for
# every seed
#
# 1. SPO's mean $|r - 1|$ is below $\epsilon = 0.2$,
# 2. and at most half of PPO's on the same batch from the same weights;
# 3. control: PPO's mean $|r - 1|$ is above $\epsilon$.
#
# **Source.** Z. Xie, Q. Zhang, F. Yang, M. Hutter, R. Xu, "Simple Policy Optimization", ICML 2025, arXiv 2401.16025:
# the objective $\mathbb{E}[\,rA - |A| (r - 1)^2 / (2\epsilon)\,]$, and its observation that SPO's ratio deviation stays
# below $\epsilon$ where PPO's grows. The setting with a fixed batch is ours.
#
# **Tolerance.** None: the three inequalities hold as written, with wide margins. They are claims about a network with
# *one* hidden layer of 64. Each sample is pulled to $|r - 1| = \epsilon$, not below, so a network that can fit every
# sample may come out near $\epsilon$ or above it.

# %%
import os

import matplotlib.pyplot as plt
import torch

from corollary.core.networks import StackedMLP
from corollary.core.optimisers import SeedwiseAdam
from corollary.core.policies import GaussianPolicy
from corollary.online.objectives import (
    bpo_loss,
    bpo_target_ratio,
    policy_gradient_loss,
    ppo_clip_loss,
    ratio_diagnostics,
    spo_loss,
)

FAST = os.environ.get("COROLLARY_FAST") == "1"
SEEDS = range(2 if FAST else 5)
EPSILON, BATCH, STEPS = 0.2, 512, 160
RATES = (0.003, 0.03)

# %% [markdown]
# The four losses per sample. BPO (arXiv 2604.18578) pulls to the same points as SPO with the absolute distance
# instead of the square; its target needs the median of the advantage at a state, which is 0 here.


# %%
def bpo(log_prob, old_log_prob, advantage):
    """BPO with the median 0 of the advantages' distribution."""
    target = bpo_target_ratio(advantage, torch.zeros_like(advantage), epsilon=EPSILON)
    return bpo_loss(log_prob, old_log_prob, advantage, target)


METHODS = {
    "unclipped": policy_gradient_loss,
    "PPO": lambda *batch: ppo_clip_loss(*batch, clip=EPSILON),
    "SPO": lambda *batch: spo_loss(*batch, epsilon=EPSILON),
    "BPO": bpo,
}

# %% [markdown]
# One Gaussian policy per seed, all of them stacked in one tensor ``[seeds, batch, ...]``: states of 8 numbers, actions
# of 2. The norm of each seed's gradient is clipped at 0.5, as in SPO's code and CleanRL's PPO.


# %%
def descend(loss, learning_rate):
    """Return |r - 1| after each step, ``[steps, seeds, batch]``."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    net = StackedMLP((8, 64, 2), generators, activation="tanh", init="orthogonal", output_gain=0.01)
    policy = GaussianPolicy(net, initial_log_std=0.0)

    def draw(*shape):
        return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])

    obs, advantage = draw(BATCH, 8), draw(BATCH)
    with torch.no_grad():
        old = policy(obs)
        action = old.sample(draw(BATCH, 2))
        old_log_prob = old.log_prob(action)

    optimizer = SeedwiseAdam({"policy": policy.parameters()}, learning_rate, max_grad_norm=0.5)
    deviations = []
    for _ in range(STEPS):
        optimizer.step(loss(policy(obs).log_prob(action), old_log_prob, advantage).mean(1))
        with torch.no_grad():
            log_prob = policy(obs).log_prob(action)
        deviations.append(ratio_diagnostics(log_prob, old_log_prob)["ratio_deviation"])
    return torch.stack(deviations)


deviation = {(name, rate): descend(loss, rate) for name, loss in METHODS.items() for rate in RATES}

# %% [markdown]
# Mean and largest $|r - 1|$ of the batch after the last step, and the share of samples outside the interval; each is
# averaged over the seeds.

# %%
print(f"{'':12}{'learning rate':>14}{'mean |r-1|':>12}{'max |r-1|':>12}{'outside':>10}")
for (name, rate), found in deviation.items():
    last = found[-1]
    outside = (last > EPSILON).float().mean()
    print(f"{name:12}{rate:14g}{last.mean():12.3f}{last.amax(1).mean():12.3f}{outside:10.0%}")

# %% [markdown]
# **What to see.** After the first steps SPO's mean stays below the dashed line $\epsilon$ at both learning rates, while
# PPO's crosses it and goes on growing, faster at the larger one. Unclipped, the ratio leaves the picture.

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
for axes, rate in zip(panels, RATES, strict=True):
    for i, name in enumerate(METHODS):
        mean = deviation[name, rate].mean(2)  # [steps, seeds]
        axes.plot(mean.mean(1), color=f"C{i}", label=name)
        axes.fill_between(range(STEPS), mean.amin(1), mean.amax(1), color=f"C{i}", alpha=0.2, linewidth=0)
    axes.axhline(EPSILON, color="black", linestyle="--", linewidth=1)
    axes.set(title=f"learning rate {rate:g}", xlabel="gradient step", yscale="log", ylim=(0.02, 5))
panels[0].set_ylabel("mean |r - 1|; band: all seeds")
panels[0].legend(frameon=False)
plt.show()

# %% [markdown]
# The claim, seed by seed.

# %%
spo, ppo = (deviation[name, 0.03][-1].mean(1) for name in ("SPO", "PPO"))
print("SPO    ", [f"{value:.3f}" for value in spo.tolist()])
print("PPO    ", [f"{value:.3f}" for value in ppo.tolist()])
print("SPO/PPO", [f"{value:.3f}" for value in (spo / ppo).tolist()])
assert (spo < EPSILON).all(), "SPO's mean |r - 1| is not below epsilon"
assert (spo <= 0.5 * ppo).all(), "SPO's mean |r - 1| is more than half of PPO's"
assert (ppo > EPSILON).all(), "the control: the clip alone should not hold the ratio"
