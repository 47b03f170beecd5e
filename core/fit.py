"""The loop that all offline agents learn in: batches, logs, evaluations, checkpoints, progress, interruption."""

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from . import checkpoint
from .agent import Metrics, OfflineAgent
from .dataset import Dataset
from .errors import ConfigError
from .evaluation import EnvSource, Evaluation, check_environment, evaluate
from .progress import Progress
from .runs import CARD, RunWriter, versions

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Report:
    """What a callback is told at every log interval and after every evaluation.

    Attributes:
        step: gradient steps taken so far.
        metrics: mean over the interval of every diagnostic, one value per seed ``[S]``; empty at an evaluation.
        evaluation: the evaluation's result, or ``None`` at a log interval.
    """

    step: int
    metrics: "dict[str, NDArray[np.float64]]"
    evaluation: Evaluation | None


class Callback(Protocol):
    """A function called with the agent and a :class:`Report`; returning True ends training after this step."""

    def __call__(self, agent: OfflineAgent[Any], report: Report) -> bool | None:
        """Be told of `report`; return True to stop."""


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

    Batches are rows drawn uniformly with replacement, each seed from its own stream, as a function of the step number
    alone. Evaluations use other streams, so they never change what is learnt.

    Args:
        agent: the agent; training continues from its state.
        dataset: what to learn from.
        n_steps: gradient steps to take now; with ``resume=True`` the total to reach.
        eval_env: where to evaluate (id, factory or environment); ``None`` for no evaluation.
        eval_every: gradient steps between evaluations; ``None`` for one at the end only.
        eval_episodes: episodes per seed and evaluation.
        log_every: gradient steps per log line; metrics are averaged over them and read once.
        run_dir: folder for ``run.json``, ``metrics.jsonl``, ``evaluations.jsonl`` and ``checkpoint/``.
        save_every: gradient steps between checkpoints in `run_dir`; ``None`` for one at every evaluation and the end.
        resume: continue the run in `run_dir` from its checkpoint, bit for bit, if it has one.
        progress: show a progress bar; ``None`` shows it on a terminal only.
        callbacks: called in order after each log interval and evaluation.
        command: what the caller was asked to do, JSON-able, kept in ``run.json`` so that it can be repeated.

    Raises:
        ConfigError: if a count is not positive, or `resume` lacks a `run_dir`.
        CheckpointError: if the checkpoint to resume belongs to other settings or other data.
        EnvironmentMismatchError: before training, if the spaces of `eval_env` differ from the dataset's.
        KeyboardInterrupt: after Ctrl-C, once the step in progress is done and the checkpoint written.
    """
    for name, value in (
        ("n_steps", n_steps),
        ("log_every", log_every),
        ("eval_every", eval_every),
        ("save_every", save_every),
        ("eval_episodes", eval_episodes),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1; got {value}.")
    if resume and run_dir is None:
        raise ConfigError("resume=True needs the run_dir whose run is to be continued.")
    if resume and run_dir is not None:
        _restore(agent, dataset, Path(run_dir))
    data = agent.prepare(dataset)
    if eval_env is not None:
        check_environment(agent, eval_env)  # now, and not when hours of training end in the first evaluation
    target = n_steps if resume else agent.step + n_steps
    writer = None
    if run_dir is not None:
        continued = resume and (Path(run_dir) / CARD).exists()
        card = _card(agent, dataset, target) | ({} if command is None else {"command": dict(command)})
        writer = RunWriter(run_dir, card, resume_step=agent.step if continued else None)
    loop = _Loop(agent, writer, eval_env, eval_episodes, callbacks)
    sampler = agent.stream("batch")
    size = (agent.config.batch_size,)
    with _interruption() as interrupted, writer or nullcontext(), Progress(agent, target, progress) as bar:
        while agent.step < target and not loop.stopped:
            metrics = agent.update(data.gather(sampler.integers(agent.step, len(data), size)))
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
            saves = evaluated if save_every is None else agent.step % save_every == 0
            if run_dir is not None and (saves or done or interrupted or loop.stopped):
                agent.save(Path(run_dir) / CHECKPOINT)
            if interrupted:
                raise KeyboardInterrupt


class _Loop:
    """The bookkeeping of one call of :func:`fit`: metrics not yet read, what to show, whether to stop."""

    def __init__(
        self,
        agent: OfflineAgent[Any],
        writer: RunWriter | None,
        eval_env: EnvSource | None,
        eval_episodes: int,
        callbacks: Sequence[Callback],
    ) -> None:
        self.agent, self.writer, self.eval_env = agent, writer, eval_env
        self.eval_episodes, self.callbacks = eval_episodes, callbacks
        self.pending: list[Metrics] = []
        self.headline = ""
        self.stopped = False
        self._started = self._interval_started = time.perf_counter()

    def log(self) -> None:
        """Average the pending metrics, read them (the only wait for the device), write and report them."""
        metrics = mean_metrics(self.pending)
        now = time.perf_counter()
        rate = len(self.pending) / max(now - self._interval_started, 1e-9)
        self.pending = []
        if self.writer is not None:
            lists = {name: values.tolist() for name, values in metrics.items()}
            self.writer.log_metrics(self.agent.step, now - self._started, rate, lists)
        self._report(Report(self.agent.step, metrics, None))
        self._interval_started = time.perf_counter()

    def evaluate(self) -> None:
        """Evaluate all seeds, write and report the result; the time it takes is not the updates'."""
        assert self.eval_env is not None
        began = time.perf_counter()
        evaluation = evaluate(self.agent, self.eval_env, self.eval_episodes)
        if self.writer is not None:
            self.writer.log_evaluation(self.agent.step, time.perf_counter() - self._started, evaluation)
        scores = evaluation.mean_score
        shown, unit = (evaluation.mean_return, "return") if scores is None else (scores, "score")
        self.headline = f"{unit} {' '.join(f'{x:.1f}' for x in shown)}"
        self._report(Report(self.agent.step, {}, evaluation))
        self._interval_started += time.perf_counter() - began

    def _report(self, report: Report) -> None:
        for callback in self.callbacks:
            self.stopped |= bool(callback(self.agent, report))


def mean_metrics(pending: Sequence[Metrics]) -> "dict[str, NDArray[np.float64]]":
    """Average each diagnostic over the updates that reported it; ``[S]`` numbers per name."""
    names = dict.fromkeys(name for metrics in pending for name in metrics)
    means = {n: torch.stack([metrics[n] for metrics in pending if n in metrics]).double().mean(0) for n in names}
    return {name: mean.cpu().numpy() for name, mean in means.items()}


def _restore(agent: OfflineAgent[Any], dataset: Dataset, run_dir: Path) -> None:
    """Take over the run's checkpoint; a run killed before its first one starts anew."""
    path = run_dir / CHECKPOINT
    if not checkpoint.exists(path):
        return
    agent.restore(path)


def _card(agent: OfflineAgent[Any], dataset: Dataset, n_steps: int) -> dict[str, Any]:
    state = agent.description()
    return {
        "algorithm": agent.algorithm,
        "preset": agent.preset,
        "config": state["config"],
        "seeds": list(agent.seeds),
        "precision": agent.precision,
        "device": str(agent.device),
        "n_steps": n_steps,
        "env_id": dataset.info.env_id,
        "dataset": {
            "name": dataset.info.name,
            "fingerprint": dataset.fingerprint,
            "rows": len(dataset),
            "env_id": dataset.info.env_id,
            "ref_min_score": dataset.info.ref_min_score,
            "ref_max_score": dataset.info.ref_max_score,
        },
        "transforms": {"reward": state["reward_transform"], "state": state["state_transform"]},
        "versions": versions(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@contextmanager
def _interruption() -> Iterator[list[bool]]:
    """Turn the first Ctrl-C into a flag (an empty list becoming non-empty); a second one interrupts at once."""
    flag: list[bool] = []
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def handler(signum: int, frame: object) -> None:
        if flag:
            raise KeyboardInterrupt
        flag.append(True)

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)
