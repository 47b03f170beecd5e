r"""Making D4RL's kinds of datasets for continuous control, with Stable-Baselines3's SAC as the behaviour.

The recipe (after Fu et al. 2020, *D4RL*, arXiv 2004.07219, and the figures of its ``-v2`` files):

1. *Train* SAC with the library's defaults in one environment, ``learning_starts=10_000``. At the first end
   of an episode at or after each multiple of `checkpoint_every` steps, store the policy and play a few
   stochastic episodes with it. Training ends with the first episode that ends at or after `train_steps`.
2. *Reference minimum*: mean return of 100 episodes of uniform random actions.
3. *expert*: of the policies of the second half of training, the one whose checkpoint episodes were best.
   Its mean return over 100 new stochastic episodes is the *reference maximum*.
4. *medium*: the first policy whose mean return over 100 stochastic episodes reaches min + f (max - min). f
   is 0.40 for HalfCheetah, 0.44 for Hopper, 0.62 for Walker2d (where D4RL's ``-v2`` files lie) and 1/3
   elsewhere (D4RL's text).
5. *expert*, *medium* and *random*: `rows` steps of the stochastic policy, or of uniform actions.
   *medium-replay*: everything seen in training up to the medium policy, in time order. *full-replay*: the
   last million steps of training. *medium-expert*: the complete episodes of *medium*, then those of
   *expert*.

Unlike D4RL, a task that ends on its last permitted step counts as terminated, and every row has its true
successor. The result is comparable with other data made in the same versions of the simulator only.

What is exact. Every random number of a training run is drawn from the generators of one process, whose
state is saved with networks, optimisers, temperature, replay buffer and counters at each checkpoint;
checkpoints lie between episodes and each episode is reset with a seed of its own, so the simulator has no
state to save. A run that was killed and continued therefore yields the same bits as one that never stopped
(same machine, thread count and versions; other versions are refused). At most the steps since the last
checkpoint are repeated. No pickle is written or read: Stable-Baselines3's own zip files are not used.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from . import checkpoint
from .collect import collect, derived_seed, isolated_generators
from .columns import is_whole
from .d4rl import load_d4rl
from .dataset import Dataset, DatasetInfo, Episode, open_hdf5
from .environments import make_single
from .errors import ConfigError, DataError, suggest
from .files import replacing
from .progress import counting_bar

logger = logging.getLogger(__name__)

QUALITIES = ("random", "medium-replay", "medium", "expert", "medium-expert", "full-replay")
"""Every kind of dataset that `make_dataset` makes, parts before what is made of them."""

MEDIUM_FRACTION = {"HalfCheetah": 0.40, "Hopper": 0.44, "Walker2d": 0.62}
"""f of the medium policy by robot: mean score / 100 of D4RL's ``-v2`` medium files. Elsewhere 1/3."""

_BUFFER_SIZE = 1_000_000  # Stable-Baselines3's default, and the size of D4RL's full-replay sets

# Branches of the seed; training itself uses the seed as it is, as SAC(seed=...) does.
_RESETS, _CHECKPOINT, _REFERENCE, _RANDOM, _ROLLOUT, _POLICY = range(100, 106)

_COLUMNS = ("observations", "next_observations", "actions", "rewards", "terminated", "truncated")


# ------------------------------------------------------------------------------------------------------------
# The behaviour policy
# ------------------------------------------------------------------------------------------------------------


class SquashedGaussianPolicy:
    r"""The policy SAC trains, as arrays: ``a = low + (high - low)(tanh u + 1) / 2``, ``u ~ N(μ(s), σ(s)²)``.

    μ and log σ (clipped to [-20, 2]) are two linear heads on a ReLU network. Called with one observation
    ``[d_s]`` it returns a sampled action ``[d_a]`` and appends its log-density to `log_probs`::

        log π(a|s) = Σ_i log N(u_i; μ_i, σ_i²) - log(1 - tanh² u_i) - log((high_i - low_i) / 2)

    Args:
        weights: ``fc0.weight [256, d_s]``, ``fc0.bias [256]``, ``fc1...``, ``last_fc...`` (μ) and
            ``last_fc_log_std...``, float32, the names under which D4RL files store them.
        low: lower action bound ``[d_a]``.
        high: upper action bound ``[d_a]``.
        seed: of the policy's own generator.
    """

    def __init__(
        self, weights: Mapping[str, NDArray[np.float32]], low: NDArray[Any], high: NDArray[Any], seed: int
    ) -> None:
        self.weights = dict(weights)
        self.low, self.half_width = low.astype(np.float64), (high.astype(np.float64) - low) / 2
        self.log_probs: list[float] = []
        self._random = np.random.default_rng(seed)
        self._depth = sum(name.startswith("fc") and name.endswith("weight") for name in weights)

    def distribution(self, obs: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return μ and σ before squashing, each ``[..., d_a]``."""
        hidden = np.asarray(obs, dtype=np.float32)
        for layer in range(self._depth):
            hidden = np.maximum(self._linear(f"fc{layer}", hidden), 0)
        log_std = np.clip(self._linear("last_fc_log_std", hidden), -20.0, 2.0)
        return self._linear("last_fc", hidden).astype(np.float64), np.exp(log_std.astype(np.float64))

    def _linear(self, name: str, x: NDArray[np.float32]) -> NDArray[np.float32]:
        y: NDArray[np.float32] = x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]
        return y

    def __call__(self, obs: NDArray[Any]) -> NDArray[np.float64]:
        """Sample an action for one observation and note its log-density."""
        mean, std = self.distribution(obs)
        noise = self._random.standard_normal(mean.shape)
        u = mean + std * noise
        gaussian = -0.5 * noise**2 - np.log(std) - 0.5 * math.log(2 * math.pi)
        # log(1 - tanh² u) without cancellation
        squash = 2.0 * (math.log(2.0) - u - np.logaddexp(0.0, -2.0 * u))
        self.log_probs.append(float((gaussian - squash - np.log(self.half_width)).sum()))
        action: NDArray[np.float64] = self.low + self.half_width * (np.tanh(u) + 1.0)
        return action

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of names, shapes and values of the weights."""
        digest = hashlib.sha256()
        for name in sorted(self.weights):
            array = np.ascontiguousarray(self.weights[name], dtype=np.float32)
            digest.update(f"{name} {array.shape};".encode())
            digest.update(array.data)
        return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------
# The rules that choose policies
# ------------------------------------------------------------------------------------------------------------


def medium_fraction(env_id: str) -> float:
    """Return the default f of an environment: `MEDIUM_FRACTION` by robot, 1/3 for all others."""
    return MEDIUM_FRACTION.get(env_id.rpartition("/")[2].rpartition("-v")[0], 1 / 3)


def medium_level(ref_min: float, ref_max: float, f: float) -> float:
    """Return the mean return that makes a policy medium: ``ref_min + f (ref_max - ref_min)``.

    Raises:
        ConfigError: f outside (0, 1].
        DataError: an expert that is no better than random actions.
    """
    if not 0.0 < f <= 1.0:
        raise ConfigError(f"f must be in (0, 1]; got {f}")
    if not ref_max > ref_min:
        raise DataError(
            f"the best policy's mean return, {ref_max:.1f}, does not exceed that of random actions, "
            f"{ref_min:.1f}: nothing was learnt, so train for more steps"
        )
    return ref_min + f * (ref_max - ref_min)


def first_reaching(means: Iterable[tuple[int, float]], level: float) -> int:
    """Return the step of the first ``(step, mean return)`` with a mean of at least `level`; reads no further.

    Raises:
        DataError: none reaches it.
    """
    best = -math.inf
    for step, mean in means:
        if mean >= level:
            return step
        best = max(best, mean)
    raise DataError(f"no checkpoint reaches the medium level {level:.1f}; the best one has mean return {best:.1f}")


def best_late(means: Sequence[tuple[int, float]]) -> int:
    """Return the step with the highest mean among those from half of the last step on."""
    half = means[-1][0] / 2
    return max((pair for pair in means if pair[0] >= half), key=lambda pair: pair[1])[0]


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------


def write_d4rl(
    dataset: Dataset,
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any] | None = None,
    log_probs: Sequence[float] | None = None,
) -> Path:
    """Write `dataset` as an HDF5 file of D4RL's layout, atomically, and return its path.

    Keys: observations, actions, rewards, terminals, timeouts; next_observations where every successor is
    known; ``infos/action_log_probs``; below ``metadata`` what `DatasetInfo` says, the action bounds, and
    `metadata`. Actions stay in the environment's units (D4RL's own files have [-1, 1] throughout).
    `corollary.core.d4rl.load_d4rl` reads it back with equal arrays.

    Args:
        dataset: what to write.
        path: the file; replaced if it exists.
        metadata: names to scalars, texts or arrays; ``a/b`` makes a group.
        log_probs: log-density of each row's action under the behaviour policy, ``[N]``.

    Raises:
        DataError: `log_probs` of another length.
    """
    path, info = Path(path), dataset.info
    position = np.arange(len(dataset)) + dataset.episode_of_row
    arrays = {
        "observations": dataset.observations[position],
        "actions": dataset.actions,
        "rewards": dataset.rewards,
        "terminals": dataset.terminated,
        "timeouts": dataset.truncated,
    }
    if dataset.final_obs_known.all():
        arrays["next_observations"] = dataset.observations[position + 1]
    if log_probs is not None:
        if len(log_probs) != len(dataset):
            raise DataError(f"log_probs has {len(log_probs)} entries for {len(dataset)} rows")
        arrays["infos/action_log_probs"] = np.asarray(log_probs, dtype=np.float32)
    described = {
        "env_id": info.env_id,
        "horizon": info.horizon,
        "ref_min_score": info.ref_min_score,
        "ref_max_score": info.ref_max_score,
        "description": info.description or None,
        "action_low": dataset.action_low,
        "action_high": dataset.action_high,
        **(metadata or {}),
    }
    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        for key, array in arrays.items():
            file.create_dataset(key, data=array, compression="gzip", shuffle=True)
        for key, value in described.items():
            if value is not None:
                file[f"metadata/{key}"] = value
    return path


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Recipe:
    """What a training run is; a folder belongs to exactly one."""

    env_id: str
    train_steps: int
    seed: int
    learning_starts: int
    checkpoint_every: int
    checkpoint_episodes: int
    reference_episodes: int

    def claim(self, folder: Path) -> dict[str, str]:
        """Write recipe and versions to a new `folder`, or check those of an old one; return the versions.

        Raises:
            ConfigError: the folder belongs to another recipe or was begun with other versions.
        """
        names = ("gymnasium", "mujoco", "stable-baselines3", "torch", "numpy")
        mine = {"recipe": asdict(self), "versions": {name.replace("-", "_"): version(name) for name in names}}
        if not checkpoint.exists(folder):
            checkpoint.write(folder, mine, {})
        recorded, _ = checkpoint.read(folder)
        for kind, values in mine.items():
            for key, value in values.items():
                if recorded[kind].get(key) != value:
                    raise ConfigError(
                        f"{folder.parent} was begun with {key}={recorded[kind].get(key)!r}, not {value!r}: "
                        "use that again, or another out_dir"
                    )
        return mine["versions"]


class _Training:
    """SAC's loop, written out so that it can stop and go on between any two episodes.

    Folder: ``rows/STEP`` holds the transitions since the previous checkpoint, ``policies/STEP`` the policy,
    ``state`` everything else. ``state`` is written last and replaced atomically, so it is the commit:
    whatever a killed run left behind beyond it is written again, with the same content.
    """

    def __init__(self, recipe: _Recipe, env: gymnasium.Env[Any, Any], folder: Path) -> None:
        import stable_baselines3
        from stable_baselines3.common.logger import Logger

        self.recipe, self.env, self.folder = recipe, env, folder
        self.horizon = _horizon(env)
        space = env.action_space
        assert isinstance(space, spaces.Box)
        self.action_bounds: dict[str, Any] = {"action_low": space.low, "action_high": space.high}
        self.sac = stable_baselines3.SAC(
            "MlpPolicy",
            env,
            learning_starts=recipe.learning_starts,
            buffer_size=min(_BUFFER_SIZE, recipe.train_steps + self.horizon),
            seed=recipe.seed,
            device="cpu",
        )
        self.sac.set_logger(Logger(folder=None, output_formats=[]))
        self.optimizers = {
            "actor": self.sac.actor.optimizer,
            "critic": self.sac.critic.optimizer,
            "temperature": self.sac.ent_coef_optimizer,
        }
        self.step = self.episode = 0
        self.fresh: list[tuple[Any, ...]] = []  # transitions since the last checkpoint
        if checkpoint.exists(folder / "state"):
            self._restore()

    @property
    def finished(self) -> bool:
        return self.step >= self.recipe.train_steps

    def run_to_checkpoint(self, after_episode: Callable[[int], None]) -> None:
        """Play and learn until the next checkpoint is due, and write it; `after_episode` hears the step."""
        due = (self.step // self.recipe.checkpoint_every + 1) * self.recipe.checkpoint_every
        while self.step < min(due, self.recipe.train_steps):
            self._play_episode()
            after_episode(self.step)
        self._save()

    def _play_episode(self) -> None:
        sac, env = self.sac, self.env
        obs = np.array(env.reset(seed=derived_seed(self.recipe.seed, _RESETS, self.episode))[0])
        terminated = truncated = False
        while not (terminated or truncated):
            if self.step < self.recipe.learning_starts:
                chosen = sac.action_space.sample()
            else:
                chosen, _ = sac.predict(obs, deterministic=False)
            scaled = sac.policy.scale_action(chosen)
            next_obs, reward, ended, cut, _ = env.step(sac.policy.unscale_action(scaled))
            next_obs = np.array(next_obs)  # a copy: some environments go on writing into what they returned
            terminated, truncated = bool(ended), bool(cut) and not ended
            row = (obs, next_obs, scaled, reward)
            sac.replay_buffer.add(*row, terminated or truncated, [{"TimeLimit.truncated": truncated}])
            self.fresh.append((*row, terminated, truncated))
            self.step += 1
            if self.step > self.recipe.learning_starts:
                sac.train(gradient_steps=1, batch_size=sac.batch_size)
            obs = next_obs
        self.episode += 1

    def _save(self) -> None:
        name = f"{self.step:09d}"
        columns = [np.asarray(column) for column in zip(*self.fresh, strict=True)]
        columns[2], columns[3] = columns[2].astype(np.float32), columns[3].astype(np.float32)
        rows = {key: torch.from_numpy(column) for key, column in zip(_COLUMNS, columns, strict=True)}
        checkpoint.write(self.folder / "rows" / name, {}, rows)
        checkpoint.write(self.folder / "policies" / name, {}, self._policy_weights())
        tensors = {f"policy.{key}": value for key, value in self.sac.policy.state_dict().items()}
        tensors["log_ent_coef"] = self.sac.log_ent_coef
        for owner, optimizer in self.optimizers.items():
            for index, slots in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{owner}.{index}.{slot}": value for slot, value in slots.items()}
        tensors["torch_generator"] = torch.get_rng_state()
        numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 (the generator that SAC's buffer draws from)
        tensors["numpy_generator"] = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
        counters = {
            "step": self.step,
            "episode": self.episode,
            "numpy_position": numpy_state["state"]["pos"],
            "action_generator": self.sac.action_space.np_random.bit_generator.state,
        }
        checkpoint.write(self.folder / "state", counters, tensors)
        self.fresh = []

    def _restore(self) -> None:
        counters, tensors = checkpoint.read(self.folder / "state")
        self.step, self.episode = counters["step"], counters["episode"]
        prefix = "policy."
        self.sac.policy.load_state_dict(
            {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        )
        self.sac.log_ent_coef.data.copy_(tensors["log_ent_coef"])
        for owner, optimizer in self.optimizers.items():
            state: dict[int, dict[str, torch.Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer.{owner}."):
                    index, slot = key.split(".")[2:]
                    state.setdefault(int(index), {})[slot] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        _fill(self.sac.replay_buffer, self.rows(self.step))
        self.sac.action_space.np_random.bit_generator.state = counters["action_generator"]
        words = tensors["numpy_generator"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", words, counters["numpy_position"], 0, 0.0))  # noqa: NPY002
        torch.set_rng_state(tensors["torch_generator"])

    def _policy_weights(self) -> dict[str, torch.Tensor]:
        """Return the actor's tensors under the names that D4RL gives them."""
        actor = self.sac.actor
        hidden = [layer for layer in actor.latent_pi if isinstance(layer, torch.nn.Linear)]
        layers = {f"fc{i}": layer for i, layer in enumerate(hidden)}
        layers |= {"last_fc": actor.mu, "last_fc_log_std": actor.log_std}
        return {
            f"{name}.{part}": getattr(layer, part).detach().clone()
            for name, layer in layers.items()
            for part in ("weight", "bias")
        }

    def policy_steps(self) -> list[int]:
        """Return the steps at which a policy is stored, up to the committed state."""
        steps = sorted(int(path.name) for path in (self.folder / "policies").glob("[0-9]*"))
        return [step for step in steps if step <= self.step]

    def rows(self, upto: int) -> dict[str, NDArray[Any]]:
        """Return all transitions of training before step `upto` (a checkpoint), in time order, by column."""
        steps = [step for step in self.policy_steps() if step <= upto]
        shards = [checkpoint.read(self.folder / "rows" / f"{step:09d}")[1] for step in steps]
        return {key: np.concatenate([shard[key].numpy() for shard in shards]) for key in _COLUMNS}

    def policy(self, step: int, seed: int) -> SquashedGaussianPolicy:
        """Return the policy stored at `step`, with a generator of its own."""
        _, weights = checkpoint.read(self.folder / "policies" / f"{step:09d}")
        bounds = self.action_bounds["action_low"], self.action_bounds["action_high"]
        return SquashedGaussianPolicy({name: t.numpy() for name, t in weights.items()}, *bounds, seed)

    def replay(self, upto: int, last: int | None = None) -> Dataset:
        """Return what training saw before step `upto` (the `last` steps of it), in the env's units."""
        rows: dict[str, Any] = self.rows(upto)
        if last is not None:
            rows = {key: column[-last:] for key, column in rows.items()}
        rows["actions"] = self.sac.policy.unscale_action(rows["actions"])
        info = DatasetInfo("replay", provenance={"cut_episodes": 0})
        return Dataset.from_arrays(**rows, **self.action_bounds, info=info)


def _fill(buffer: Any, rows: Mapping[str, NDArray[Any]]) -> None:
    """Put `rows` into an empty Stable-Baselines3 replay buffer, as if they had been added one by one."""
    n = len(rows["rewards"])
    kept = np.arange(max(0, n - buffer.buffer_size), n)
    slots = kept % buffer.buffer_size
    for key in ("observations", "next_observations", "actions", "rewards"):
        getattr(buffer, key)[slots, 0] = rows[key][kept]
    buffer.dones[slots, 0] = (rows["terminated"] | rows["truncated"])[kept]
    buffer.timeouts[slots, 0] = rows["truncated"][kept]
    buffer.pos, buffer.full = n % buffer.buffer_size, n >= buffer.buffer_size


def _horizon(env: gymnasium.Env[Any, Any]) -> int:
    """Return the environment's time limit, after checking that the recipe fits it.

    Raises:
        ConfigError: no time limit, or spaces that are not one-dimensional boxes.
    """
    spec = env.spec
    if spec is None or spec.max_episode_steps is None:
        raise ConfigError(f"{spec.id if spec else env} has no time limit, and the recipe stops between episodes only")
    for name, space in (("observation", env.observation_space), ("action", env.action_space)):
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            raise ConfigError(f"{spec.id} has the {name} space {space}; the recipe needs a one-dimensional Box")
    return spec.max_episode_steps


# ------------------------------------------------------------------------------------------------------------
# The recipe
# ------------------------------------------------------------------------------------------------------------


class _Returns:
    """Mean returns of policies, each measured once and kept on disk."""

    def __init__(self, training: _Training, folder: Path) -> None:
        self._training, self._folder = training, folder
        self._known: dict[str, list[float]] = checkpoint.read(folder)[0]["returns"] if checkpoint.exists(folder) else {}

    def checkpoint_mean(self, step: int) -> float:
        """Return the mean over the few episodes that follow each checkpoint."""
        recipe = self._training.recipe
        return self._mean(f"checkpoint/{step}", step, recipe.checkpoint_episodes, _CHECKPOINT, step)

    def reference_mean(self, step: int | None) -> float:
        """Return the mean over many other episodes, of the policy of `step` or (None) of random actions."""
        recipe = self._training.recipe
        branch = (_RANDOM,) if step is None else (_REFERENCE, step)
        name = "random" if step is None else f"reference/{step}"
        return self._mean(name, step, recipe.reference_episodes, *branch)

    def _mean(self, name: str, step: int | None, episodes: int, *branch: int) -> float:
        if name not in self._known:
            seed = derived_seed(self._training.recipe.seed, *branch)
            played, _ = _roll_out(self._training, step, seed, n_episodes=episodes, progress=False)
            self._known[name] = played.episode_returns().tolist()
            checkpoint.write(self._folder, {"returns": self._known}, {})
        return float(np.mean(self._known[name]))


def _roll_out(
    training: _Training, step: int | None, seed: int, *, progress: bool | None, **length: Any
) -> tuple[Dataset, list[float]]:
    """Play the policy of `step` (None: random actions); return the data and each action's log-density."""
    policy = None if step is None else training.policy(step, derived_seed(seed, _POLICY))
    played = collect(training.recipe.env_id, policy, seed=seed, progress=progress, **length)
    if policy is not None:
        return played, policy.log_probs
    assert played.action_low is not None
    assert played.action_high is not None
    return played, [-float(np.log(played.action_high - played.action_low).sum())] * len(played)


@dataclass(frozen=True)
class _Maker:
    """Chooses policies and writes files, once training is finished."""

    training: _Training
    returns: _Returns
    paths: Mapping[str, Path]
    versions: Mapping[str, str]
    rows: int
    fraction: float
    progress: bool | None

    @cached_property
    def ref_min(self) -> float:
        return self.returns.reference_mean(None)

    @cached_property
    def ref_max(self) -> float:
        return self.returns.reference_mean(self.expert_step)

    @cached_property
    def expert_step(self) -> int:
        return best_late([(s, self.returns.checkpoint_mean(s)) for s in self.training.policy_steps()])

    @cached_property
    def medium_step(self) -> int:
        level = medium_level(self.ref_min, self.ref_max, self.fraction)
        return first_reaching(((s, self.returns.reference_mean(s)) for s in self.training.policy_steps()), level)

    def write(self, quality: str) -> None:
        """Write the file of one quality unless it is there.

        Raises:
            ConfigError: a file is there that was made with other options.
        """
        recipe, path = self.training.recipe, self.paths[quality]
        options = {**asdict(recipe), "quality": quality}
        if quality not in ("medium-replay", "full-replay"):
            options["rows"] = self.rows
        if "medium" in quality:
            options["f"] = self.fraction
        request = json.dumps(options, sort_keys=True)
        if path.exists():
            with open_hdf5(path) as file:
                made = file["metadata/recipe"].asstr()[()] if "metadata/recipe" in file else "another recipe"
            if made != request:
                raise ConfigError(f"{path} exists, made with {made}, not with {request}: delete it or move it away")
            return
        dataset, log_probs, behaviour = self._data(quality)
        metadata: dict[str, Any] = {
            "algorithm": f"SAC, Stable-Baselines3 defaults, learning_starts={recipe.learning_starts}, one environment",
            "behaviour": behaviour,
            "recipe": request,
            "seed": recipe.seed,
            **self.versions,
            "ref_episodes": recipe.reference_episodes,
            "rows": len(dataset),
            "episodes": dataset.n_episodes,
            "cut_episodes": dataset.info.provenance["cut_episodes"],
            "mean_return": float(dataset.episode_returns().mean()),
            "trained_steps": self.training.step,
        }
        if "medium" in quality:
            metadata["fraction"] = self.fraction
        if (step := self._policy_step(quality)) is not None:
            policy = self.training.policy(step, 0)
            metadata |= {"policy_step": step, "policy_sha256": policy.sha256}
            metadata |= {"policy/nonlinearity": "relu", "policy/output_distribution": "tanh_gaussian"}
            metadata |= {f"policy/{name.replace('.', '/')}": array for name, array in policy.weights.items()}
        info = DatasetInfo(
            name=path.stem,
            env_id=recipe.env_id,
            ref_min_score=self.ref_min,
            ref_max_score=self.ref_max,
            description=f"{recipe.env_id}: {behaviour}",
            horizon=self.training.horizon,
        )
        write_d4rl(dataclasses.replace(dataset, info=info), path, metadata, log_probs)

    def _data(self, quality: str) -> tuple[Dataset, list[float] | None, str]:
        """Return the data, each action's log-density where one policy acted, and the behaviour in words."""
        training = self.training
        if quality == "medium-replay":
            return training.replay(self.medium_step), None, f"training from step 0 to step {self.medium_step}"
        if quality == "full-replay":
            data = training.replay(training.step, last=_BUFFER_SIZE)
            return data, None, f"the last {len(data)} of {training.step} steps of training"
        if quality == "medium-expert":
            parts = [load_d4rl(self.paths[part], **training.action_bounds) for part in ("medium", "expert")]
            episodes = [episode for part in parts for episode in _complete_episodes(part)]
            info = DatasetInfo(quality, provenance={"cut_episodes": 0})
            data = Dataset.from_episodes(episodes, **training.action_bounds, info=info)
            return data, None, "the complete episodes of medium, then those of expert"
        step = self._policy_step(quality)
        seed = derived_seed(training.recipe.seed, _ROLLOUT, QUALITIES.index(quality))
        data, log_probs = _roll_out(training, step, seed, n_steps=self.rows, progress=self.progress)
        acting = "uniform random actions" if step is None else f"the stochastic policy of training step {step}"
        return data, log_probs, acting

    def _policy_step(self, quality: str) -> int | None:
        """Return the training step of the policy that a quality is named after, if it is named after one."""
        if quality in ("medium", "medium-replay"):
            return self.medium_step
        return self.expert_step if quality == "expert" else None


def _complete_episodes(dataset: Dataset) -> list[Episode]:
    """Return the episodes of a file of ours, without a last one that was cut."""
    complete = dataset.n_episodes - int(dataset.info.provenance["metadata/cut_episodes"])
    episodes = []
    for number, (start, length) in enumerate(zip(dataset.episode_starts, dataset.episode_lengths, strict=True)):
        rows = slice(start, start + length)
        observations = dataset.observations[start + number : start + number + length + 1]
        flags = dataset.terminated[rows], dataset.truncated[rows]
        episodes.append(Episode(observations, dataset.actions[rows], dataset.rewards[rows], *flags))
    return episodes[:complete]


def _train(training: _Training, returns: _Returns, progress: bool | None) -> None:
    """Run training to its end, measuring each policy as it appears."""
    with counting_bar(progress) as bar:
        recipe = training.recipe
        task = bar.add_task(f"SAC in {recipe.env_id}", total=recipe.train_steps, completed=training.step, headline="")
        while not training.finished:
            training.run_to_checkpoint(lambda step: bar.update(task, completed=step))
            mean = returns.checkpoint_mean(training.step)
            logger.info("%s: mean return %.1f after %d steps", recipe.env_id, mean, training.step)
            bar.update(task, headline=f"return {mean:.1f}")


def make_dataset(
    env_id: str,
    out_dir: str | os.PathLike[str],
    *,
    qualities: Sequence[str] = ("random", "medium-replay", "medium", "expert", "medium-expert"),
    train_steps: int = 1_000_000,
    rows: int = 100_000,
    f: float | None = None,
    seed: int = 0,
    learning_starts: int = 10_000,
    checkpoint_every: int = 10_000,
    checkpoint_episodes: int = 10,
    reference_episodes: int = 100,
    progress: bool | None = None,
) -> dict[str, Path]:
    """Train SAC in `env_id` and write D4RL-like datasets; the recipe is in the module's head.

    Killed at any time, the same call continues: training from its last checkpoint, then each file that is
    not yet there. A finished training run is reused by calls that ask for other qualities, `rows` or `f`.
    Training state is kept in ``out_dir/<environment>-training``, which may be deleted once the files are
    made. One million training steps take hours and, for HalfCheetah, about 0.35 GB of disk.

    Args:
        env_id: a Gymnasium id with a time limit and one-dimensional box spaces.
        out_dir: folder for the files; made if missing.
        qualities: which datasets, of `QUALITIES`. ``medium-expert`` also makes the two it consists of.
        train_steps: environment steps of training, one gradient step each.
        rows: steps in each of random, medium and expert.
        f: where the medium policy lies between random (0) and expert (1]; None takes `medium_fraction`.
        seed: source of all randomness.
        learning_starts: first steps of training, with uniform random actions and no learning.
        checkpoint_every: steps between policies, and between states to continue from.
        checkpoint_episodes: stochastic episodes that measure each policy.
        reference_episodes: episodes behind the reference returns and the medium rule.
        progress: show progress bars; None shows them when standard error is a terminal.

    Returns:
        The path of each dataset in `qualities`, such as ``out_dir/halfcheetah-medium-replay-v5.hdf5``. Its
        metadata hold the versions, seeds, reference returns, f, the policy's step, SHA-256 and (where one
        policy acted) weights.

    Raises:
        ConfigError: Stable-Baselines3 is missing; an unknown quality; numbers out of range; an environment
            that does not fit; a folder or file that was made with other options or versions.
        DataError: training that never reached the medium level or learnt nothing.
    """
    for quality in qualities:
        if quality not in QUALITIES:
            raise ConfigError(
                f"there is no quality {quality!r}; known are {', '.join(QUALITIES)}.{suggest(quality, QUALITIES)}"
            )
    recipe = _Recipe(
        env_id, train_steps, seed, learning_starts, checkpoint_every, checkpoint_episodes, reference_episodes
    )
    for option, value in {**asdict(recipe), "rows": rows}.items():
        if option not in ("env_id", "seed", "learning_starts") and value < 1:
            raise ConfigError(f"{option} must be at least 1; got {value}")
    if not is_whole(seed) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed must be a whole number in [0, 2**32); got {seed!r}")
    fraction = medium_fraction(env_id) if f is None else f
    medium_level(0.0, 1.0, fraction)  # refuses a bad f before hours of training
    out_dir = Path(out_dir)
    robot, _, number = env_id.replace("/", "-").lower().rpartition("-v")
    paths = {quality: out_dir / f"{robot}-{quality}-v{number}.hdf5" for quality in QUALITIES}
    folder = out_dir / f"{robot}-v{number}-training"
    if find_spec("stable_baselines3") is None:
        raise ConfigError("make_dataset trains Stable-Baselines3's SAC; install it with: pip install 'corollary[sb3]'")
    env = make_single(env_id)
    try:
        horizon = _horizon(env)
        if "medium-expert" in qualities and rows < horizon:
            raise ConfigError(f"medium-expert needs rows of at least one episode, {horizon}; got {rows}")
        versions = recipe.claim(folder / "recipe")
        with isolated_generators(seed):
            training = _Training(recipe, env, folder)
            returns = _Returns(training, folder / "returns")
            _train(training, returns, progress)
            maker = _Maker(training, returns, paths, versions, rows, fraction, progress)
            wanted = {"medium", "expert", *qualities} if "medium-expert" in qualities else set(qualities)
            for quality in sorted(wanted, key=QUALITIES.index):
                maker.write(quality)
    finally:
        env.close()
    return {quality: paths[quality] for quality in qualities}
