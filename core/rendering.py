"""Pictures of a trained agent at work: episodes as frames, written as GIF or MP4."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.wrappers import RenderCollection, TimeLimit
from numpy.typing import NDArray
from PIL import Image

from .agent import Agent
from .errors import ConfigError, CorollaryError, EnvironmentMismatchError
from .evaluation import evaluate

_DEFAULT_FPS = 30
_SHORTEST_GIF_DELAY = 0.02  # in seconds; viewers show a frame with a shorter one for 0.1 s
_GIF_TICK = 0.01  # a GIF's unit of time

Frame = NDArray[np.uint8]


@dataclass(frozen=True)
class Recording:
    """What was seen of some episodes.

    Attributes:
        frames: pictures ``[height, width, 3]``, of the state after each reset and each step, episode after episode.
        returns: undiscounted sum of raw rewards of each episode.
        frames_per_second: of the environment's own time, for a picture per step.
    """

    frames: list[Frame]
    returns: tuple[float, ...]
    frames_per_second: float


def record(
    agent: Agent[Any],
    env_id: str,
    *,
    episodes: int = 1,
    seed_index: int = 0,
    deterministic: bool = True,
    max_steps: int | None = None,
) -> Recording:
    """Play `episodes` episodes with one seed's policy and keep every frame in memory.

    The episodes are the first ones of :func:`corollary.core.evaluation.evaluate`, with the same returns for one seed.

    Args:
        agent: a trained agent.
        env_id: a registered environment that can render ``"rgb_array"``.
        episodes: how many, at least 1.
        seed_index: the position of the seed whose policy plays.
        deterministic: act with the policy's mean; otherwise sample from the policy.
        max_steps: steps after which an episode is cut; ``None`` leaves that to the environment.

    Raises:
        ConfigError: if there is no such position, or `max_steps` is not positive.
        EnvironmentMismatchError: if the environment is unknown, or its spaces are others than the agent's.
        CorollaryError: if the environment cannot render here; the sentence says what may be missing.
    """
    seed_index = agent.seed_position(seed_index)
    if max_steps is not None and max_steps < 1:
        raise ConfigError(f"max_steps must be at least 1; got {max_steps}.")
    with _rendering(env_id) as env:
        collecting = RenderCollection[Any, Any](env, reset_clean=False)
        limited = collecting if max_steps is None else TimeLimit[Any, Any](collecting, max_steps)
        player = agent if len(agent.seeds) == 1 else agent.select(seed_index)
        played = evaluate(player, limited, episodes, deterministic=deterministic)
        return Recording(
            frames=[np.asarray(frame, np.uint8) for frame in collecting.frame_list],
            returns=tuple(played.returns_SE[0].tolist()),
            frames_per_second=float(env.metadata.get("render_fps") or _DEFAULT_FPS),
        )


@contextmanager
def _rendering(env_id: str) -> Iterator[gymnasium.Env[Any, Any]]:
    """Make an environment that has shown that it can render, and close it in the end."""
    env = None
    try:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of missing modes and displays, which are said in one sentence below
                env = gymnasium.make(env_id, render_mode="rgb_array", disable_env_checker=True)
                env.reset(seed=0)
                frame = env.render()
        except (gymnasium.error.UnregisteredEnv, ModuleNotFoundError) as error:
            raise EnvironmentMismatchError(f"The environment {env_id!r} cannot be made: {error}") from error
        except gymnasium.error.DependencyNotInstalled as error:  # says itself what to install
            raise CorollaryError(f"{env_id} cannot be rendered: {error}") from error
        except Exception as error:
            raise _cannot_render(env_id, f"{type(error).__name__}: {error}") from error
        if not isinstance(frame, np.ndarray) or frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
            what = f"an array {frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
            raise _cannot_render(env_id, f"its render gave {what}, not uint8 [h, w, 3]")
        yield env
    finally:
        if env is not None:
            env.close()


def _cannot_render(env_id: str, why: str) -> CorollaryError:
    return CorollaryError(
        f"{env_id} cannot be rendered ({why.rstrip('.')}): it must have the render mode 'rgb_array', and for MuJoCo "
        "without a display set the environment variable MUJOCO_GL=egl or MUJOCO_GL=osmesa."
    )


def write_gif(recording: Recording, path: str | Path) -> Path:
    """Write an endless animation at the environment's own speed.

    A GIF counts time in hundredths of a second and shows at most 50 frames per second in most viewers: above that,
    only every second, third, ... frame is written.
    """
    every = math.ceil(_SHORTEST_GIF_DELAY * recording.frames_per_second)
    images = (Image.fromarray(frame) for frame in recording.frames[::every])
    n_images = math.ceil(len(recording.frames) / every)
    seconds = every / recording.frames_per_second
    ticks = [round(i * seconds / _GIF_TICK) for i in range(n_images + 1)]  # rounding the times, not each delay
    path = _parent_made(path)
    next(images).save(
        path,
        format="GIF",
        save_all=True,
        append_images=images,
        duration=[1000 * _GIF_TICK * (end - start) for start, end in itertools.pairwise(ticks)],
        loop=0,
    )
    return path


def write_mp4(recording: Recording, path: str | Path) -> Path:
    """Write a video (H.264) at the environment's own speed.

    Raises:
        CorollaryError: if the package ``imageio-ffmpeg`` is missing (install ``corollary[video]``).
    """
    _require_ffmpeg()
    import imageio_ffmpeg

    height, width, _ = recording.frames[0].shape
    path = _parent_made(path)
    # Blocks of two pixels are the least that the format's halved colours need; the default of 16 would scale frames.
    writer = imageio_ffmpeg.write_frames(
        path, (width, height), fps=recording.frames_per_second, macro_block_size=2, ffmpeg_log_level="error"
    )
    with closing(writer):
        writer.send(None)
        for frame in recording.frames:
            writer.send(np.ascontiguousarray(frame))
    return path


def writer_for(path: str | Path) -> Callable[[Recording, Path], Path]:
    """Return :func:`write_gif` or :func:`write_mp4`, as the name of the file asks for.

    Raises:
        ConfigError: for another kind of file.
        CorollaryError: if that function would raise for want of a package: better now than after playing.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".gif":
        return write_gif
    if suffix == ".mp4":
        _require_ffmpeg()
        return write_mp4
    raise ConfigError(f"A recording is written as .gif or .mp4; got {str(path)!r}.")


def _require_ffmpeg() -> None:
    try:
        import imageio_ffmpeg  # noqa: F401
    except ImportError as error:
        raise CorollaryError(
            "Writing MP4 needs the package imageio-ffmpeg: pip install 'corollary[video]', or write a .gif."
        ) from error


def _parent_made(path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
