"""The run directory: plain files that say everything about a training run, and their writer and reader.

======================  ================================================================================
``run.json``            the card: algorithm, config, seeds, dataset, transforms, versions, command, ...
``metrics.jsonl``       one line per log interval: ``{"step", "seconds", "steps_per_second", "metrics"}``;
                        each metric holds one value per seed
``evaluations.jsonl``   one line per evaluation: ``{"step", "seconds", "env_id", "episode_seeds", "returns",
                        "lengths", "scores"}``; every episode of every seed, ``[S, E]``; scores may be null
``episodes.jsonl``      one line per training episode of an online run: ``{"step", "seed", "return", "length"}``, raw
                        rewards, with the policy as it explored; absent offline
``tensorboard/``        a mirror of the first two logs when TensorBoard is installed, one sub-folder per seed; never
                        read
``checkpoint/``         the state, written by the agent
======================  ================================================================================

All of it is strict JSON: a number that is not finite is the string ``"NaN"``, ``"Infinity"`` or
``"-Infinity"``. A line is written with one call and flushed, so a killed run loses at most its unfinished
last line, which readers ignore and a resumed run removes.

A **run directory** holds S seeds trained in one process; each seed is one **training run**, the unit that
statistics count. Axes: ``S`` seeds, ``E`` episodes, ``L`` log lines, ``V`` evaluations, ``R`` training runs.
"""

import importlib.metadata
import json
import math
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType, TracebackType
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from .errors import ConfigError, DataError
from .evaluation import Evaluation
from .files import replacing

FloatArray: TypeAlias = npt.NDArray[np.float64]
Card: TypeAlias = Mapping[str, Any]

CARD, METRICS, EVALUATIONS, EPISODES = "run.json", "metrics.jsonl", "evaluations.jsonl", "episodes.jsonl"
_REQUIRED = ("algorithm", "config", "seeds")
_KINDS: dict[str, type | tuple[type, ...]] = {
    "algorithm": str,
    "config": dict,
    "seeds": list,
    "dataset": (dict, NoneType),
    "base": (dict, NoneType),
    "versions": (dict, NoneType),
    "resumed": (list, NoneType),
}
# A resumed run must be the same run: these parts of the card may not differ from those on disk.
_IDENTITY = (
    "algorithm",
    "config",
    "seeds",
    "precision",
    "dataset.fingerprint",
    "env_id",
    "base.fingerprint",
    "fine_tuning",
)


def versions() -> dict[str, str]:
    """What a measured number depends on: versions of the software, and the processors by model name.

    Nothing in it names the machine or its user.
    """
    found = {"python": platform.python_version()}
    for package in ("corollary", "torch", "numpy", "scipy", "gymnasium", "mujoco"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["system"] = f"{platform.system()} {platform.machine()}"
    found["cpu"] = _cpu_name()
    found["threads"] = str(torch.get_num_threads())
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# --- Writing.


class RunWriter:
    """Writes a run directory, line by line, as training goes on; a context manager.

    Args:
        run_dir: The folder; made if missing.
        card: What `run.json` says; JSON data with at least ``algorithm``, ``config`` and ``seeds``.
        resume_step: None starts a new run. A step continues the run in `run_dir` from its state at that step:
            lines beyond it, and an unfinished last line, are removed, so that the continued files equal those
            of a run that never stopped (but for a metrics line that an interruption wrote in the middle of its
            interval, which is then two), and seconds are counted on. The card on disk is kept, but for
            ``n_steps``; when and with which versions the run was resumed is added to its list ``resumed``.

    Raises:
        ConfigError: `run_dir` holds a run and `resume_step` is None; or the card differs from the one on
            disk, or asks for fewer steps than were taken.
        DataError: `card` lacks an entry or is no JSON data; a file of the run to resume is missing or
            damaged.
    """

    def __init__(self, run_dir: str | Path, card: Card, resume_step: int | None = None) -> None:
        self.path = Path(run_dir)
        card = _plain_card(card)
        self._seeds: list[int] = card["seeds"]
        self._seconds_before = 0.0
        if resume_step is None:
            self._start(card)
        else:
            self._resume(card, resume_step)
        self._metrics = (self.path / METRICS).open("a", encoding="utf-8", newline="\n")
        self._evaluations = (self.path / EVALUATIONS).open("a", encoding="utf-8", newline="\n")
        self._episodes: Any = None
        self._mirrors = _tensorboard_writers(self.path, self._seeds, resume_step)

    def _start(self, card: dict[str, Any]) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file: choose a folder as run directory.")
        if any((self.path / name).exists() for name in (CARD, METRICS, EVALUATIONS, EPISODES)):
            raise ConfigError(
                f"{self.path} already holds a run: continue it by resuming, or choose another run directory."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        _write_atomically(self.path / CARD, strict_json(card, indent=2) + "\n")

    def _resume(self, card: dict[str, Any], step: int) -> None:
        old = read_card(self.path)
        for key in _IDENTITY:
            was, now = _entry(old, key), _entry(card, key)
            if was != now:
                raise ConfigError(
                    f"{self.path} is another run: its {_first_difference(key, was, now)}. Resume with the "
                    "settings it was started with, or choose another run directory."
                )
        planned, asked = old.get("n_steps"), card.get("n_steps")
        if planned is not None and asked is not None and asked < min(step, planned):
            raise ConfigError(
                f"{self.path} has taken {step} of {planned} steps: resumed, it cannot end at {asked}. n_steps is the "
                "total to reach."
            )
        if planned is not None and asked == planned <= step:  # it is complete, and stays as it is
            return
        resumed = {key: card[key] for key in ("created", "command", "versions") if key in card}
        old |= {key: card[key] for key in ("n_steps",) if key in card}
        old["resumed"] = [*old.get("resumed", ()), {"step": step, **resumed}]
        for name in (METRICS, EVALUATIONS, EPISODES):
            if name == EPISODES and not (self.path / name).exists():
                continue
            kept = [line for line in _read_lines(self.path / name) if line["step"] <= step]
            _write_atomically(self.path / name, "".join(strict_json(line) + "\n" for line in kept))
            self._seconds_before = max([self._seconds_before, *(line.get("seconds", 0.0) for line in kept)])
        _write_atomically(self.path / CARD, strict_json(old, indent=2) + "\n")

    def log_metrics(
        self, step: int, seconds: float, steps_per_second: float, metrics: Mapping[str, npt.ArrayLike]
    ) -> None:
        """Append one line to `metrics.jsonl`.

        Args:
            step: Steps taken so far: gradient steps offline, environment steps per seed online.
            seconds: Wall-clock seconds since this process started or resumed training.
            steps_per_second: Steps per second since the last line; one step moves all S seeds.
            metrics: Per name one value per seed, ``[S]``, or one number that all seeds share.

        Raises:
            DataError: A metric of another shape.
        """
        n_seeds = len(self._seeds)
        values = {name: np.asarray(value, dtype=np.float64) for name, value in metrics.items()}
        for name, value in values.items():
            if value.shape not in ((), (n_seeds,)):
                raise DataError(
                    f"Metric {name!r} has shape {value.shape}: give one number, or one per seed ({n_seeds})."
                )
        values = {name: np.broadcast_to(value, n_seeds) for name, value in values.items()}
        line = {
            "step": int(step),
            "seconds": self._seconds_before + float(seconds),
            "steps_per_second": float(steps_per_second),
        }
        self._append(self._metrics, line | {"metrics": {name: value.tolist() for name, value in values.items()}})
        self._mirror(step, values)

    def log_evaluation(self, step: int, seconds: float, evaluation: Evaluation) -> None:
        """Append one line to `evaluations.jsonl`: every episode of every seed, never only an average.

        Args:
            step: Steps taken so far: gradient steps offline, environment steps per seed online.
            seconds: Wall-clock seconds since this process started or resumed training.
            evaluation: Returns, lengths and, where references exist, normalised scores, each ``[S, E]``.

        Raises:
            DataError: An array of another shape.
        """
        expected = (len(self._seeds), len(evaluation.episode_seeds))
        arrays = {
            "returns": evaluation.returns_SE,
            "lengths": evaluation.lengths_SE,
            "scores": evaluation.scores_SE,
        }
        for name, array in arrays.items():
            if array is not None and array.shape != expected:
                raise DataError(
                    f"The evaluation's {name} have shape {array.shape}, not (seeds, episodes) = {expected}."
                )
        line = {
            "step": int(step),
            "seconds": self._seconds_before + float(seconds),
            "env_id": evaluation.env_id,
            "episode_seeds": [int(seed) for seed in evaluation.episode_seeds],
        }
        self._append(self._evaluations, line | {k: None if v is None else v.tolist() for k, v in arrays.items()})
        means = {"evaluation/return": evaluation.mean_return, "evaluation/score": evaluation.mean_score}
        self._mirror(step, {name: values for name, values in means.items() if values is not None})

    def log_episodes(self, step: int, episodes: Iterable[tuple[int, float, int]]) -> None:
        """Append one line to `episodes.jsonl` for each training episode that ended.

        Args:
            step: Environment steps per seed taken so far.
            episodes: Index of the seed, undiscounted return and length of each.
        """
        for seed_index, episode_return, length in episodes:
            if self._episodes is None:
                self._episodes = (self.path / EPISODES).open("a", encoding="utf-8", newline="\n")
            line = {"step": int(step), "seed": self._seeds[seed_index]}
            self._episodes.write(strict_json(line | {"return": float(episode_return), "length": int(length)}) + "\n")
        if self._episodes is not None:
            self._episodes.flush()

    @staticmethod
    def _append(file: Any, line: Mapping[str, Any]) -> None:
        file.write(strict_json(line) + "\n")
        file.flush()

    def _mirror(self, step: int, values_S: Mapping[str, FloatArray]) -> None:
        for index, writer in enumerate(self._mirrors):
            for name, values in values_S.items():
                writer.add_scalar(name, float(values[index]), step)

    def close(self) -> None:
        """Close the files. Calling it again does nothing."""
        self._metrics.close()
        self._evaluations.close()
        if self._episodes is not None:
            self._episodes.close()
        for writer in self._mirrors:
            writer.close()

    def __enter__(self) -> Self:
        """Return the writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the files; what was written stays."""
        self.close()


def _tensorboard_writers(path: Path, seeds: Sequence[int], resume_step: int | None) -> list[Any]:
    """One TensorBoard writer per seed, so that seeds share a chart; none where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return []
    purge = None if resume_step is None else resume_step + 1
    folder = path / "tensorboard"
    return [SummaryWriter(str(folder / f"seed_{s}"), purge_step=purge) for s in seeds]


def _plain_card(card: Card) -> dict[str, Any]:
    """The card as JSON will give it back: tuples become lists, keys strings."""
    missing = [key for key in _REQUIRED if key not in card]
    if missing:
        raise DataError(f"The run card lacks {', '.join(missing)}: a run cannot be told from others without.")
    try:
        plain: dict[str, Any] = json.loads(strict_json(card))
    except TypeError as error:
        raise DataError(f"The run card must be plain JSON data: {error}.") from error
    return plain


def _entry(card: Card, dotted: str) -> Any:
    value: Any = card
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _first_difference(name: str, was: Any, now: Any) -> str:
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for key in [*was, *now]:
            if was.get(key) != now.get(key):
                return _first_difference(f"{name}.{key}", was.get(key), now.get(key))
        (key, *_) = was.keys() ^ now.keys()  # its value is None where it is there
        return f"{name} {'has' if key in was else 'lacks'} {key}, as that of another version"
    return f"{name} is {was!r}, not {now!r}"


def strict_json(value: Any, indent: int | None = None) -> str:
    """`value` as JSON; a float that JSON cannot hold is the string ``"NaN"``, ``"Infinity"`` or ``"-Infinity"``."""
    return json.dumps(_strict(value), allow_nan=False, ensure_ascii=False, indent=indent)


def _strict(value: Any) -> Any:
    """`value` with floats that JSON cannot hold as the strings that `float` reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    return value


def _write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`, so that a kill leaves the old file or the new one."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="\n")


# --- Reading.


@dataclass(frozen=True)
class EvaluationRecord:
    """One line of `evaluations.jsonl`: the step, the seconds of training, and what came out."""

    step: int
    seconds: float
    evaluation: Evaluation


@dataclass(frozen=True, eq=False)
class Run:
    """A run directory as read from disk, finished or not.

    Attributes:
        path: The folder, as it was given.
        card: The content of `run.json`.
        steps_L: Step of each line of `metrics.jsonl`.
        seconds_L: Seconds of training at each line.
        steps_per_second_L: Steps per second before each line.
        metrics: Per name ``[L, S]``; nan on lines without that metric.
        logged: Per name ``[L]``, which lines have that metric; elsewhere nan is what was written.
        evaluations: The V evaluations in order.
    """

    path: Path
    card: Card
    steps_L: npt.NDArray[np.int64]
    seconds_L: FloatArray
    steps_per_second_L: FloatArray
    metrics: Mapping[str, FloatArray]
    logged: Mapping[str, npt.NDArray[np.bool_]]
    evaluations: tuple[EvaluationRecord, ...]

    @classmethod
    def read(cls, run_dir: str | Path) -> Self:
        """Read a run directory. An unfinished last line, of a run still going on or killed, is ignored.

        Raises:
            DataError: `run.json` is missing or damaged, or a line of another file is damaged.
        """
        path = Path(run_dir)
        card = read_card(path)
        n_seeds = len(card["seeds"])
        lines = list(_read_lines(path / METRICS))
        metrics: dict[str, FloatArray] = {}
        seconds_L, rates_L = np.empty(len(lines)), np.empty(len(lines))
        for row, line in enumerate(lines):
            with _naming_line(path / METRICS, row + 1):
                seconds_L[row], rates_L[row] = float(line["seconds"]), float(line["steps_per_second"])
                for name, values in line["metrics"].items():
                    if name not in metrics:
                        metrics[name] = np.full((len(lines), n_seeds), np.nan)
                    metrics[name][row] = np.asarray(values, dtype=np.float64)
        logged = {name: np.array([name in line["metrics"] for line in lines]) for name in metrics}
        evaluations = []
        for row, line in enumerate(_read_lines(path / EVALUATIONS)):
            with _naming_line(path / EVALUATIONS, row + 1):
                evaluations.append(_evaluation_record(line, n_seeds))
        steps_L = np.array([line["step"] for line in lines], dtype=np.int64)
        return cls(path, card, steps_L, seconds_L, rates_L, metrics, logged, tuple(evaluations))

    @property
    def algorithm(self) -> str:
        """Name of the algorithm."""
        return str(self.card["algorithm"])

    @property
    def seeds(self) -> tuple[int, ...]:
        """The S seeds."""
        return tuple(self.card["seeds"])

    @property
    def env_id(self) -> str | None:
        """The environment of the evaluations; without any, the card's."""
        if self.evaluations:
            return self.evaluations[-1].evaluation.env_id
        env_id = self.card.get("env_id") or _entry(self.card, "dataset.env_id")
        return None if env_id is None else str(env_id)

    @property
    def dataset(self) -> str | None:
        """Name of the dataset, None for a run that learnt from an environment."""
        name = _entry(self.card, "dataset.name")
        return None if name is None else str(name)

    @property
    def score_name(self) -> str:
        """What `curve` and the scores are: ``"normalised score"``; ``"return"`` if an evaluation has none."""
        if not self.evaluations:
            return "normalised score" if _entry(self.card, "dataset.ref_max_score") is not None else "return"
        return "return" if any(e.evaluation.scores_SE is None for e in self.evaluations) else "normalised score"

    @property
    def last_step(self) -> int:
        """Step of the last evaluation or, without any, of the last line of metrics; 0 for an empty run."""
        if self.evaluations:
            return self.evaluations[-1].step
        return int(self.steps_L[-1]) if self.steps_L.size else 0

    @property
    def reached(self) -> int:
        """The last step that was logged or evaluated; 0 for an empty run."""
        return max(self.last_step, int(self.steps_L[-1]) if self.steps_L.size else 0)

    @cached_property
    def _curve(self) -> tuple[npt.NDArray[np.int64], FloatArray]:
        if not self.evaluations:
            raise DataError(f"{self.path} has no evaluations: train with an evaluation environment.")
        normalised = self.score_name == "normalised score"
        evaluations = [record.evaluation for record in self.evaluations]
        values_VS = np.array([e.mean_score if normalised else e.mean_return for e in evaluations], np.float64)
        return np.array([record.step for record in self.evaluations], dtype=np.int64), values_VS

    def curve(self) -> tuple[npt.NDArray[np.int64], FloatArray]:
        """Steps ``[V]`` and the mean over episodes per evaluation and seed, ``[V, S]``, a `score_name`.

        Raises:
            DataError: The run has no evaluations.
        """
        steps_V, values_VS = self._curve
        return steps_V.copy(), values_VS.copy()

    def last_scores(self) -> FloatArray:
        """Each seed's mean over the episodes of the last evaluation, ``[S]``: the score to report."""
        last: FloatArray = self.curve()[1][-1]
        return last

    def best_scores(self) -> FloatArray:
        """Each seed's greatest mean over the episodes of any evaluation, ``[S]``.

        Selected on the episodes that measure it, hence biased upwards; nan if all evaluations of a seed are.
        """
        values_VS = self.curve()[1]
        best: FloatArray = np.fmax.reduce(values_VS, axis=0)
        return best


def _evaluation_record(line: Mapping[str, Any], n_seeds: int) -> EvaluationRecord:
    shape = (n_seeds, len(line["episode_seeds"]))
    evaluation = Evaluation(
        env_id=str(line["env_id"]),
        returns_SE=np.asarray(line["returns"], dtype=np.float64).reshape(shape),
        lengths_SE=np.asarray(line["lengths"], dtype=np.int64).reshape(shape),
        episode_seeds=tuple(line["episode_seeds"]),
        scores_SE=None if line["scores"] is None else np.asarray(line["scores"], dtype=np.float64).reshape(shape),
    )
    return EvaluationRecord(int(line["step"]), float(line["seconds"]), evaluation)


@contextmanager
def _naming_line(file: Path, number: int) -> Iterator[None]:
    """Turn what goes wrong while a line is understood into an error that names the line."""
    try:
        yield
    except KeyError as error:
        raise DataError(f"{file} line {number} has no entry {error}: remove the line, or the run.") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{file} line {number} is damaged ({error}): remove the line, or the run.") from error


def read_card(path: Path) -> dict[str, Any]:
    """Return the content of a run directory's ``run.json``; raises a :class:`DataError` if it is missing or damaged."""
    file = path / CARD
    if not file.is_file():
        raise DataError(f"{path} is no run directory, it has no {CARD}: give a folder that training wrote.")
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
        missing = [key for key in _REQUIRED if key not in card]
    except (ValueError, TypeError) as error:
        raise DataError(f"{file} is damaged ({error}): restore it, or train the run anew.") from error
    if not isinstance(card, dict) or missing:
        raise DataError(f"{file} is no run card: it lacks {', '.join(missing) or 'its entries'}.")
    for key, kinds in _KINDS.items():
        if not isinstance(card.get(key), kinds) or card.get(key) == []:
            raise DataError(f"{file} is damaged (its {key} is {card[key]!r}): restore it, or train the run anew.")
    if not all(isinstance(each, dict) and isinstance(each.get("step"), int) for each in card.get("resumed") or ()):
        raise DataError(f"{file} is damaged (its resumed is {card['resumed']!r}): restore it, or train the run anew.")
    return card


def _read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The entries of a JSONL file, none if it is missing; what follows the last newline may be unfinished."""
    if not file.exists():
        return
    lines = file.read_bytes().split(b"\n")
    for number, text in enumerate(lines, start=1):
        if not text and number == len(lines):
            return
        try:
            entry = json.loads(text)
            if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
                raise ValueError("no entry with a step")
        except ValueError as error:
            if number == len(lines):
                return
            raise DataError(f"{file} line {number} is damaged ({error}): remove the line, or the run.") from error
        yield entry


def find_runs(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """Run directories among and below `paths`, each once: in the order given, sorted below each path.

    Raises:
        DataError: A path that does not exist, or under which there is no run.
    """
    found: dict[Path, Path] = {}
    for path in [paths] if isinstance(paths, str | Path) else paths:
        root = Path(path)
        if not root.exists():
            raise DataError(f"{root} does not exist: give run directories, or folders that contain them.")
        below = sorted(card.parent for card in root.rglob(CARD))
        if not below:
            raise DataError(f"There is no run under {root}: give run directories (with a {CARD}), or parents.")
        for run_dir in below:
            found.setdefault(run_dir.resolve(), run_dir)
    return list(found.values())


def read_runs(paths: str | Path | Iterable[str | Path]) -> tuple[list[Run], list[str]]:
    """Read the runs among and below `paths`; return them, and a sentence about each that is damaged.

    Raises:
        DataError: A path that does not exist or under which there is no run; or every run is damaged.
    """
    runs, damaged = [], []
    for run_dir in find_runs(paths):
        try:
            runs.append(Run.read(run_dir))
        except DataError as error:
            damaged.append(f"{run_dir} is left out: {error}")
    if not runs:
        raise DataError(damaged[0].replace(" is left out", "", 1))
    return runs, damaged


# --- Pooling runs for statistics.


@dataclass(frozen=True, eq=False)
class Group:
    """The training runs of one variant of one algorithm on one task: what a row of a table stands for.

    Attributes:
        label: Name of the algorithm; with the options that set it apart, if the runs compared have several.
        task: Name of the task: dataset and, where one name stands for several, what sets it apart.
        runs: The run directories.
        members: The R training runs, each a run directory and the column of a seed in it.
        repeated: Training runs left out, because `members` has the same seed already.
    """

    label: str
    task: str
    runs: tuple[Run, ...]
    members: tuple[tuple[Run, int], ...]
    repeated: tuple[tuple[Run, int], ...]

    @property
    def score_name(self) -> str:
        """Unit of the scores, ``"normalised score"`` or ``"return"``."""
        return self.runs[0].score_name

    def last_scores(self) -> FloatArray:
        """Score of each training run at its last evaluation, ``[R]``."""
        return np.array([run.last_scores()[column] for run, column in self.members])

    def best_scores(self) -> FloatArray:
        """Best score of each training run over its evaluations, ``[R]``; see `Run.best_scores`."""
        return np.array([run.best_scores()[column] for run, column in self.members])

    def curve(self) -> tuple[npt.NDArray[np.int64], FloatArray]:
        """The steps ``[V]`` at which all training runs were evaluated, and their scores there ``[V, R]``."""
        curves = [run.curve() for run, _ in self.members]
        common = sorted(set.intersection(*(set(steps.tolist()) for steps, _ in curves)))
        rows = [[steps.tolist().index(step) for step in common] for steps, _ in curves]
        values = [
            values_VS[row, column] for (_, values_VS), row, (_, column) in zip(curves, rows, self.members, strict=True)
        ]
        return np.array(common, dtype=np.int64), np.stack(values, axis=-1)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Pool runs that are repetitions of each other, and nothing else.

    Runs share a *task* if their dataset (by fingerprint), evaluation environment, reference returns and unit
    agree, and a *label* if algorithm, configuration, precision and transforms agree among the runs of the
    task. Options that differ only between tasks, such as presets per dataset, do not split an algorithm. A
    seed that occurs twice in a group is the same training run twice: the longer is kept. Runs without
    evaluations are left out. Groups are ordered by task, then label.
    """
    runs = [run for run in runs if run.evaluations]
    tasks = _distinct_names([_task_name(run) for run in runs], [_task_identity(run) for run in runs])
    identities = [_variant_identity(run.card) for run in runs]
    labels = _distinct_names([run.algorithm for run in runs], identities, within=tasks)
    groups: dict[tuple[str, str], list[Run]] = {}
    for run, task, label in zip(runs, tasks, labels, strict=True):
        groups.setdefault((task, label), []).append(run)
    return [_group(label, task, members) for (task, label), members in sorted(groups.items(), key=lambda g: g[0])]


def _group(label: str, task: str, runs: Sequence[Run]) -> Group:
    kept: dict[int, tuple[Run, int]] = {}
    repeated: list[tuple[Run, int]] = []
    for run in sorted(runs, key=lambda run: -run.last_step):  # stable: of equally long runs the first is kept
        for column, seed in enumerate(run.seeds):
            if seed in kept:
                repeated.append((run, column))
            else:
                kept[seed] = (run, column)
    members = tuple(kept[seed] for seed in sorted(kept))
    return Group(label, task, tuple(runs), members, tuple(repeated))


def scores_by_label(groups: Sequence[Group]) -> dict[str, dict[str, FloatArray]]:
    """Last scores of each label per task, ``{label: {task: [R]}}``, over the tasks that every label has.

    This is what the functions of `corollary.core.statistics` take to compare algorithms over several tasks.
    """
    tasks_of: dict[str, dict[str, Group]] = {}
    for group in groups:
        tasks_of.setdefault(group.label, {})[group.task] = group
    common = set.intersection(*(set(tasks) for tasks in tasks_of.values())) if tasks_of else set()
    return {label: {task: tasks[task].last_scores() for task in sorted(common)} for label, tasks in tasks_of.items()}


def _task_name(run: Run) -> str:
    return run.dataset or run.env_id or "unknown task"


def _task_identity(run: Run) -> dict[str, str]:
    entries = {key: _entry(run.card, f"dataset.{key}") for key in ("fingerprint", "ref_min_score", "ref_max_score")}
    entries["fingerprint"] = str(entries["fingerprint"])[:12]
    return {key: str(value) for key, value in entries.items()} | {
        "env_id": str(run.env_id),
        "score": run.score_name,
    }


def _variant_identity(card: Card) -> dict[str, str]:
    parts = ("config", "precision", "transforms", "reward_transform", "state_transform", "began_at", "fine_tuning")
    identity: dict[str, str] = {}
    for part in parts:
        identity |= flatten(part, card[part]) if part in card else {}
    identity = {name.removeprefix("config."): value for name, value in identity.items()}
    if (base := card.get("base")) is not None:  # bases of other seeds are repetitions, those of other kinds are not
        identity |= {"base": str(base.get("algorithm"))}
        identity |= {f"base.{name}": value for name, value in _variant_identity(base).items()}
    return identity


def flatten(name: str, value: Any) -> dict[str, str]:
    """Nested mappings as one of dotted names, ``{"name.key.key": text}``; what is no string is JSON text."""
    if not isinstance(value, Mapping):
        return {name: value if isinstance(value, str) else strict_json(value)}
    entries: dict[str, str] = {}
    for key, entry in value.items():
        entries |= flatten(f"{name}.{key}", entry)
    return entries


def _distinct_names(
    names: Sequence[str], identities: Sequence[Mapping[str, str]], within: Sequence[str] | None = None
) -> list[str]:
    """`names`, told apart by the entries of `identities` that differ among items of one name and `within`."""
    together: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for name, place, identity in zip(names, within or [""] * len(names), identities, strict=True):
        together.setdefault((name, place), []).append(identity)
    differing: dict[str, dict[str, None]] = {name: {} for name in names}  # as an ordered set
    for (name, _), several in together.items():
        keys = dict.fromkeys(key for identity in several for key in identity)
        differing[name] |= {key: None for key in keys if len({identity.get(key) for identity in several}) > 1}
    options = [
        ", ".join(f"{key}={identity.get(key, 'none')}" for key in differing[name])
        for name, identity in zip(names, identities, strict=True)
    ]
    return [f"{name} ({option})" if option else name for name, option in zip(names, options, strict=True)]
