"""What the loops of learning share: reports to callbacks, logs, evaluations, the card, interruption."""

import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from . import checkpoint
from .agent import Agent, Metrics
from .columns import is_whole
from .errors import ConfigError, marked, tell_divergence
from .evaluation import EnvSource, Evaluation, evaluate
from .runs import CARD, Run, RunWriter, versions

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHECKPOINT = "checkpoint"
SAVE_EVERY = 10_000
"""Steps between the checkpoints of a run that is not evaluated on its way."""


@dataclass(frozen=True)
class Report:
    """What a callback is told at every log interval and after every evaluation.

    Attributes:
        step: steps taken so far: gradient steps on a dataset, environment steps per seed online.
        metrics: mean over the interval of every diagnostic, one value per seed ``[S]``; empty at an evaluation.
        evaluation: the evaluation's result, or ``None`` at a log interval.
    """

    step: int
    metrics: "dict[str, NDArray[np.float64]]"
    evaluation: Evaluation | None


class Callback(Protocol):
    """A function called with the agent and a :class:`Report`; returning True ends training after this step."""

    def __call__(self, agent: Agent[Any], report: Report) -> bool | None:
        """Be told of `report`; return True to stop."""


class Loop:
    """The bookkeeping of one call of `fit` or `learn`: metrics not yet read, what to show, whether to stop.

    Attributes:
        pending: metrics of the updates since the last log interval, not yet read.
        metrics: means of the last log interval, per name ``[S]``; empty before the first.
        steps_per_second: during that interval; one step moves all seeds.
        headline: the latest evaluation in a few words.
        stopped: whether a callback has asked for the end.
    """

    def __init__(
        self,
        agent: Agent[Any],
        writer: RunWriter | None,
        eval_env: EnvSource | None,
        eval_episodes: int,
        callbacks: Sequence[Callback],
    ) -> None:
        self.agent, self.writer, self.eval_env = agent, writer, eval_env
        self.eval_episodes, self.callbacks = eval_episodes, callbacks
        self.pending: list[Metrics] = []
        self.metrics: dict[str, NDArray[np.float64]] = {}
        self.steps_per_second = 0.0
        self.headline = ""
        self.stopped = False
        self._told = np.zeros(len(agent.seeds), bool)  # seeds that have been named as diverged
        self._logged_step = agent.clock
        self._started = self._interval_started = time.perf_counter()

    def log(self, **more: "NDArray[np.float64]") -> None:
        """Average the pending metrics, read them (the only wait for the device), write and report them.

        `more` are diagnostics ``[S]`` of the whole interval, already read.
        """
        self.metrics = mean_metrics(self.pending) | more
        now = time.perf_counter()
        self.steps_per_second = (self.agent.clock - self._logged_step) / max(now - self._interval_started, 1e-9)
        self.pending = []
        self._logged_step = self.agent.clock
        if self.writer is not None:
            lists = {name: values.tolist() for name, values in self.metrics.items()}
            self.writer.log_metrics(self.agent.clock, now - self._started, self.steps_per_second, lists)
        self._look_for_divergence()
        self._report(Report(self.agent.clock, self.metrics, None))
        self._interval_started = time.perf_counter()

    def _look_for_divergence(self) -> None:
        """Name once each seed that has diverged, since the others may be well; raise if none is."""
        lost = self.agent.diverged()
        broken = {name: ~np.isfinite(values) for name, values in self.metrics.items() if name.endswith("loss")}
        for name, seeds in (broken | {"a parameter": lost}).items():
            if not (seeds & ~self._told).any() and not lost.all():
                continue
            self._told |= seeds
            tell_divergence(
                f"{self.agent.algorithm} has diverged: at step {self.agent.clock} {name} is not finite (seed "
                f"{marked(self.agent.seeds, seeds)}). Smaller step sizes or other reward and state transforms may "
                "help.",
                of_all=bool(lost.all()),
                stacklevel=4,
            )

    def evaluate(self) -> None:
        """Evaluate all seeds, write and report the result; the time it takes is not the learning's."""
        assert self.eval_env is not None
        began = time.perf_counter()
        evaluation = evaluate(self.agent, self.eval_env, self.eval_episodes)
        if self.writer is not None:
            self.writer.log_evaluation(self.agent.clock, time.perf_counter() - self._started, evaluation)
        scores = evaluation.mean_score
        shown, unit = (evaluation.mean_return, "return") if scores is None else (scores, "score")
        self.headline = f"{unit} {' '.join(f'{x:.1f}' for x in shown)}"
        self._report(Report(self.agent.clock, {}, evaluation))
        self._interval_started += time.perf_counter() - began

    def _report(self, report: Report) -> None:
        for callback in self.callbacks:
            self.stopped |= bool(callback(self.agent, report))


def mean_metrics(pending: Sequence[Metrics]) -> "dict[str, NDArray[np.float64]]":
    """Average each diagnostic over the updates that reported it; ``[S]`` numbers per name."""
    names = dict.fromkeys(name for metrics in pending for name in metrics)
    means = {n: torch.stack([metrics[n] for metrics in pending if n in metrics]).double().mean(0) for n in names}
    return {name: mean.cpu().numpy() for name, mean in means.items()}


def check_counts(**counts: int | None) -> None:
    """Raise a :class:`ConfigError` for a number of steps or episodes that is not whole, or below 1."""
    for name, value in counts.items():
        if value is not None and not is_whole(value):
            raise ConfigError(f"{name} must be a whole number, as int(1e5) is; got {value!r}.")
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1; got {value}.")


@contextmanager
def unchanged_if_refused(agent: Agent[Any]) -> Iterator[None]:
    """Take back what was changed, should the block raise: nothing of what was refused may stay behind in the agent."""
    before = dict(vars(agent))
    try:
        yield
    except BaseException:
        vars(agent).clear()
        vars(agent).update(before)
        raise


def restore(agent: Agent[Any], run_dir: str | Path | None, n_steps: int) -> None:
    """Take over the checkpoint of the run to bring to `n_steps`; a run killed before its first one starts anew.

    Raises:
        ConfigError: without a `run_dir`; if there is no run to continue and the agent has taken all those steps; or for
            a complete run without its checkpoint.
        CheckpointError: if the checkpoint belongs to other settings.
    """
    if run_dir is None:
        raise ConfigError("resume=True needs the run_dir whose run is to be continued.")
    path, has_card = Path(run_dir) / CHECKPOINT, (Path(run_dir) / CARD).exists()
    has_checkpoint = checkpoint.exists(path)
    if has_checkpoint:
        agent.restore(path)
    elif has_card:
        run = Run.read(run_dir)
        if run.reached >= run.card.get("n_steps", math.inf):
            raise ConfigError(
                f"{run_dir} is complete, and its checkpoint is missing: put it back, or choose another run_dir."
            )
        warnings.warn(
            f"{run_dir} has no checkpoint yet: the run starts anew, from step {agent.clock}, and its logs with it.",
            stacklevel=5,
        )
    if agent.clock >= n_steps and not (has_checkpoint and has_card):
        raise ConfigError(
            f"{run_dir} holds no run to continue, and this agent has taken {agent.clock} steps: with resume=True, "
            f"n_steps={n_steps} is the total to reach. Leave out resume to take {n_steps} more."
        )


def checkpoint_interval(save_every: int | None, eval_env: EnvSource | None, eval_every: int | None) -> int | None:
    """Return the steps between checkpoints; ``None`` for one at every evaluation."""
    evaluated = eval_env is not None and eval_every is not None
    return SAVE_EVERY if save_every is None and not evaluated else save_every


def open_run(agent: Agent[Any], run_dir: str | Path | None, resume: bool, card: Mapping[str, Any]) -> RunWriter | None:
    """Start or continue the run directory; `card` is what ``run.json`` says beyond the agent itself."""
    if run_dir is None:
        return None
    about = {
        **agent.card(),
        **card,
        "versions": versions(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    continued = resume and (Path(run_dir) / CARD).exists()
    return RunWriter(run_dir, about, resume_step=agent.clock if continued else None)


@contextmanager
def interruption() -> Iterator[list[bool]]:
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
