"""FixPO: a whole update against plain PyTorch, the guarantee after every update, what repairs do and leave alone."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from scipy.optimize import brentq
from torch import Tensor
from torch.distributions import kl_divergence

from corollary.core import checkpoint
from corollary.core.errors import GuaranteeError
from corollary.online import FixPO
from corollary.online.on_policy import Samples

from .plain import Plain, Scene, probabilities, tabular

# With this learning rate the primary phase overshoots a bound this small in most epochs.
HASTY = {"n_envs": 4, "n_steps": 32, "batch_size": 32, "n_epochs": 3, "hidden": (8, 6), "fixup_batch_size": 48}
HASTY |= {"learning_rate": 0.02, "learning_rate_decay": "none", "kl_bound": 0.05}


def updates(agent: FixPO, n: int) -> Iterator[tuple[Samples, dict[str, Tensor]]]:
    """Take n iterations one by one; give the samples of each and its metrics."""
    for _ in range(n):
        rollout = agent.collect()
        samples = agent.evaluate_rollout(rollout)
        metrics = agent.improve(samples, rollout)
        agent.iteration += 1
        yield samples, metrics | agent.diagnose(samples)


def largest_divergence(agent: FixPO, samples: Samples, seed: int) -> float:
    """Max KL(old || new) over the batch by torch.distributions."""
    plain = Plain(agent, seed)
    old, new = plain.old_distribution(samples.parameters[seed].double()), plain.distribution(samples.obs[seed].double())
    return float(kl_divergence(old, new).detach().max())


# ---------------------------------------------------------------------------------------- one update, twice


class PlainFixPO(Plain):
    """The update from the paper's equations, in the order of the released code; `wrong` names the mistake."""

    def __init__(self, agent: FixPO, seed: int, wrong: str) -> None:
        super().__init__(agent, seed)
        self.wrong = wrong
        self.beta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        self.beta_optimizer = torch.optim.Adam([self.beta], lr=0.01)
        self.repairs = 0

    def divergence(self, batch: Any) -> Tensor:
        old, new = self.old_distribution(batch.parameters), self.distribution(batch.obs)
        return kl_divergence(new, old) if self.wrong == "divergence reversed" else kl_divergence(old, new)

    def step_beta(self, divergence: Tensor) -> None:
        factor = 1.0 if self.wrong == "no margin" else 3.0
        self.beta_optimizer.zero_grad()
        (self.beta * (0.05 - factor * divergence.detach().max())).backward()
        self.beta_optimizer.step()
        with torch.no_grad():
            self.beta.clamp_(min=0)

    def primary_step(self, batch: Any) -> None:
        divergence = self.divergence(batch)
        policy = -(self.ratio(batch) * batch.advantage).mean() + self.beta.detach() * divergence.mean()
        self.step(policy + 0.1 * self.clipped_value_error(batch, 0.2), 0.5)
        self.step_beta(self.divergence(batch) if self.wrong == "beta sees the new policy" else divergence)

    def repair_step(self, batch: Any) -> bool:
        divergence = self.divergence(batch)
        if not (divergence > 0.05).any():
            return False
        loss = torch.clamp(self.beta.detach(), min=1.0) * divergence.mean()
        if self.wrong == "critic stepped in repairs":  # as zeroed gradients do, by momentum
            loss = loss + 0.0 * self.clipped_value_error(batch, 0.2)
        self.step(loss, 0.5)
        if self.wrong != "beta not stepped in repairs":
            self.step_beta(divergence)
        self.repairs += 1
        return True

    def update(self, samples: Samples) -> None:
        epochs = self.config.n_epochs
        for epoch in range(epochs):
            for batch in self.rows(samples, self.agent.permutation(epoch, len(samples)), 32):
                self.primary_step(batch)
            if self.wrong == "repair after the last epoch only" and epoch < epochs - 1:
                continue
            for attempt in range(50):
                order = self.agent.fixup_permutation(epoch, attempt, len(samples))
                # 128 rows in chunks of 48: the rest of 32 joins the last one.
                chunks = [next(self.rows(samples, part, 80)) for part in order.split([48, 80], dim=1)]
                stepped = [self.repair_step(chunk) for chunk in chunks]
                if not any(stepped):
                    break


def update_difference(env: str, wrong: str = "") -> float:
    agent = FixPO(env, [4, 9], precision="float64", **HASTY)
    rollout = agent.collect()
    samples = agent.evaluate_rollout(rollout)
    plain = [PlainFixPO(agent, seed, wrong) for seed in range(2)]
    metrics = agent.improve(samples, rollout)
    assert (metrics["fixup_steps"] > 0).all()
    for p in plain:
        p.update(samples)
    if not wrong:
        assert metrics["fixup_steps"].tolist() == [p.repairs for p in plain]
    betas = [float((beta - p.beta).detach().abs()) for beta, p in zip(agent.beta, plain, strict=True)]
    return max([p.difference() for p in plain] + betas)


@pytest.mark.rung(1, "online.fixpo")
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_an_update_equals_the_plain_implementation(env) -> None:
    assert update_difference(env) < 1e-10


@pytest.mark.parametrize(
    "wrong",
    [
        "divergence reversed",
        "no margin",
        "beta sees the new policy",
        "critic stepped in repairs",
        "beta not stepped in repairs",
        "repair after the last epoch only",
    ],
)
def test_update_controls(wrong) -> None:
    assert update_difference("CartPole-v1", wrong) > 1e-7


# ------------------------------------------------------------------------------------------- the guarantee


class Unrepaired(FixPO):
    def fix_up(self, samples: Samples, epoch: int) -> None:
        pass


@pytest.mark.rung(6, "online.fixpo")
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_every_state_is_inside_the_trust_region_after_every_update(env) -> None:
    agent = FixPO(env, [4, 9], **HASTY)
    overshot = 0
    for samples, metrics in updates(agent, 10):
        assert (metrics["max_kl_old_new"] <= 0.05).all()
        for seed in range(2):  # float32 against float64, so up to rounding
            assert largest_divergence(agent, samples, seed) <= 0.05 * (1 + 1e-3)
        assert metrics["max_kl_old_new"].tolist() == agent.max_kl(samples).tolist()
        overshot += int((metrics["max_kl_before_fixup"] > 0.05).sum())
    assert overshot > 10  # of 20
    with pytest.raises(GuaranteeError, match=r"KL\(old \|\| new\) <= 0\.05 in every state, but after iteration \d"):
        list(updates(Unrepaired(env, [4, 9], **HASTY), 10))


def test_a_policy_that_is_not_finite_is_named() -> None:
    class Broken(FixPO):
        def after_epoch(self, samples: Samples, *rest: Any) -> list[bool]:
            with torch.no_grad():
                self.actor.net.biases[-1][1] = torch.nan
            return super().after_epoch(samples, *rest)

    with pytest.raises(GuaranteeError, match=r"after iteration 1 its maximum is 0\.\d+ \(seed 4\), nan \(seed 9\)"):
        list(updates(Broken("CartPole-v1", [4, 9], **HASTY), 1))


# --------------------------------------------------------------------------------------------- backtracking


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_without_passes_it_backtracks_no_further_than_needed(env) -> None:
    agent = FixPO(env, [4, 9], max_passes=0, **HASTY | {"n_epochs": 1, "learning_rate": 0.1})
    seen = 0
    for _ in range(6):
        old = agent.optimizer.blocks["actor"].values.clone()
        ((samples, metrics),) = updates(agent, 1)
        assert (metrics["max_kl_old_new"] <= 0.05).all()
        assert (metrics["fixup_steps"] == 0).all()
        backtracked = metrics["backtracks"] > 0
        assert backtracked.tolist() == (metrics["max_kl_before_fixup"] > 0.05).tolist()
        seen += int(backtracked.sum())
        # One step of 0.8 less violates the bound, and all steps less give back what the epoch had reached.
        new = agent.optimizer.blocks["actor"].values
        here = new.clone()
        with torch.no_grad():
            new.copy_(old + (here - old) / 0.8)
            assert (agent.max_kl(samples) > 0.05)[backtracked].all()
            new.copy_(old + (here - old) / 0.8 ** metrics["backtracks"].unsqueeze(1))
            torch.testing.assert_close(agent.max_kl(samples), metrics["max_kl_before_fixup"], rtol=1e-3, atol=1e-5)
            new.copy_(here)
    assert seen >= 4


def test_a_fix_up_without_weight_does_not_end() -> None:
    # The reason for beta_min: where beta has fallen to 0, repairs with the weight beta have no gradient.
    options = HASTY | {"initial_beta": 0.0, "beta_learning_rate": 1e-9, "max_passes": 20, "learning_rate": 0.01}
    counts = {}
    for beta_min in (1.0, 1e-9):
        agent = FixPO("CartPole-v1", [4, 9], beta_min=beta_min, **options)
        counts[beta_min] = sum(float(metrics["backtracks"].sum()) for _, metrics in updates(agent, 3))
    assert counts[1.0] == 0
    assert counts[1e-9] > 0


# --------------------------------------------------------------------------------------------- beta and masks


def test_beta_follows_the_largest_divergence() -> None:
    # Adam's steps under a constant gradient have the length of the learning rate, 0.01, whatever the gradient's.
    agent = FixPO("CartPole-v1", 4, precision="float64", kl_bound=0.75, margin=3.0, initial_beta=0.025)
    largest = torch.tensor([0.0, 0.25, 9.0, 9.0], dtype=torch.float64)  # 0.25 = bound / margin
    seen = []
    for _ in range(5):
        agent.step_beta(largest, [True, True, True, False])
        seen.append(agent.beta.detach().squeeze(1).clone())
    falling, level, rising, inactive = torch.stack(seen, 1)
    close = torch.testing.assert_close
    close(falling, torch.tensor([0.015, 0.005, 0, 0, 0], dtype=torch.float64), rtol=0, atol=1e-7)
    close(rising, torch.tensor([0.035, 0.045, 0.055, 0.065, 0.075], dtype=torch.float64), rtol=0, atol=1e-7)
    assert (level == 0.025).all()
    assert (inactive == 0.025).all()


def test_seeds_that_need_different_repairs_learn_as_if_alone() -> None:
    together = FixPO("CartPole-v1", [4, 9, 7], precision="float64", **HASTY)
    steps = torch.stack([metrics["fixup_steps"] for _, metrics in updates(together, 3)])
    assert len(set(steps.sum(0).tolist())) == 3
    for position, seed in enumerate([4, 9, 7]):
        alone = FixPO("CartPole-v1", [seed], precision="float64", **HASTY)
        assert [float(metrics["fixup_steps"]) for _, metrics in updates(alone, 3)] == steps[:, position].tolist()
        ours, theirs = alone.networks.state_dict(), together.select(position).networks.state_dict()
        for name, tensor in ours.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-9)


def test_stopped_and_continued_is_never_stopped_to_the_bit(tmp_path) -> None:
    through = FixPO("CartPole-v1", [4, 9], **HASTY).learn(4 * 128)
    half = FixPO("CartPole-v1", [4, 9], **HASTY).learn(2 * 128)
    again = FixPO.load(half.save(tmp_path / "half")).learn(2 * 128)
    one, two = (checkpoint.read(each.save(tmp_path / name))[1] for each, name in ((through, "a"), (again, "b")))
    assert {"network/beta", "optimizer/beta/beta/exp_avg", "extra/returns/var"} <= one.keys()
    assert one.keys() == two.keys()
    assert all(torch.equal(torch.nan_to_num(one[name]), torch.nan_to_num(two[name])) for name in one)


# --------------------------------------------------------------------------------- exact operator, return scaling


@pytest.mark.rung(3, "online.fixpo")
def test_one_state_ends_in_the_exact_optimum_of_the_primary_phase() -> None:
    # Minimise -sum_a pi_a A_a + beta sum_a old_a log(old_a / pi_a) under sum_a pi_a = 1: with the multiplier m,
    # -A - beta old / pi + m = 0, so pi = beta old / (m - A), and m makes the sum 1.
    old, q, beta = np.array([1, 2, 4, 1]) / 8, np.array([0.0, 1.0, 2.0, 5.0]), 2.0
    advantage = q - old @ q
    m = brentq(lambda m: (beta * old / (m - advantage)).sum() - 1, advantage.max() + 1e-9, 100, xtol=1e-14)
    agent = FixPO(
        lambda: Scene(1, spaces.Discrete(4)),
        **{"seeds": 1, "precision": "float64", "hidden": (4,), "n_envs": 1, "n_steps": 8, "batch_size": 8},
        **{"n_epochs": 600, "learning_rate": 0.01, "max_grad_norm": None, "kl_bound": 100.0},
        **{"initial_beta": beta, "beta_learning_rate": 1e-12},
    )
    samples = tabular(agent, [1, 2, 4, 1], q.tolist())
    metrics = agent.improve(samples, agent.collect())
    assert float(metrics["fixup_steps"]) == 0
    np.testing.assert_allclose(probabilities(agent)[0], beta * old / (m - advantage), atol=1e-5)


def returns_by_loop(agent: FixPO, rollout: Any, seed: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and targets ``[T, N]`` of one seed in units of the reward; values are the critic's times `scale`."""
    plain = Plain(agent, seed)
    with torch.no_grad():
        value, next_value = (scale * plain.value(obs[seed]).numpy() for obs in (rollout.obs, rollout.next_obs))
    reward, terminated, truncated = (
        each[seed].numpy() for each in (rollout.reward, rollout.terminated, rollout.truncated)
    )
    advantage = np.zeros_like(reward)
    after = np.zeros(reward.shape[1])
    for t in reversed(range(len(reward))):
        error = reward[t] + 0.99 * next_value[t] * ~terminated[t] - value[t]
        after = advantage[t] = error + 0.99 * 0.95 * after * ~(terminated[t] | truncated[t])
    return advantage, advantage + value


def test_the_critic_learns_returns_in_units_of_their_deviation() -> None:
    agent = FixPO("CartPole-v1", [4, 9], precision="float64", **HASTY)
    seen: list[list[np.ndarray]] = [[], []]
    for _ in range(3):
        scales = [np.sqrt(np.var(np.concatenate(each)) + 1e-8) if each else 1.0 for each in seen]
        rollout = agent.collect()
        samples = agent.evaluate_rollout(rollout)
        for seed, scale in enumerate(scales):
            advantage, target = returns_by_loop(agent, rollout, seed, scale)
            # The running variance began with a ten-thousandth of an observation.
            np.testing.assert_allclose(samples.advantage[seed], advantage.ravel(), rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(samples.target[seed], target.ravel() / scale, rtol=1e-4, atol=1e-4)
            seen[seed].append(target.ravel())
        agent.improve(samples, rollout)
        agent.iteration += 1
    assert min(scales) > 1.5  # it mattered
    unscaled = FixPO("CartPole-v1", [4, 9], precision="float64", scale_returns=False, **HASTY)
    samples = unscaled.evaluate_rollout(unscaled.collect())
    torch.testing.assert_close(samples.target, samples.advantage + samples.value)


# ----------------------------------------------------------------------------------------------- learning


@pytest.mark.slow
@pytest.mark.repro
def test_cartpole() -> None:
    agent = FixPO("CartPole-v1", 3, n_envs=8, n_steps=128, batch_size=128)
    repairs, steps = torch.zeros(3), torch.zeros(3)
    total = 200_000 // 1024
    for iteration in range(total):
        metrics = agent.iterate(iteration / total)
        agent.finished_episodes()
        assert (metrics["max_kl_old_new"] <= 0.5).all()
        repairs += metrics["fixup_steps"]
        steps += metrics["fixup_steps"] + metrics["gradient_steps"]
    means = [np.mean(list(returns)[-20:]) for returns in agent.recent_returns]
    assert min(means) >= 400, means
    assert (repairs < 0.1 * steps).all(), repairs / steps
