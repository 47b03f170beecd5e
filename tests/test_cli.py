"""The command line, run in process on a small dataset of a real environment."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from PIL import Image

import corollary
from corollary.cli import describe_options, main
from corollary.core.agent import algorithms
from corollary.core.collect import collect
from corollary.core.dataset import Dataset, DatasetInfo

TINY = ["--set", "hidden=8,8", "--set", "batch_size=16"]
ONLINE = [*TINY, "--set", "n_steps=8", "--set", "n_envs=2", "--eval-episodes", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three random episodes of the one-link pendulum's layout: 3 observations, 1 action in [-2, 2]."""
    rng = np.random.default_rng(0)
    rows = 60
    observations = rng.normal(size=(rows + 1, 3)).astype(np.float32)
    ends = np.arange(rows) % 20 == 19
    dataset = Dataset.from_arrays(
        observations[:-1],
        rng.uniform(-2, 2, (rows, 1)).astype(np.float32),
        rng.normal(size=rows).astype(np.float32),
        np.zeros(rows, bool),
        ends,
        next_observations=observations[1:],
        action_low=-2.0,
        action_high=2.0,
        info=DatasetInfo(name="tiny", env_id="Pendulum-v1", ref_min_score=-1500.0, ref_max_score=0.0),
    )
    return str(dataset.save(tmp_path_factory.mktemp("data") / "tiny.hdf5"))


def run(capsys, *arguments):
    status = main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_demo_trains_and_reports_its_four_algorithms(capsys, tmp_path):
    out = tmp_path / "demo"
    status, printed, _ = run(capsys, "demo", "--out", str(out), "--seeds", "1", "--scale", "0.001")
    assert status == 0
    for name in ("offline.bc", "offline.td3_bc", "offline.iql", "offline.prdc"):
        assert name in printed
        assert corollary.load_agent(out / name / "checkpoint").clock == 100  # the least
    with Image.open(out / "learning_curves.png") as picture:
        assert picture.format == "PNG"
    assert "offline.prdc" in (out / "report.html").read_text()
    status, _, told = run(capsys, "demo", "--out", str(out), "--scale", "0")
    assert status != 0
    assert "--scale must be positive" in told


def test_data_commands_hand_on_what_was_asked_for(capsys, tmp_path, monkeypatch):
    asked = []

    def make(*arguments, **options):
        asked.append((arguments, options))
        return {"random": tmp_path / "random.hdf5"}

    monkeypatch.setattr("corollary.core.make_data.make_dataset", make)
    monkeypatch.setattr("corollary.core.download.get_d4rl", lambda name: asked.append(name) or tmp_path / name)
    wanted = ["Pendulum-v1", "--out", str(tmp_path), "--train-steps", "300", "--rows", "200", "--seed", "7"]
    assert run(capsys, "data", "make", *wanted)[1].strip() == str(tmp_path / "random.hdf5")
    assert run(capsys, "data", "get", "hopper-medium-v2")[1].strip() == str(tmp_path / "hopper-medium-v2")
    options = {"train_steps": 300, "rows": 200, "seed": 7}
    assert asked == [(("Pendulum-v1", str(tmp_path)), options), "hopper-medium-v2"]


def test_algorithms_lists_every_class(capsys):
    status, out, _ = run(capsys, "algorithms")
    assert status == 0
    assert all(name in out for name in algorithms())


@pytest.mark.parametrize("name", algorithms())
def test_options_of_an_algorithm_are_all_explained(capsys, name):
    kind = algorithms()[name]
    _, out, _ = run(capsys, "algorithms", name)
    assert describe_options(kind) in out
    _, *options = describe_options(kind).partition(f"{name} presets")[0].splitlines()
    assert len(options) == len(dataclasses.fields(kind.config_type))
    for line in options:
        assert len(line.strip().split("  ")) > 1, f"undocumented option: {line}"


def test_train_help_is_made_from_the_configs(capsys):
    with pytest.raises(SystemExit):
        main(["train", "offline.iql", "--help"])
    asked = capsys.readouterr().out
    assert "expectile=0.7" in asked
    assert "beta=2.0" not in asked
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    general = capsys.readouterr().out
    assert all(name in general for name in algorithms())


def test_train_eval_report_and_resume(capsys, data, tmp_path):
    run_dir = str(tmp_path / "run")
    train = ["train", "offline.td3_bc", "--dataset", data, "--run-dir", run_dir, *TINY]
    status, out, err = run(
        capsys, *train, "--seeds", "0,3", "--steps", "6", "--eval-every", "3", "--eval-episodes", "1"
    )
    assert status == 0, err
    assert "seeds 0, 3" in out
    assert f"corollary train --resume {run_dir}" in out

    status, out, err = run(capsys, "train", "--resume", run_dir, "--steps", "9")
    assert status == 0, err
    agent = corollary.load_agent(f"{run_dir}/checkpoint")
    assert agent.step == 9
    assert agent.seeds == (0, 3)
    assert agent.config.hidden == (8, 8)

    result = tmp_path / "eval.json"
    status, out, err = run(capsys, "eval", run_dir, "--episodes", "2", "--json", str(result))
    assert status == 0, err
    assert np.shape(json.loads(result.read_text())["returns"]) == (2, 2)

    page = tmp_path / "report.html"
    status, out, err = run(capsys, "report", run_dir, "--out", str(page))
    assert status == 0, err
    assert "<html" in page.read_text()


def test_online_train_eval_report_and_resume(capsys, tmp_path):
    run_dir = str(tmp_path / "run")
    train = ["train", "online.ppo", "--env", "CartPole-v1", "--run-dir", run_dir, *ONLINE]
    status, out, err = run(capsys, *train, "--seeds", "0,3", "--steps", "32")
    assert status == 0, err
    assert "environment CartPole-v1, 2 per seed (sync)" in out
    assert "32 environment steps per seed, seeds 0, 3" in out
    assert "1 episodes in CartPole-v1 every 50000 steps" in out
    assert f"corollary train --resume {run_dir}" in out

    status, out, err = run(capsys, "train", "--resume", run_dir, "--steps", "48")
    assert status == 0, err
    agent = corollary.load_agent(f"{run_dir}/checkpoint")
    assert (agent.step, agent.seeds, agent.config.n_envs) == (48, (0, 3), 2)
    status, out, err = run(capsys, "train", "--resume", run_dir)  # to the 48 steps it was raised to
    assert status == 0, err
    assert "48 environment steps per seed" in out
    status, _, err = run(capsys, "train", "--resume", run_dir, "--env", "Acrobot-v1")
    assert (status, "not env" in err) == (1, True)

    for path in (run_dir, f"{run_dir}/checkpoint"):
        result = tmp_path / "eval.json"
        status, out, err = run(capsys, "eval", path, "--episodes", "2", "--json", str(result))
        assert status == 0, err
        assert np.shape(json.loads(result.read_text())["returns"]) == (2, 2)

    page = tmp_path / "report.html"
    status, out, err = run(capsys, "report", run_dir, "--out", str(page))
    assert status == 0, err
    assert "CartPole-v1" in page.read_text()


@pytest.mark.parametrize(("asked", "evaluated"), [("none", None), ("Shining/Lamp-v0", "Shining/Lamp-v0")])
def test_online_evaluation_is_where_asked(capsys, tmp_path, lamp, asked, evaluated):
    run_dir = tmp_path / "run"
    train = ["train", "online.ppo", "--env", "Pendulum-v1", "--eval-env", asked, "--run-dir", str(run_dir), *ONLINE]
    status, _, err = run(capsys, *train, "--steps", "16")
    assert status == 0, err
    lines = (run_dir / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["env_id"] for line in lines] == ([] if evaluated is None else [evaluated])
    assert main(["report", str(run_dir), "--out", str(tmp_path / "report.html")]) == 0
    assert "is not finite" not in (tmp_path / "report.html").read_text()  # though no episode ended before the log


def test_a_slash_in_an_environments_name_makes_no_folder(capsys, tmp_path, monkeypatch, lamp):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "online.ppo", "--env", lamp, "--steps", "16", *ONLINE]) == 0
    (made,) = Path("runs").iterdir()
    assert made.name.startswith("online.ppo-Shining-Lamp-v0-")


def test_progress_shows_return_divergence_and_speed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    corollary.online.PPO("CartPole-v1", n_steps=64, hidden=(8,)).learn(64, eval_env="CartPole-v1", progress=True)
    assert re.search(r"return \d+\.\d  KL \d\S*  SPS \d+  evaluated return \d+\.\d\s", capsys.readouterr().err)
    corollary.online.SAC("Pendulum-v1", hidden=(8,), learning_starts=190).learn(200, progress=True)
    assert re.search(r"return -\d+\.\d  SPS \d+\s", capsys.readouterr().err)


class Lamp(gymnasium.Env):
    """Pendulum's spaces; four steps of reward 1; a picture whose shade is 60 times the steps taken."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012
    observation_space = gymnasium.spaces.Box(
        np.array([-1, -1, -8], np.float32), np.array([1, 1, 8], np.float32), dtype=np.float32
    )
    action_space = gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.zeros(3, np.float32), 1.0, self.t == 4, False, {}

    def render(self):
        return np.full((8, 8, 3), 60 * self.t, np.uint8)


@pytest.fixture
def lamp():
    gymnasium.register("Shining/Lamp-v0", Lamp)
    yield "Shining/Lamp-v0"
    del gymnasium.registry["Shining/Lamp-v0"]


@pytest.mark.parametrize("algorithm", ["offline.bc", "online.ppo"])
def test_play_writes_what_a_run_does(capsys, data, tmp_path, lamp, algorithm):
    run_dir = str(tmp_path / "run")
    task = ["--dataset", data, "--env", "none", *TINY] if algorithm == "offline.bc" else ["--env", lamp, *ONLINE]
    assert main(["train", algorithm, *task, "--steps", "16", "--seeds", "2", "--run-dir", run_dir]) == 0
    capsys.readouterr()
    gif = tmp_path / "a" / "rollout.gif"
    where = ["--env", lamp] if algorithm == "offline.bc" else []
    play = ["play", run_dir, *where, "--out", str(gif), "--seed-index", "1", "--stochastic"]
    status, out, err = run(capsys, *play, "--episodes", "2")
    assert status == 0, err
    assert out == f"episode 1: return 4.0\nepisode 2: return 4.0\n{gif}\n"
    with Image.open(gif) as image:
        assert image.n_frames == 2 * (4 + 1)
    status, out, err = run(capsys, *play, "--max-steps", "2")
    assert status == 0, err
    assert out.startswith("episode 1: return 2.0\n")

    for wrong, says in (
        (["--seed-index", "2"], "no seed index 2"),
        (["--out", "rollout.avi"], ".gif or .mp4"),
        (["--env", "NoSuch-v0"], "NoSuch"),
        (["--episodes", "0"], "at least one episode"),
    ):
        status, _, err = run(capsys, *play, *wrong)
        assert status == 1
        assert says in err
        assert err.count("\n") == 1


def test_resume_refuses_other_settings(capsys, data, tmp_path):
    run_dir = str(tmp_path / "run")
    assert (
        main(["train", "offline.bc", "--dataset", data, "--run-dir", run_dir, "--steps", "2", "--env", "none", *TINY])
        == 0
    )
    status, _, err = run(capsys, "train", "--resume", run_dir, "--seeds", "4")
    assert status == 1
    assert "seeds" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "offline.prcd"], "offline.prdc"),
        (["train", "offline.prdc", "--set", "bta=2"], "'beta'"),
        (["train", "offline.prdc", "--set", "beta=two"], "beta"),
        (["train", "offline.prdc", "--set", "beta=-1"], "beta must be >= 0"),
        (["train", "offline.prdc", "--preset", "halfchetah"], "halfcheetah"),
        (["train", "offline.prdc", "--seeds", "many"], "--seeds"),
        (["train", "offline.prdc", "--env", "CartPole-v1"], "CartPole-v1"),
        (["train", "offline.prdc", "--env", "NoSuch-v0"], "NoSuch"),
        (["train", "offline.prdc", "--eval-env", "CartPole-v1"], "offline.prdc evaluates in --env"),
        (["train", "online.ppo", "--env", "CartPole-v1"], "drop --dataset"),
        (["train", "offline.prdc", "--device", "gpu"], "The device 'gpu' cannot be used here"),
        (["train", "offline.prdc", "--threads", "0"], "--threads must be at least 1"),
        (["algorithms", "offline.tdbc"], "offline.td3_bc"),
        (["algorithms", "PRDC"], "offline.prdc"),
        (["check", "--list", "--json", "checks.json"], "--list runs nothing"),
    ],
)
def test_a_user_error_is_one_sentence_and_status_one(capsys, data, tmp_path, arguments, says):
    if arguments[0] == "train":
        arguments = [*arguments, "--dataset", data, "--run-dir", str(tmp_path / "run"), "--steps", "2"]
    status, _, err = run(capsys, *arguments)
    assert status == 1
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train"], "needs an algorithm"),
        (["train", "online.ppo"], "online.ppo learns from an environment: give --env"),
        (["train", "online.ppo", "--env", "NoSuch-v0"], "NoSuch"),
        (["train", "online.ppo", "--env", "CartPole-v1", "--eval-env", "Acrobot-v1"], "Acrobot-v1"),
        (["train", "online.ppo", "--env", "CartPole-v1", "--eval-env", "NoSuch-v0"], "NoSuch"),
        (["train", "online.ppo", "--env", "CartPole-v1", "--set", "n_evns=2"], "'n_envs'"),
        (["train", "online.sac", "--env", "CartPole-v1"], "needs continuous actions"),
        (["train", "offline.bc"], "offline.bc learns from data: give --dataset"),
        (["train", "offline.bc", "--env", "Pendulum-v1"], "offline.bc learns from data: give --dataset"),
    ],
)
def test_a_task_of_the_wrong_kind_is_one_sentence(capsys, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *arguments)
    assert status == 1
    assert says in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_files_where_folders_must_be_are_one_sentence(capsys, data, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    train = ["train", "offline.bc", "--dataset", data, "--env", "none", "--steps", "2", *TINY]
    for arguments, says in (
        ([*train, "--run-dir", str(file)], "is a file: choose a folder"),
        (["data", "convert", data, str(file / "copy.hdf5")], "File exists"),
    ):
        status, _, err = run(capsys, *arguments)
        assert status == 1
        assert says in err
        assert err.count("\n") == 1
    assert file.read_text() == "mine"


def test_missing_folders_are_made_and_runs_without_scores_say_so(capsys, data, tmp_path):
    run_dir, result = str(tmp_path / "run"), tmp_path / "a" / "eval.json"
    train = ["train", "offline.bc", "--dataset", data, "--run-dir", run_dir, "--steps", "2", *TINY]
    status, out, err = run(capsys, *train, "--env", "none")
    assert status == 0, err
    assert "No evaluations, hence no scores: train with an evaluation environment" in out
    assert main(["eval", run_dir, "--episodes", "1", "--json", str(result)]) == 0
    assert json.loads(result.read_text())["env_id"] == "Pendulum-v1"
    assert main(["data", "convert", data, str(tmp_path / "b" / "copy.hdf5")]) == 0
    status, _, err = run(capsys, "train", "--resume", run_dir, "--run-dir", str(tmp_path / "other"))
    assert (status, "drop --run-dir" in err) == (1, True)


def test_report_goes_on_without_a_damaged_run(capsys, data, tmp_path):
    for name in ("one", "two"):
        run_dir = str(tmp_path / "runs" / name)
        assert main(["train", "offline.bc", "--dataset", data, "--run-dir", run_dir, "--steps", "2", *TINY]) == 0
    (tmp_path / "runs" / "two" / "run.json").write_text("{")
    capsys.readouterr()
    status, out, err = run(capsys, "report", str(tmp_path / "runs"), "--out", str(tmp_path / "report.html"))
    assert status == 0
    assert "two is left out: " in err
    assert "offline.bc" in out


REGISTERING = """
import gymnasium
from corollary.theory_checks.environment import TabularEnv
from corollary.theory_checks.families import combination_lock
gymnasium.register("Lock-v0", lambda: TabularEnv(combination_lock(3, 0.2)), max_episode_steps=9)
"""


def test_an_environment_that_its_module_registers_is_found_again(capsys, tmp_path, monkeypatch):
    (tmp_path / "registering_lock.py").write_text(REGISTERING)
    monkeypatch.syspath_prepend(tmp_path)
    run_dir, env = tmp_path / "run", "registering_lock:Lock-v0"

    def forget():  # as a new process would have
        gymnasium.registry.pop("Lock-v0", None)
        sys.modules.pop("registering_lock", None)

    try:
        assert main(["train", "online.ppo", "--env", env, "--run-dir", str(run_dir), "--steps", "16", *ONLINE]) == 0
        (line,) = (run_dir / "evaluations.jsonl").read_text().splitlines()
        assert json.loads(line)["env_id"] == env
        forget()
        assert main(["eval", str(run_dir), "--episodes", "1"]) == 0
        forget()
        agent = corollary.load_agent(run_dir / "checkpoint")
        assert agent.problem.env_id == env
        agent.learn(16)
        forget()
        recorded = collect(env, n_steps=5)
        assert recorded.info.env_id == env
    finally:
        forget()


def test_unknown_dataset_and_missing_run(capsys, tmp_path):
    for arguments in (
        ["data", "info", "halfcheetah-medium-repay-v5"],
        ["eval", str(tmp_path)],
        ["report", str(tmp_path)],
    ):
        status, _, err = run(capsys, *arguments)
        assert status == 1
        assert err.startswith("corollary: ")


def test_data_info_compares_with_a_reference(capsys, data):
    status, out, err = run(capsys, "data", "info", data, "--json")
    assert status == 0, err
    alone = json.loads(out)
    dataset = Dataset.load(data)
    assert alone["trajectory_quality"] == pytest.approx((dataset.episode_returns().mean() + 1500) / 1500)
    assert alone["coverage"]["occupied cells"] == 60  # every random row has a cell of its own
    assert alone["saco"] is None
    _, out, _ = run(capsys, "data", "info", data, "--reference", data, "--json")
    assert json.loads(out)["saco"] == {"value": 1.0, "rows": 60, "reference rows": 60}
    _, out, _ = run(capsys, "data", "info", data, "--reference", data)
    assert "value 1, rows 60, reference rows 60" in out
    status, _, err = run(capsys, "data", "info", data, "--reference", "halfcheetah-medium-replay-v5")
    assert (status, "take a reference of the same task" in err) == (1, True)


def test_train_says_what_the_data_can_teach_before_it_begins(capsys, data, tmp_path):
    run_dir = tmp_path / "run"
    train = ["train", "offline.bc", "--dataset", data, "--env", "none", "--steps", "2", *TINY]
    weighted = ["--set", "sampling=return", "--set", "sampling_per=trajectory", "--set", "weighting=loss"]
    status, out, err = run(capsys, *train, *weighted, "--run-dir", str(run_dir))
    assert status == 0, err
    size = json.loads((run_dir / "run.json").read_text())["effective_sample_size"]
    assert 20 < size < 60
    assert f"rows by return per trajectory, temperature 0.1: effective sample size {size:.0f} of 60 rows" in out
    _, out, _ = run(capsys, *train, "--run-dir", str(tmp_path / "uniform"))
    assert "rows drawn uniformly: effective sample size 60 of 60 rows" in out
    assert re.search(r"^quality +[\d.]+ \(random policy 0, expert 1\)$", out, re.MULTILINE)
    assert "coverage    60 cells, effectively 60" in out
    status, _, err = run(capsys, *train, "--set", "sampling=advantage", "--run-dir", str(tmp_path / "no"))
    assert (status, "or more episodes" in err) == (1, True)  # three episodes, a plane through three first states


def test_cdsa_corrects_a_run(capsys, data, tmp_path):
    train = ["train", "--dataset", data, "--env", "none", "--steps", "2", *TINY]
    base, run_dir = str(tmp_path / "base"), tmp_path / "run"
    assert run(capsys, *train, "offline.td3_bc", "--run-dir", base)[0] == 0
    status, out, err = run(capsys, *train, "offline.cdsa", "--base", base, "--run-dir", str(run_dir))
    assert status == 0, err
    assert re.search(f"^base +{re.escape(base)}$", out, re.MULTILINE)
    assert json.loads((run_dir / "run.json").read_text())["base"]["algorithm"] == "offline.td3_bc"
    assert run(capsys, "train", "--resume", str(run_dir), "--steps", "3")[0] == 0
    status, _, err = run(capsys, *train, "offline.bc", "--base", base)
    assert (status, "offline.bc corrects no other agent: drop --base" in err) == (1, True)


def test_an_environment_that_cannot_be_made_is_no_obstacle(capsys, data, tmp_path):
    """D4RL's sets name Hopper-v2, which gymnasium still lists and cannot make."""
    dataset = corollary.load_dataset(data)
    info = dataclasses.replace(dataset.info, env_id="Hopper-v2")
    old = str(dataclasses.replace(dataset, info=info).save(tmp_path / "old.hdf5"))
    train = ["train", "offline.bc", "--dataset", old, "--steps", "3", "--seeds", "7,", *TINY]
    status, out, err = run(capsys, *train, "--save-every", "2", "--run-dir", str(tmp_path / "run"))
    assert status == 0, err
    assert "Hopper-v2 cannot be made here, so nothing is evaluated: give another with --env" in out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["seeds"] == [7]


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "corollary", "data", "list"], capture_output=True, text=True)
    assert "halfcheetah-medium-replay-v5" in done.stdout
    assert done.returncode == 0


def test_data_list_info_convert(capsys, data, tmp_path):
    status, out, _ = run(capsys, "data", "list")
    assert status == 0
    assert "hopper-medium-v2" in out
    status, out, _ = run(capsys, "data", "info", data, "--json")
    assert json.loads(out)["rows"] == 60
    status, out, _ = run(capsys, "data", "info", data)
    assert status == 0
    assert "trajectory quality" in out
    assert re.search(r"saco\s+-", out)
    assert re.search(r"effective sample size\s+uniform 60, return \d+\.\d+, advantage -", out)
    copy = tmp_path / "copy.hdf5"
    assert main(["data", "convert", data, str(copy)]) == 0
    assert corollary.load_dataset(copy).fingerprint == corollary.load_dataset(data).fingerprint
