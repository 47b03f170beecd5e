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
# # PROPS: on-policy data with less sampling error
#
# Data sampled with a policy differ from that policy's distribution by chance: an action of probability 1/4 is not
# taken in exactly every fourth visit of its state. PROPS adapts a behaviour policy so that the actions that are too
# frequent in the data so far become less likely, and the data approach the distribution of the *target* policy faster
# than sampling with the target policy itself.
#
# **Claim.** With a fixed target policy in a problem of 10 states and 4 actions, after 2000 steps PROPS' sampling
# error, averaged over 40 seeds, is less than half of that of on-policy sampling. Control: on-policy sampling with
# other seeds agrees with on-policy sampling up to 25%. (Fast mode: 8 seeds, 300 steps, and the claim is a ratio
# below 1.)
#
# **Source.** N. E. Corrado, J. P. Hanna, "On-Policy Policy Gradient Reinforcement Learning Without On-Policy Sampling",
# arXiv 2311.08290: the PROPS objective $\max(r, 1 - \epsilon)$ with a penalty on the divergence from the target
# policy, and the sampling error
# $\max_{\theta'} \mathbb{E}_D \log \pi_{\theta'}(a|s) - \mathbb{E}_D \log \pi_\theta(a|s)$.
#
# **Tolerance.** The threshold 1/2 is far from what is found, about 1/5; 40 seeds make the mean's standard error a few
# percent.

# %%
import os

import gymnasium
import matplotlib.pyplot as plt
import numpy as np
import torch

from corollary.online import PROPS, sampling_error

FAST = os.environ.get("COROLLARY_FAST") == "1"
N_SEEDS = 8 if FAST else 40
STEPS = 300 if FAST else 2000
LIMIT = 1.0 if FAST else 0.5
STATES, ACTIONS = 10, 4

# %% [markdown]
# Random transitions, no rewards, no end: only where the data go matters.


# %%
class Chain(gymnasium.Env):
    """Ten states, four actions; each pair has random probabilities of the next state."""

    observation_space, action_space = gymnasium.spaces.Discrete(STATES), gymnasium.spaces.Discrete(ACTIONS)
    next_state = np.random.default_rng(0).dirichlet(np.full(STATES, 0.3), (STATES, ACTIONS)).cumsum(-1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = int(self.np_random.integers(STATES))
        return self.state, {}

    def step(self, action):
        row = self.next_state[self.state, action]
        self.state = min(int(np.searchsorted(row, self.np_random.random())), STATES - 1)
        return self.state, 0.0, False, False, {}


# %% [markdown]
# Without hidden layers a policy on one-hot states is a table. For a table, the maximum in the sampling error is
# reached by the empirical frequencies, so that the error is exactly
# $\sum_s \hat d(s)\,\mathrm{KL}(\hat\pi(\cdot|s) \,\|\, \pi_\theta(\cdot|s))$, computed from counts. With
# ``behaviour_epochs=0`` the behaviour policy is the target policy: on-policy sampling.


# %%
def sample(seeds, epochs):
    """Sample with a random fixed target policy; return the agent, its states (one-hot) and its actions."""
    agent = PROPS(
        Chain,
        seeds,
        hidden=(),
        normalize_obs=False,
        normalize_reward="none",
        n_steps=STEPS,
        batch_size=STEPS,
        buffer_batches=1,
        behaviour_steps=10,
        behaviour_epochs=epochs,
        behaviour_batch_size=STEPS,  # larger than the data so far: every step sees all of them
        behaviour_learning_rate=0.03,
        behaviour_clip=0.3,
        kl_coef=0.1,
        behaviour_target_kl=0.1,
    )
    with torch.no_grad():
        agent.actor.net.weights[0].copy_(agent.stream("target policy").normal(0, (ACTIONS, STATES)))
        agent.behaviour.load_state_dict(agent.actor.state_dict())
    rollout = agent.collect()
    return agent, rollout.obs[:, :, 0], rollout.action[:, :, 0]


@torch.no_grad()
def error_by_counts(agent, obs, action):
    """Each seed's exact sampling error after every step, ``[seeds, steps]``."""
    visits = torch.einsum("sti,stj->stij", obs.double(), torch.eye(ACTIONS).double()[action[..., 0]])
    counts = visits.cumsum(1)
    empirical = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    every_state = torch.eye(STATES).expand(len(agent.seeds), -1, -1)
    target = agent.actor(every_state).table.double().unsqueeze(1)
    return torch.special.xlogy(counts, empirical / target).sum((2, 3)) / torch.arange(1, STEPS + 1)


on_policy = sample(range(N_SEEDS), epochs=0)
props = sample(range(N_SEEDS), epochs=16)
other_seeds = sample(range(1000, 1000 + N_SEEDS), epochs=0)
curves = {
    "on-policy": error_by_counts(*on_policy),
    "PROPS": error_by_counts(*props),
    "on-policy, other seeds": error_by_counts(*other_seeds),
}

# %% [markdown]
# **What to see.** Both errors fall nearly as straight lines. On-policy sampling tends to the slope of $1/t$, and PROPS
# is steeper: its advantage grows with the data.

# %%
figure, axes = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
time = np.arange(1, STEPS + 1)
for i, (name, error) in enumerate(curves.items()):
    mean, half = error.mean(0), 1.96 * error.std(0) / N_SEEDS**0.5
    axes.plot(time, mean, color=f"C{i}", label=name)
    axes.fill_between(time, mean - half, mean + half, color=f"C{i}", alpha=0.2, linewidth=0)
axes.set(xlabel="steps t", ylabel="sampling error (nats); band: 95% of the mean", xscale="log", yscale="log")
axes.set_xlim(left=20)
axes.legend(frameon=False)
plt.show()

# %%
print(f"{'t':>6}{'on-policy':>12}{'PROPS':>10}{'ratio':>8}")
for t in (100, 300, 500, 1000, 2000):
    if t <= STEPS:
        plain, adapted = (float(curves[name][:, t - 1].mean()) for name in ("on-policy", "PROPS"))
        print(f"{t:6}{plain:12.4f}{adapted:10.4f}{adapted / plain:8.2f}")

# %% [markdown]
# The library measures the same with :func:`corollary.online.sampling_error`, which fits the policy's last layer by
# gradient steps and so applies to any network. On tables it must give what the counts give, up to the fit: 2%.

# %%
agent, obs, action = props
fitted = sampling_error(agent.actor, obs, action, learning_rate=0.05, n_steps=500).mean().item()
counted = curves["PROPS"][:, -1].mean().item()
print(f"PROPS, after {STEPS} steps: {counted:.5f} by counts, {fitted:.5f} by fitting")
assert abs(fitted / counted - 1) < 0.02, "the fitted sampling error is not the exact one"

# %%
final = {name: float(error[:, -1].mean()) for name, error in curves.items()}
ratio = final["PROPS"] / final["on-policy"]
assert ratio < LIMIT, f"PROPS' sampling error is {ratio:.2f} times that of on-policy sampling"
control = final["on-policy, other seeds"] / final["on-policy"]
print(f"PROPS / on-policy: {ratio:.2f}; on-policy with other seeds / on-policy: {control:.2f}")
assert abs(control - 1) < 0.25, "the control: on-policy sampling should not depend on the seeds"
