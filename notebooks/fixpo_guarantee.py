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
# # FixPO: every update ends inside the trust region
#
# FixPO adds an adaptive penalty on the divergence to the unclipped surrogate, and after each epoch a second phase that
# takes further steps on the divergence alone until no state of the batch violates the bound. PPO's clip has no such
# guarantee.
#
# **Claim.** After *every* update, for every seed,
#
# $$\max_{s \in \text{batch}} \mathrm{KL}\big(\pi_{old}(\cdot|s) \,\|\, \pi(\cdot|s)\big) \le \epsilon.$$
#
# Control: PPO with the same seeds, batches, networks and learning rate exceeds the same number.
#
# **Source.** K. R. Zentner, U. Puri, Z. Huang, G. S. Sukhatme, "Guaranteed Trust Region Optimization via Two-Phase KL
# Penalization", arXiv 2312.05405: the constraint on the largest divergence, and the fix-up phase that enforces it.
#
# **Tolerance.** None: the inequality is exact in the numbers that the update computes, and the agent raises an error
# if it fails. The environment is CartPole; $\epsilon$ is 0.05 instead of the published 0.5, and the learning rate 3e-3
# instead of 3e-4, so that the bound matters in a short run.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np

from corollary.online import PPO, FixPO

FAST = os.environ.get("COROLLARY_FAST") == "1"
SEEDS = 2 if FAST else 3
ITERATIONS = 4 if FAST else 20
BOUND = 0.05
SHARED = {"n_envs": 16, "n_steps": 128, "batch_size": 256, "learning_rate": 3e-3}
PER_ITERATION = SHARED["n_envs"] * SHARED["n_steps"]

# %% [markdown]
# The log has one line per iteration, so what the callback is given is the largest divergence of a single update, never
# a mean over several.


# %%
def train(kind, **options):
    """Return the agent, and a list of each iteration's metrics."""
    log = []
    agent = kind("CartPole-v1", SEEDS, **SHARED, **options)
    agent.learn(
        ITERATIONS * PER_ITERATION,
        log_every=PER_ITERATION,
        callbacks=[lambda _, report: log.append(report.metrics)],
    )
    assert len(log) == ITERATIONS
    return agent, log


def column(log, name):
    """One metric as an array ``[iterations, seeds]``."""
    return np.array([metrics[name] for metrics in log])


fixpo, fixpo_log = train(FixPO, kl_bound=BOUND)
ppo, ppo_log = train(PPO)

# %% [markdown]
# **What to see.** Every point of FixPO lies on or below the dashed line; PPO's updates go above it whenever a few
# states are moved far, although their mean divergence is small. FixPO's faint crosses are where its epochs stood
# *before* the fix-up: those above the line are what the second phase repaired.

# %%
figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
iteration = np.arange(1, ITERATIONS + 1)
for name, log, color in (("PPO", ppo_log, "C0"), ("FixPO", fixpo_log, "C1")):
    lines = axes.plot(iteration, column(log, "max_kl_old_new"), color=color, marker="o", markersize=3, linewidth=1)
    lines[0].set_label(f"{name}, each seed")
before = axes.plot(iteration, column(fixpo_log, "max_kl_before_fixup"), "x", color="C1", alpha=0.4)
before[0].set_label("FixPO before the fix-up")
axes.axhline(BOUND, color="black", linestyle="--", linewidth=1, label="bound")
axes.set(xlabel="update", ylabel="max over states KL(old || new)", yscale="log")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# What the guarantee costs: the share of gradient steps that the fix-up took, how often the policy had to go back
# towards the old one because the steps did not get inside, and, with so tight a bound, slower learning.

# %%
print(f"{'':8}{'largest max KL':>16}{'mean KL':>10}{'updates above the bound':>26}{'last 20 episodes':>19}")
for name, agent, log in (("FixPO", fixpo, fixpo_log), ("PPO", ppo, ppo_log)):
    largest = column(log, "max_kl_old_new")
    returns = np.mean([np.mean(list(recent)[-20:]) for recent in agent.recent_returns])
    mean = column(log, "kl_old_new").mean()
    print(f"{name:8}{largest.max():16.4f}{mean:10.4f}{(largest > BOUND).mean():26.0%}{returns:19.1f}")
print(f"fix-up: {column(fixpo_log, 'fixup_share').mean():.1%} of FixPO's gradient steps,", end=" ")
print(f"{column(fixpo_log, 'backtracks').sum():.0f} backtracking steps in all")

# %%
assert (column(fixpo_log, "max_kl_old_new") <= BOUND).all(), "FixPO left the trust region"
assert (column(ppo_log, "max_kl_old_new") > BOUND).any(), "the control: PPO should leave the region at least once"
