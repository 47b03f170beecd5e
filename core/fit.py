"""The loop that agents learn from a dataset in: batches, logs, evaluations, checkpoints, progress, interruption."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from .dataset import Dataset
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
from .progress import Progress


def fit(
    agent: OfflineAgent[Any],
    dataset: Dataset,
    n_steps: int,
    *,
    eval_env: EnvSource | None = None,
    eval_every: int | None = None,
    eval_episodes: int = 10,
    log_every: int = 1000,
    run_dir: str | Path | None = None,
    save_every: int | None = None,
    resume: bool = False,
    progress: bool | None = None,
    callbacks: Sequence[Callback] = (),
    command: Mapping[str, Any] | None = None,
) -> None:
    """Take `n_steps` gradient steps for every seed of `agent`.

    Batches are rows drawn with replacement, each seed from its own stream, as a function of the step number alone:
    uniformly, or as the configuration's `sampling` says. Evaluations use other streams, so they never change what is
    learnt.

    Args:
        agent: the agent; training continues from its state.
        dataset: what to learn from.
        n_steps: gradient steps to take now; with ``resume=True`` the total to reach.
        eval_env: where to evaluate (id, factory or environment); ``None`` for no evaluation.
        eval_every: gradient steps between evaluations; ``None`` for one at the end only.
        eval_episodes: episodes per seed and evaluation.
        log_every: gradient steps per log line; metrics are averaged over them and read once.
        run_dir: folder for ``run.json``, ``metrics.jsonl``, ``evaluations.jsonl`` and ``checkpoint/``.
        save_every: gradient steps between checkpoints in `run_dir`, beside the one at the end; ``None`` for one at
            every evaluation, or every 10 000 steps of a run without `eval_env` or `eval_every`.
        resume: continue the run in `run_dir` from its checkpoint, bit for bit, if it has one.
        progress: show a progress bar; ``None`` shows it on a terminal only.
        callbacks: called in order after each log interval and evaluation.
        command: what the caller was asked to do, JSON-able, kept in ``run.json`` so that it can be repeated.

    Raises:
        ConfigError: if a count is no positive whole number, `resume` lacks a `run_dir`, or the run to resume has taken
            more than `n_steps` or is one on other data.
        CheckpointError: if the checkpoint to resume belongs to other settings, or to ``learn``.
        EnvironmentMismatchError: before training, if the spaces of `eval_env` differ from the dataset's.
        CorollaryError: at the log interval in which the last seed has diverged; a seed that does so while others are
            well is told as a :class:`RuntimeWarning`.
        KeyboardInterrupt: after Ctrl-C, once the step in progress is done and the checkpoint written.
    """
    check_counts(
        n_steps=n_steps, log_every=log_every, eval_every=eval_every, save_every=save_every, eval_episodes=eval_episodes
    )
    save_every = checkpoint_interval(save_every, eval_env, eval_every)
    with unchanged_if_refused(agent):
        agent.online_phase = False
        if resume:
            restore(agent, run_dir, n_steps)
        data = agent.prepare(dataset)
        if eval_env is not None:
            check_environment(agent, eval_env)  # now, and not when hours of training end in the first evaluation
        target = n_steps if resume else agent.step + n_steps
        card = _card(agent, dataset, target) | ({} if command is None else {"command": dict(command)})
        writer = open_run(agent, run_dir, resume, card)
    loop = Loop(agent, writer, eval_env, eval_episodes, callbacks)
    with interruption() as interrupted, writer or nullcontext(), Progress(agent, target, progress) as bar:
        while agent.step < target and not loop.stopped:
            metrics = agent.update(data.gather(*agent.sampler.rows(agent.step, agent.config.batch_size)))
            agent.step += 1
            done = agent.step == target
            loop.pending.append(metrics)
            if agent.step % log_every == 0 or done:
                loop.log()
                bar.update(agent.step, loop.headline)
            evaluated = eval_env is not None and (done or (eval_every is not None and agent.step % eval_every == 0))
            if evaluated:
                loop.evaluate()
                bar.update(agent.step, loop.headline)
            stopping = bool(interrupted)  # read once: a later request is met at the next step
            if stopping and loop.pending:
                loop.log()
            saves = evaluated if save_every is None else agent.step % save_every == 0
            if run_dir is not None and (saves or done or stopping or loop.stopped):
                agent.save(Path(run_dir) / CHECKPOINT)
            if stopping:
                raise KeyboardInterrupt


def _card(agent: OfflineAgent[Any], dataset: Dataset, n_steps: int) -> dict[str, Any]:
    return {
        "n_steps": n_steps,
        "env_id": dataset.info.env_id,
        "dataset": agent.dataset_card,
        "effective_sample_size": agent.sampler.effective_sample_size,
    }
