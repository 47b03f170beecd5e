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
# # Which bounds are tight?
#
# The library's theory checks try published inequalities on problems that can be solved exactly. Each reports the
# ratio measured / bound at the tightest problem it knows. A ratio near 1 means that the bound is attained and that an
# error of a per cent in its constant would be noticed; a ratio of 0.05 means that the constant could be twenty times
# too small and nobody would notice.
#
# **Claim.**
#
# 1. Every inequality holds, and every mutant (the same check with one thing wrong) is caught.
# 2. Random problems say little about a bound: for TRPO's lower bound (PO-01a) the tightest of them stays below a half
#    of what a problem built for the purpose reaches, and that one is above 0.99.
#
# **Sources.** Each check names its own; `corollary check --html FILE` shows them all. TRPO: J. Schulman et al., ICML
# 2015, Theorem 1.
#
# **Tolerance.** Rounding (256 machine epsilons times the condition of the linear systems); none in 2.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np

from corollary.theory_checks.check import select
from corollary.theory_checks.run import run_checks

FAST = os.environ.get("COROLLARY_FAST") == "1"
chosen = select("PO-01", "FND-05") if FAST else select()
checks = [check for check in chosen if check.kind == "inequality"]
results = run_checks(checks, adversary=not FAST)
print(f"{len(results)} inequalities, {sum(len(r.points) for r in results)} problems")

# %% [markdown]
# ## 1. All hold, all mutants are caught

# %%
for result in results:
    if not result.passed:
        print(result.check.id, result.verdict, result.note)
caught = sum(killed.caught for result in results for killed in result.mutants)
mutants = sum(len(result.mutants) for result in results)
print(f"{sum(r.passed for r in results)} of {len(results)} pass; {caught} of {mutants} mutants caught")
assert all(result.passed for result in results)
assert caught == mutants > 0

# %% [markdown]
# ## 2. How tight
#
# For each inequality the tightest random problem, and the tightest one that was built for it or found by search.


# %%
def tightest(result, origins):
    ratios = [p.ratio for p in result.points if p.origin in origins and np.isfinite(p.ratio)]
    return max(ratios, default=np.nan)


rows = [(r.check.id, tightest(r, ("random",)), tightest(r, ("extremal", "adversary"))) for r in results]
rows = sorted((row for row in rows if np.isfinite(row[1:]).any()), key=lambda row: np.nanmax(row[1:]))

figure, axes = plt.subplots(figsize=(6.4, 0.8 + 0.17 * len(rows)), layout="constrained")
for y, (_, random, built) in enumerate(rows):
    axes.plot([random, built], [y, y], color="#cccccc", zorder=1)
axes.scatter([row[1] for row in rows], range(len(rows)), s=14, color="#0072b2", label="random problems", zorder=2)
axes.scatter([row[2] for row in rows], range(len(rows)), s=18, color="#d55e00", marker="D", label="built or found")
axes.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=6)
axes.set(xlabel="measured / bound at the tightest problem", xlim=(0, 1.03))
axes.legend(frameon=False, loc="lower right")
plt.show()

attained = sum(np.nanmax(row[1:]) > 0.99 for row in rows)
print(f"{attained} of {len(rows)} bounds are attained within 1 %")

# %%
by_id = {row[0]: row for row in rows}
_, random, built = by_id["PO-01a"]
print(f"TRPO's bound: {random:.3f} on random problems, {built:.4f} on one that was built for it")
assert built > 0.99
assert random < 0.5 * built
