"""The loop that agents learn from an environment in: logs, evaluations, checkpoints, progress, interruption."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ConfigError
from .evaluation import EnvSource, check_environment
from .loop import (
    CHECKPOINT,
    Callback,
    Loop,
    check_counts,
    checkpoint_interval,
    interruption,
    open_run,
    restore,
    unchanged_if_refused,
)
from .offline_agent import OfflineAgent
from .online_agent import OnlineAgent
from .progress import Progress
from .runs import CARD, read_card


def learn(
    agent: OnlineAgent[Any] | OfflineAgent[Any],
    n_steps: int,
    entering: AbstractContextManager[None],
    *,
    eval_env: EnvSource | None = None,
    eval_every: int | None = None,
    eval_episodes: int = 10,
    log_every: int = 10_000,
    run_dir: str | Path | None = None,
    save_every: int | None = None,
    resume: bool = False,
    progress: bool | None = None,
    callbacks: Sequence[Callback] = (),
    command: Mapping[str, Any] | None = None,
) -> None:
    """Take `n_steps` environment steps with every seed of `agent`, learning from them.

    Experience comes in whole iterations (for PPO a rollout of ``n_envs * n_steps`` steps), so training ends with the
    first iteration that reaches the number asked for. Schedules, such as a learning rate that falls to zero, span
    the steps of this call; a resumed run continues the schedule of the run it resumes. Evaluations use other
    environments and streams, so they never change what is learnt. Agents call :func:`check_arguments` before this.

    Args:
        agent: the agent; training continues from its state.
        n_steps: environment steps per seed to take now; with ``resume=True`` the total to reach.
        entering: within it the agent is in the environments to learn from; left by an error, it closes them again.
        eval_env: where to evaluate (id, factory or environment); ``None`` for no evaluation.
        eval_every: steps between evaluations; ``None`` for one at the end only.
        eval_episodes: episodes per seed and evaluation.
        log_every: steps per log line; metrics are averaged over the iterations in between and read once.
        run_dir: folder for ``run.json``, ``metrics.jsonl``, ``episodes.jsonl``, ``evaluations.jsonl`` and
            ``checkpoint/``.
        save_every: steps between checkpoints in `run_dir`, beside the one at the end; ``None`` for one at every
            evaluation, or every 10 000 steps of a run without `eval_env` or `eval_every`.
        resume: continue the run in `run_dir` from its checkpoint, if it has one; bit for bit where the environments
            can be restored (see :mod:`corollary.core.environments`).
        progress: show a progress bar; ``None`` shows it on a terminal only.
        callbacks: called in order after each log interval and evaluation.
        command: what the caller was asked to do, JSON-able, kept in ``run.json`` so that it can be repeated.

    Raises:
        ConfigError: if `resume` lacks a `run_dir`, or the run to resume has taken more than `n_steps` or is one on
            other data.
        CheckpointError: if the checkpoint to resume belongs to other settings, or to ``fit``.
        CorollaryError: if an environment raises or gives a number that is not finite, or every seed has diverged; the
            last checkpoint stays. One seed that diverges is told as a :class:`RuntimeWarning` and acts with zeros.
        KeyboardInterrupt: after Ctrl-C, once the iteration in progress is done and the checkpoint written.
    """
    save_every = checkpoint_interval(save_every, eval_env, eval_every)
    with unchanged_if_refused(agent), entering:
        if eval_env is not None and agent.environments.holds(eval_env):
            raise ConfigError("eval_env is the environment to learn from, whose episodes go on: give another one.")
        started = agent.clock
        if resume:
            restore(agent, run_dir, n_steps)
            started = _began_at(run_dir, started)
        target = n_steps if resume else started + n_steps
        if target < agent.warm_up:
            warnings.warn(
                f"{agent.algorithm} ends at step {target}, before the first gradient step: learning_starts is "
                f"{agent.warm_up}.",
                stacklevel=4,
            )
        card = _card(agent, target) | ({} if command is None else {"command": dict(command)})
        writer = open_run(agent, run_dir, resume, card)
    loop = Loop(agent, writer, eval_env, eval_episodes, callbacks)
    returns: list[list[float]] = [[] for _ in agent.seeds]
    lengths: list[list[float]] = [[] for _ in agent.seeds]
    learning = ""
    with interruption() as interrupted, writer or nullcontext(), Progress(agent, target, progress) as bar:
        while agent.clock < target and not loop.stopped:
            before = agent.clock
            loop.pending.append(agent.iterate((agent.clock - started) / (target - started)))
            episodes = agent.finished_episodes()
            for seed_index, episode_return, length in episodes:
                returns[seed_index].append(episode_return)
                lengths[seed_index].append(length)
            if writer is not None:
                writer.log_episodes(agent.clock, episodes)
            done = agent.clock >= target

            def due(every: int | None, before: int = before) -> bool:
                return every is not None and agent.clock // every > before // every

            if due(log_every) or done:
                _log(loop, returns, lengths)
                learning = _headline(agent, loop)
            evaluated = eval_env is not None and (done or due(eval_every))
            if evaluated:
                loop.evaluate()
            bar.update(min(agent.clock, target), learning + (f"  evaluated {loop.headline}" if loop.headline else ""))
            stopping = bool(interrupted)  # read once: a later request is met after the next iteration
            if stopping and loop.pending:
                _log(loop, returns, lengths)
            saves = evaluated if save_every is None else due(save_every)
            if run_dir is not None and (saves or done or stopping or loop.stopped):
                agent.save(Path(run_dir) / CHECKPOINT)
            if stopping:
                raise KeyboardInterrupt


def _began_at(run_dir: str | Path | None, clock: int) -> int:
    """Return the environment step at which the run to resume began; `clock` if there is none."""
    if run_dir is None or not (Path(run_dir) / CARD).exists():
        return clock
    began: int = (read_card(Path(run_dir)).get("began_at") or {}).get("environment_steps", 0)
    return began


def _card(agent: OnlineAgent[Any] | OfflineAgent[Any], n_steps: int) -> dict[str, Any]:
    card: dict[str, Any] = {"n_steps": n_steps, "env_id": agent.environments.env_id}
    if isinstance(agent, OfflineAgent):
        card["began_at"] = {"gradient_steps": agent.step, "environment_steps": agent.clock}
    elif agent.clock:
        card["began_at"] = {"environment_steps": agent.clock}
    if isinstance(agent, OfflineAgent) and agent.dataset_card is not None:
        card["dataset"] = agent.dataset_card
    return card


def check_arguments(
    agent: OnlineAgent[Any] | OfflineAgent[Any],
    n_steps: int,
    eval_env: EnvSource | None,
    eval_every: int | None,
    eval_episodes: int,
    log_every: int,
    save_every: int | None,
) -> None:
    """Raise what is wrong with these arguments of :func:`learn`, before a caller changes anything for it.

    Raises:
        ConfigError: if a count is not positive.
        EnvironmentMismatchError: if the spaces of `eval_env` differ from those the agent was made for.
    """
    check_counts(
        n_steps=n_steps, log_every=log_every, eval_every=eval_every, save_every=save_every, eval_episodes=eval_episodes
    )
    if eval_env is not None:
        check_environment(agent, eval_env)  # now, and not when hours of training end in the first evaluation


def _log(loop: Loop, returns: list[list[float]], lengths: list[list[float]]) -> None:
    """Log with the means of these episodes and forget them, once every seed has some: every number shall be one."""
    if not all(returns):
        loop.log()
        return
    loop.log(episode_return=_means(returns), episode_length=_means(lengths))
    for each in returns + lengths:
        each.clear()


def _means(values: Sequence[Sequence[float]]) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Mean of each seed's values, nan where there is none."""
    return np.array([np.mean(each) if each else np.nan for each in values])


def _headline(agent: OnlineAgent[Any] | OfflineAgent[Any], loop: Loop) -> str:
    """Recent training returns of each seed, the seeds' mean KL per update (where measured), steps per second."""
    means = _means([list(recent) for recent in agent.recent_returns])
    parts = [f"return {' '.join(f'{mean:.1f}' for mean in means)}"]
    if "kl_old_new" in loop.metrics:
        parts.append(f"KL {loop.metrics['kl_old_new'].mean():.2g}")
    parts.append(f"SPS {loop.steps_per_second:.0f}")
    return "  ".join(parts)
