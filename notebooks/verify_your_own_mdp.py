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
# # Verify your own MDP
#
# A bound that was proved for all MDPs holds on yours too; what it is *worth* on yours is another matter. Here a small
# maintenance problem is written down as arrays, solved exactly, handed to the library's checks, and played
# as a gymnasium environment.
#
# **Claim.** On this problem
#
# 1. four solvers (policy iteration, value iteration, and both linear programs) give one optimal value at the start;
# 2. the performance-difference lemma holds to rounding, and the bound on the loss of a greedy policy holds;
# 3. the environment made of the arrays has their dynamics: Monte-Carlo returns of the optimal policy agree with the
#    computed value;
# 4. control: arrays in which one row has lost 1 % of its probability are refused, by state and action.
#
# **Source.** The lemma: S. Kakade, J. Langford, ICML 2002, Lemma 6.1; the bound: R. Williams, L. Baird, 1993. The
# problem is ours.
#
# **Tolerance.** 1: 1e-6 (the linear programs' own), else 1e-8. 2: rounding, as the checks have it. 3: four standard
# errors of the mean.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import torch

from corollary.theory_checks import solvers
from corollary.theory_checks.check import Case, select
from corollary.theory_checks.environment import TabularEnv
from corollary.theory_checks.mdp import ModelError, TabularMDP

FAST = os.environ.get("COROLLARY_FAST") == "1"
EPISODES = 300 if FAST else 3000

# %% [markdown]
# A machine wears out: its condition goes from 0 (new) to 5 (broken). Each day it can be run (it earns less the worse it
# is, and wears), serviced (costs 1, improves by one with probability 0.8) or replaced (costs 12, new the next day).

# %%
n, (RUN, SERVICE, REPLACE) = 6, range(3)
P, r = np.zeros((n, 3, n)), np.zeros((n, 3))
for s in range(n):
    worse, better = min(s + 1, n - 1), max(s - 1, 0)
    P[s, RUN, worse] += 0.3 + 0.08 * s
    P[s, RUN, s] += 0.7 - 0.08 * s
    P[s, SERVICE, better] += 0.8
    P[s, SERVICE, s] += 0.2
    P[s, REPLACE, 0] = 1
    r[s] = 4 - s if s < n - 1 else -2, -1, -12

mdp = TabularMDP.from_arrays(P, r, discount=0.95, start=np.eye(n)[0], name="maintenance")
best = solvers.policy_iteration(mdp)
print("best action by condition:", [("run", "service", "replace")[a] for a in best.action[0]])
print("value of a new machine:  ", round(float(best.value[0, 0]), 4))

# %% [markdown]
# ## 1. One optimum, four solvers

# %%
by_iteration = solvers.value_iteration(mdp, tolerance=1e-9)
by_primal = solvers.primal_linear_program(mdp)
occupancy = solvers.dual_linear_program(mdp)
by_dual = (occupancy * mdp.reward).sum((1, 2)) / (1 - mdp.discount)
gaps = {
    "value iteration": float((by_iteration.value - best.value).abs().max()),
    "primal program": abs(float((mdp.start * (by_primal - best.value)).sum())),
    "dual program": float((by_dual - (mdp.start * best.value).sum(-1)).abs().max()),
}
for name, gap in gaps.items():
    print(f"{name:<16} differs from policy iteration by {gap:.1e}")
assert gaps["value iteration"] < 1e-8
assert max(gaps.values()) < 1e-6

# %% [markdown]
# ## 2. The library's checks on this problem
#
# A check's `measure` and `bound` are functions of a case. Here the case is ours: two policies that a plant might
# compare ("run until it breaks" and "service from condition 3 on"), and the values after some sweeps of value
# iteration.

# %%
until_broken = torch.tensor([[RUN, RUN, RUN, RUN, RUN, REPLACE]])
service_early = torch.tensor([[RUN, RUN, RUN, SERVICE, SERVICE, SERVICE]])
old, new = (torch.nn.functional.one_hot(actions, 3).double() for actions in (until_broken, service_early))

(lemma,) = select("FND-02")
case = Case(mdp.names, mdp=mdp, policy=old, other=new)
left, right = float(lemma.measure(case)), float(lemma.bound(case))
print(f"gain of servicing early: {left:.6f} directly, {right:.6f} by the lemma")
assert abs(left - right) < 1e-10
for mutant in lemma.mutants:
    wrong = float(mutant.bound(case))
    print(f"  {mutant.what}: {wrong:.4f}")
    assert abs(left - wrong) > 1e-3  # the controls: each of these mistakes shows on this problem

# %%
(loss,) = select("FND-05c")
sweeps, measured, claimed = range(1, 60), [], []
value = torch.zeros(1, n, dtype=torch.float64)
for _ in sweeps:
    value = solvers.backup(mdp, value)
    case = Case(mdp.names, mdp=mdp, optimum=best.value, true_q=best.q, value=value)
    measured.append(float(loss.measure(case)))
    claimed.append(float(loss.bound(case)))
assert all(m <= c + 1e-9 for m, c in zip(measured, claimed, strict=True))
optimal_from = next(k for k in sweeps if max(measured[k - 1 :]) < 1e-9)
print(f"greedy is optimal from sweep {optimal_from} on; the bound then still says {claimed[optimal_from - 1]:.1f}")

figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
axes.semilogy(sweeps, claimed, label="claimed")
axes.semilogy(sweeps, np.maximum(measured, 1e-3), "o", markersize=3, label="measured (at least 0.001)")
axes.set(xlabel="sweeps of value iteration", ylabel="loss of the greedy policy")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 3. The same problem as an environment

# %%
env = TabularEnv(mdp, one_hot=False, horizon=300)
returns = []
for episode in range(EPISODES):
    state, _ = env.reset(seed=episode)
    total, factor, over = 0.0, 1.0, False
    while not over:
        state, reward, terminated, truncated, _ = env.step(int(best.action[0, state]))
        total, factor, over = total + factor * reward, factor * 0.95, terminated or truncated
    returns.append(total)
mean, error = np.mean(returns), np.std(returns, ddof=1) / np.sqrt(EPISODES)
print(f"{EPISODES} episodes: {mean:.3f} +- {error:.3f}; computed: {float(best.value[0, 0]):.3f}")
assert abs(mean - float(best.value[0, 0])) < 4 * error

# %% [markdown]
# ## 4. A model that is none is refused

# %%
P[2, SERVICE] *= 0.99
refusal = ""
try:
    TabularMDP.from_arrays(P, r, 0.95, name="maintenance")
except ModelError as error:
    refusal = str(error)
print(refusal)
assert "state 2, action 1" in refusal
