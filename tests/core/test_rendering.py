"""Episodes as pictures: which frames and returns, their time in a GIF and in a video, what cannot be rendered."""

import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from PIL import Image

from corollary.core.errors import ConfigError, CorollaryError, EnvironmentMismatchError
from corollary.core.evaluation import evaluate
from corollary.core.rendering import Recording, record, write_gif, writer_for
from corollary.online import PPO

ID, T = "Lamp-v0", 4


class Lamp(gymnasium.Env[Any, Any]):
    """T steps rewarded with the action; the picture is one colour, (40 steps taken, 100 last action, 7)."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}  # noqa: RUF012
    observation_space = spaces.Box(-1, 1, (2,))
    action_space = spaces.Discrete(2)
    trouble: Any = None
    n_open = 0

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        Lamp.n_open += 1

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t, self.action = 0, 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        self.t, self.action = self.t + 1, int(action)
        return np.full(2, self.t / T, np.float32), float(action), self.t == T, False, {}

    def render(self) -> Any:
        if isinstance(self.trouble, Exception):
            raise self.trouble
        if self.trouble is not None:
            return self.trouble
        return np.full((13, 20, 3), (40 * self.t, 100 * self.action, 7), np.uint8)

    def close(self) -> None:
        Lamp.n_open -= 1


class Dark(Lamp):
    metadata = {"render_modes": []}  # noqa: RUF012


class Darker(Lamp):
    def __init__(self) -> None:
        super().__init__()


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(Lamp, "n_open", 0)
    for name, kind in ((ID, Lamp), ("Dark-v0", Dark), ("Darker-v0", Darker)):
        gymnasium.register(name, kind)
    yield
    for name in (ID, "Dark-v0", "Darker-v0"):
        del gymnasium.registry[name]


@pytest.fixture
def agent():
    """Two seeds: one always switches off (action 0), the other on; sampling, both do either."""
    made = PPO(ID, 2, n_steps=64, normalize_obs=False)
    with torch.no_grad():
        for parameter in made.actor.parameters():
            parameter.zero_()
        made.actor.net.biases[-1][1, 1] = 0.5
    made.close()
    return made


def colours(recording: Recording) -> list[tuple[int, ...]]:
    assert all((frame == frame[0, 0]).all() and frame.shape == (13, 20, 3) for frame in recording.frames)
    return [tuple(frame[0, 0].tolist()) for frame in recording.frames]


def test_a_frame_after_each_reset_and_step_and_the_returns(agent) -> None:
    off, on = (record(agent, ID, episodes=2, seed_index=index) for index in (0, 1))
    assert colours(off) == 2 * [(40 * t, 0, 7) for t in range(T + 1)]
    assert colours(on) == 2 * [(0, 0, 7), *((40 * t, 100, 7) for t in range(1, T + 1))]
    assert (off.returns, on.returns) == ((0.0, 0.0), (4.0, 4.0))
    assert off.frames_per_second == 25
    assert Lamp.n_open == 0


def test_an_episode_is_cut_after_so_many_steps(agent) -> None:
    cut = record(agent, ID, episodes=2, seed_index=1, max_steps=3)
    assert len(cut.frames) == 2 * (3 + 1)
    assert cut.returns == (3.0, 3.0)
    assert record(agent, ID, seed_index=1, max_steps=99).returns == (4.0,)


def test_sampled_episodes_are_those_of_evaluate(agent) -> None:
    sampled = record(agent, ID, episodes=6, deterministic=False)
    expected = evaluate(agent.select(0), ID, 6, deterministic=False, parallel=1)
    assert sampled.returns == tuple(expected.returns_SE[0])
    assert len(set(sampled.returns)) > 1


def test_what_was_asked_wrongly_is_named(agent) -> None:
    with pytest.raises(ConfigError, match="2 seeds; there is no seed index 2"):
        record(agent, ID, seed_index=2)
    with pytest.raises(ConfigError, match="max_steps must be at least 1; got 0"):
        record(agent, ID, max_steps=0)
    with pytest.raises(CorollaryError, match="at least one episode"):
        record(agent, ID, episodes=0)
    with pytest.raises(EnvironmentMismatchError, match="NoSuch-v0"):
        record(agent, "NoSuch-v0")
    with pytest.raises(EnvironmentMismatchError, match="cannot be made"):
        record(agent, "no_such_module:Lamp-v0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lamp, "observation_space", spaces.Box(-2, 2, (2,)))
        with pytest.raises(EnvironmentMismatchError, match="has observation space"):
            record(agent, ID)
    assert Lamp.n_open == 0


@pytest.mark.parametrize(
    ("env_id", "trouble", "words"),
    [
        ("Dark-v0", RuntimeError("no lamp"), "RuntimeError: no lamp"),
        ("Darker-v0", None, "render mode"),
        (ID, ImportError("no GL here."), r"ImportError: no GL here\).*MUJOCO_GL=egl"),
        (ID, gymnasium.error.DependencyNotInstalled("run `pip install lamp`"), "cannot be rendered: run `pip install"),
        (ID, np.zeros((2, 2), np.uint8), "gave an array uint8"),
        (ID, "ascii", "gave str"),
    ],
)
def test_what_cannot_be_rendered_is_one_sentence_with_the_remedy(agent, monkeypatch, env_id, trouble, words) -> None:
    monkeypatch.setattr(Lamp, "trouble", trouble)
    with pytest.raises(CorollaryError, match=words) as caught:
        record(agent, env_id)
    assert "\n" not in str(caught.value)
    assert Lamp.n_open == 0


def strip(n_frames: int, fps: float, height: int = 10, width: int = 16) -> Recording:
    """Frame i is of the shade 10 i."""
    return Recording([np.full((height, width, 3), 10 * i, np.uint8) for i in range(n_frames)], (0.0,), fps)


def read_gif(path: Any) -> tuple[list[int], list[int]]:
    """Shades and durations in milliseconds."""
    shades, durations = [], []
    with Image.open(path) as image:
        assert image.info["loop"] == 0
        for i in range(image.n_frames):
            image.seek(i)
            durations.append(image.info["duration"])
            shades.append(image.convert("RGB").getpixel((3, 3))[0])
    return shades, durations


@pytest.mark.parametrize(
    ("fps", "shades", "durations"),
    [
        (20, [0, 10, 20, 30, 40, 50, 60], [50] * 7),
        (30, [0, 10, 20, 30, 40, 50, 60], [30, 40, 30, 30, 40, 30, 30]),  # the frames begin at 0, 33, 67, 100, ... ms
        (50, [0, 10, 20, 30, 40, 50, 60], [20] * 7),
        (100, [0, 20, 40, 60], [20] * 4),
        (125, [0, 30, 60], [20, 30, 20]),  # every third: 0, 24, 48, 72 ms
    ],
)
def test_a_gif_runs_at_the_environments_speed_and_none_of_its_frames_is_too_short(
    tmp_path, fps, shades, durations
) -> None:
    assert read_gif(write_gif(strip(7, fps), tmp_path / "new" / "a.gif")) == (shades, durations)


def test_equal_frames_keep_their_time(tmp_path) -> None:
    still = Recording(strip(1, 20).frames * 5 + strip(2, 20).frames, (0.0,), 20)
    assert read_gif(write_gif(still, tmp_path / "a.gif")) == ([0, 10], [300, 50])


def test_the_file_name_chooses_the_writer() -> None:
    assert writer_for("a/rollout.GIF") is write_gif
    with pytest.raises(ConfigError, match=r"as \.gif or \.mp4; got 'a\.avi'"):
        writer_for("a.avi")


def test_a_missing_package_is_named_before_anything_is_played(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(CorollaryError, match=r"pip install 'corollary\[video\]'"):
        writer_for("a.mp4")


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # imageio-ffmpeg leaves pipes open
def test_a_video_has_the_frames_and_the_speed(tmp_path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    path = writer_for("a.mp4")(strip(7, 20, height=38, width=50), tmp_path / "new" / "a.mp4")
    reader = ffmpeg.read_frames(str(path))
    about = next(reader)
    frames = [np.frombuffer(frame, np.uint8) for frame in reader]
    assert (about["size"], about["fps"]) == ((50, 38), 20.0)
    np.testing.assert_allclose([frame.mean() for frame in frames], 10 * np.arange(7), atol=3)


@pytest.mark.peer
def test_classic_control_is_rendered() -> None:
    pytest.importorskip("pygame")
    agent = PPO("CartPole-v1", n_steps=64)
    recording = record(agent, "CartPole-v1", max_steps=3)
    assert [frame.shape for frame in recording.frames] == [(400, 600, 3)] * 4
    assert recording.frames_per_second == 50
    assert any((frame != recording.frames[0]).any() for frame in recording.frames)
