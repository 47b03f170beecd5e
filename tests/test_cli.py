"""The command line, run in process on a small dataset of a real environment."""

import json

import numpy as np
import pytest

import corollary
from corollary.cli import describe_options, main
from corollary.core.agent import algorithms
from corollary.core.dataset import Dataset, DatasetInfo

TINY = ["--set", "hidden=8,8", "--set", "batch_size=16"]


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


def test_algorithms_lists_every_class(capsys):
    status, out, _ = run(capsys, "algorithms")
    assert status == 0
    assert all(name in out for name in algorithms())


@pytest.mark.parametrize("name", algorithms())
def test_options_of_an_algorithm_are_all_explained(capsys, name):
    kind = algorithms()[name]
    _, out, _ = run(capsys, "algorithms", name)
    assert describe_options(kind) in out
    for line in describe_options(kind).splitlines():
        if line.startswith("  ") and "=" in line.split("  ")[1]:
            assert len(line.strip().split("  ")) > 1, f"undocumented option: {line}"


def test_train_help_is_made_from_the_configs(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "expectile=0.7" in capsys.readouterr().out


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
        (["algorithms", "offline.tdbc"], "offline.td3_bc"),
    ],
)
def test_a_user_error_is_one_sentence_and_status_one(capsys, data, tmp_path, arguments, says):
    if arguments[0] == "train":
        arguments = [*arguments, "--dataset", data, "--run-dir", str(tmp_path / "run"), "--steps", "2"]
    status, _, err = run(capsys, *arguments)
    assert status == 1
    assert says in err
    assert err.count("\n") == 1


def test_unknown_dataset_and_missing_run(capsys, tmp_path):
    for arguments in (
        ["data", "info", "halfcheetah-medium-repay-v5"],
        ["eval", str(tmp_path)],
        ["report", str(tmp_path)],
    ):
        status, _, err = run(capsys, *arguments)
        assert status == 1
        assert err.startswith("corollary: ")


def test_data_list_info_convert(capsys, data, tmp_path):
    status, out, _ = run(capsys, "data", "list")
    assert status == 0
    assert "hopper-medium-v2" in out
    status, out, _ = run(capsys, "data", "info", data, "--json")
    assert json.loads(out)["rows"] == 60
    status, out, _ = run(capsys, "data", "info", data)
    assert status == 0
    copy = tmp_path / "copy.hdf5"
    assert main(["data", "convert", data, str(copy)]) == 0
    assert corollary.load_dataset(copy).fingerprint == corollary.load_dataset(data).fingerprint
