"""The run directory: what is written is read back; kills, resumption, damage; pooling of repetitions."""

import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corollary.core.errors import ConfigError, DataError
from corollary.core.evaluation import Evaluation
from corollary.core.runs import Run, RunWriter, find_runs, group_runs, scores_by_label, versions


def card(**changes: Any) -> dict[str, Any]:
    base = {
        "algorithm": "offline.td3_bc",
        "config": {"alpha": 2.5, "hidden": (256, 256)},
        "seeds": [0, 1],
        "precision": "float32",
        "n_steps": 100,
        "env_id": "Hopper-v5",
        "dataset": {"name": "hopper-medium", "fingerprint": "ab" * 32, "env_id": "Hopper-v5", "rows": 10,
                    "ref_min_score": 0.0, "ref_max_score": 1000.0},
        "versions": {"torch": "2.13"},
        "created": "2025-01-01T00:00:00Z",
    }  # fmt: skip
    return base | changes


def evaluation(scores_SE: Any, normalised: bool = True, env_id: str = "Hopper-v5") -> Evaluation:
    scores = np.asarray(scores_SE, dtype=np.float64)
    lengths = np.full(scores.shape, 7, dtype=np.int64)
    seeds = tuple(range(scores.shape[1]))
    return Evaluation(env_id, 10 * scores, lengths, seeds, scores if normalised else None)


def write(path: Path, scores_VS: Any, *, normalised: bool = True, env_id: str = "Hopper-v5", **changes: Any) -> Run:
    """A run with an evaluation of two episodes (score -1 and +1 about the mean) every ten steps."""
    scores = np.asarray(scores_VS, dtype=np.float64)
    with RunWriter(path, card(**{"seeds": list(range(scores.shape[1]))} | changes)) as writer:
        for v, scores_S in enumerate(scores):
            step = 10 * (v + 1)
            writer.log_metrics(step, step / 10, 100.0 + v, {"loss": np.arange(len(scores_S)) + v})
            writer.log_evaluation(step, step / 10, evaluation(scores_S[:, None] + [-1, 1], normalised, env_id))
    return Run.read(path)


# --- Round trip.


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [[10, 20], [30, 5], [25, 15]])
    assert run.algorithm == "offline.td3_bc"
    assert run.seeds == (0, 1)
    assert run.dataset == "hopper-medium"
    assert run.env_id == "Hopper-v5"
    assert run.card["config"] == {"alpha": 2.5, "hidden": [256, 256]}
    assert run.steps_L.tolist() == [10, 20, 30]
    assert run.seconds_L.tolist() == [1, 2, 3]
    assert run.steps_per_second_L.tolist() == [100, 101, 102]
    assert run.metrics["loss"].tolist() == [[0, 1], [1, 2], [2, 3]]
    record = run.evaluations[1]
    assert (record.step, record.seconds) == (20, 2.0)
    assert record.evaluation.returns_SE.tolist() == [[290, 310], [40, 60]]
    assert record.evaluation.lengths_SE.dtype == np.int64
    assert record.evaluation.episode_seeds == (0, 1)


def test_scores_of_seeds_are_means_over_their_episodes(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [[10, 20], [30, 5], [25, 15]])
    steps_V, values_VS = run.curve()
    assert steps_V.tolist() == [10, 20, 30]
    assert values_VS.tolist() == [[10, 20], [30, 5], [25, 15]]
    assert run.last_scores().tolist() == [25, 15]
    assert run.best_scores().tolist() == [30, 20]  # of different evaluations
    assert run.score_name == "normalised score"


def test_without_references_scores_are_returns(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [[10, 20]], normalised=False)
    assert run.score_name == "return"
    assert run.last_scores().tolist() == [100, 200]
    assert run.evaluations[0].evaluation.scores_SE is None


def test_metrics_may_be_numbers_lists_or_arrays_and_come_and_go(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run", card()) as writer:
        writer.log_metrics(1, 0, 1, {"number": 3, "list": [1, 2], "array": np.float32([0.5, 0.25])})
        writer.log_metrics(2, 0, 1, {"list": [3, 4]})
    run = Run.read(tmp_path / "run")
    assert run.metrics["number"][0].tolist() == [3, 3]  # shared by the seeds
    assert run.metrics["array"][0].tolist() == [0.5, 0.25]
    assert np.isnan(run.metrics["number"][1]).all()
    assert run.logged["number"].tolist() == [True, False]
    assert run.logged["list"].tolist() == [True, True]


def test_numbers_that_are_not_finite_survive_strict_json(tmp_path: Path) -> None:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    with RunWriter(tmp_path / "run", card(config={"clip": float("inf")})) as writer:
        writer.log_metrics(1, 0, 1, {"loss": [float("nan"), float("-inf")]})
    text = (tmp_path / "run/metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse)["metrics"]["loss"] == ["NaN", "-Infinity"]
    run = Run.read(tmp_path / "run")
    assert run.card["config"]["clip"] == "Infinity"
    np.testing.assert_array_equal(run.metrics["loss"], [[np.nan, -np.inf]])
    assert run.logged["loss"].tolist() == [True]


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run", card()) as writer:
        writer.log_metrics(1, 0, 1, {"loss": 0})
        assert Run.read(tmp_path / "run").steps_L.tolist() == [1]
        writer.log_evaluation(1, 0, evaluation([[1.0], [2.0]]))
        assert Run.read(tmp_path / "run").last_scores().tolist() == [1, 2]


def test_an_empty_run_is_readable_and_has_no_scores(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run", card()).close()
    run = Run.read(tmp_path / "run")
    assert run.last_step == 0
    assert run.env_id == "Hopper-v5"
    assert run.score_name == "normalised score"
    with pytest.raises(DataError, match="no evaluations: train with an evaluation environment"):
        run.last_scores()


@pytest.mark.parametrize("metrics", [{"loss": [1, 2, 3]}, {"loss": [[1], [2]]}])
def test_metrics_of_another_shape_are_refused(tmp_path: Path, metrics: dict[str, Any]) -> None:
    with RunWriter(tmp_path / "run", card()) as writer, pytest.raises(DataError, match="'loss' has shape"):
        writer.log_metrics(1, 0, 1, metrics)


def test_evaluations_of_another_shape_are_refused(tmp_path: Path) -> None:
    with (
        RunWriter(tmp_path / "run", card()) as writer,
        pytest.raises(DataError, match=r"\(seeds, episodes\) = \(2, 1\)"),
    ):
        writer.log_evaluation(1, 0, evaluation([[1.0]]))


@pytest.mark.parametrize(
    ("bad", "says"),
    [({"algorithm": "x", "config": {}}, "lacks seeds"), (card(config={"f": object()}), "plain JSON data")],
)
def test_bad_cards_are_refused(tmp_path: Path, bad: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        RunWriter(tmp_path / "run", bad)
    assert not (tmp_path / "run").exists()


# --- Kills and resumption.


def steps_of(path: Path) -> tuple[list[int], list[int]]:
    run = Run.read(path)
    return run.steps_L.tolist(), [record.step for record in run.evaluations]


def test_an_existing_run_is_never_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "run", [[1, 2]])
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").glob("*.json*")}
    with pytest.raises(ConfigError, match="already holds a run: continue it by resuming, or choose another"):
        RunWriter(tmp_path / "run", card())
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").glob("*.json*")} == before


def test_a_folder_with_other_files_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    RunWriter(tmp_path, card()).close()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_resumed_files_equal_those_of_a_run_that_never_stopped(tmp_path: Path) -> None:
    scores = [[10, 20], [30, 5], [25, 15], [40, 50]]
    write(tmp_path / "straight", scores)
    write(tmp_path / "killed", scores[:3])  # the checkpoint is of step 20, the logs go to 30
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        with (tmp_path / "killed" / name).open("ab") as file:
            file.write(b'{"step": 40, "seconds": 3.')  # and the kill came in the middle of a line
    assert steps_of(tmp_path / "killed") == ([10, 20, 30], [10, 20, 30])  # readers ignore it
    with RunWriter(tmp_path / "killed", card(), resume_step=20) as writer:
        assert steps_of(tmp_path / "killed") == ([10, 20], [10, 20])
        for v in (2, 3):
            step = 10 * (v + 1)
            writer.log_metrics(step, v - 1, 100.0 + v, {"loss": np.arange(2) + v})  # seconds start anew
            writer.log_evaluation(step, v - 1, evaluation(np.array(scores[v])[:, None] + [-1, 1]))
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_a_complete_last_line_without_newline_counts(tmp_path: Path) -> None:
    write(tmp_path / "run", [[1, 2], [3, 4]])
    file = tmp_path / "run/evaluations.jsonl"
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    assert steps_of(tmp_path / "run")[1] == [10, 20]
    RunWriter(tmp_path / "run", card(), resume_step=20).close()
    assert file.read_bytes().endswith(b"}\n")


def test_resuming_at_zero_starts_over(tmp_path: Path) -> None:
    write(tmp_path / "run", [[1, 2], [3, 4]])
    RunWriter(tmp_path / "run", card(), resume_step=0).close()
    assert steps_of(tmp_path / "run") == ([], [])


def test_resuming_keeps_the_card_and_tells_of_it(tmp_path: Path) -> None:
    write(tmp_path / "run", [[1, 2]])
    later = card(created="2026-02-02T00:00:00Z", versions={"torch": "3.0"}, n_steps=500)
    RunWriter(tmp_path / "run", later, resume_step=10).close()
    RunWriter(tmp_path / "run", later, resume_step=10).close()
    read = Run.read(tmp_path / "run").card
    assert read["created"] == "2025-01-01T00:00:00Z"
    assert read["versions"] == {"torch": "2.13"}
    assert read["n_steps"] == 500  # the aim may be raised
    assert read["resumed"] == 2 * [{"step": 10, "created": "2026-02-02T00:00:00Z", "versions": {"torch": "3.0"}}]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"algorithm": "offline.iql"}, "algorithm is 'offline.td3_bc', not 'offline.iql'"),
        ({"config": {"alpha": 1.0, "hidden": [256, 256]}}, "config.alpha is 2.5, not 1.0"),
        ({"config": {"alpha": 2.5, "hidden": [256, 256], "new": 1}}, "config.new is None, not 1"),
        ({"config": {"alpha": 2.5, "hidden": [256, 256], "new": None}}, "config lacks new, as that of another version"),
        ({"seeds": [0, 2]}, r"seeds is \[0, 1\], not \[0, 2\]"),
        ({"precision": "float64"}, "precision"),
        ({"dataset": {"name": "hopper-medium", "fingerprint": "cd" * 32}}, "dataset.fingerprint"),
    ],
)
def test_another_run_is_not_resumed(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    write(tmp_path / "run", [[1, 2]])
    with pytest.raises(ConfigError, match=says):
        RunWriter(tmp_path / "run", card(**change), resume_step=10)
    assert steps_of(tmp_path / "run") == ([10], [10])


def test_resuming_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run directory"):
        RunWriter(tmp_path / "run", card(), resume_step=10)


# --- Damage.


def test_a_folder_without_card_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no run\.json"):
        Run.read(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "3", '{"algorithm": "x"}', "\udcff"),
        '{"algorithm": "x", "config": {}, "seeds": 3}',
        '{"algorithm": "x", "config": {}, "seeds": []}',
        '{"algorithm": "x", "config": [], "seeds": [0]}',
        '{"algorithm": "x", "config": {}, "seeds": [0], "dataset": "hopper"}',
        '{"algorithm": "x", "config": {}, "seeds": [0], "resumed": 3}',
        '{"algorithm": "x", "config": {}, "seeds": [0], "resumed": [{"step": "1"}]}',
    ],
)
def test_a_damaged_card_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"run\.json is (damaged|no run card)"):
        Run.read(tmp_path)


@pytest.mark.parametrize("file", ["metrics.jsonl", "evaluations.jsonl"])
@pytest.mark.parametrize(
    "line",
    [b"{half", b"3", b"[]", b'{"no": "step"}', b'{"step": "x"}', b'{"step": 5}', b'{"step": 5, "metrics": 3}', b"\xff"],
)
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, file: str, line: bytes) -> None:
    write(tmp_path / "run", [[1, 2], [3, 4], [5, 6]])
    path = tmp_path / "run" / file
    lines = path.read_bytes().split(b"\n")
    lines[1] = line
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=rf"{file} line 2 "):
        Run.read(tmp_path / "run")


def test_a_line_of_other_seeds_is_named(tmp_path: Path) -> None:
    write(tmp_path / "run", [[1, 2]])
    (tmp_path / "run/run.json").write_text(json.dumps(card(seeds=[0, 1, 2])))
    with pytest.raises(DataError, match=r"metrics\.jsonl line 1 is damaged"):
        Run.read(tmp_path / "run")


# --- Finding.


def test_runs_are_found_below_folders_once_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/two", "a/one", "b/one"):
        write(tmp_path / name, [[1.0]])
    found = find_runs([tmp_path / "b", tmp_path, tmp_path / "a" / "one"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["b/one", "b/two", "a/one"]
    assert find_runs(tmp_path / "a/one") == [tmp_path / "a/one"]
    monkeypatch.chdir(tmp_path)
    assert find_runs("b") == [Path("b/one"), Path("b/two")]


def test_nothing_to_find_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        find_runs(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no run under"):
        find_runs([tmp_path])


# --- Pooling.


def test_repetitions_are_pooled_over_directories(tmp_path: Path) -> None:
    one = write(tmp_path / "one", [[1, 2], [3, 4]])
    two = write(tmp_path / "two", [[5], [6]], seeds=[7])
    (group,) = group_runs([one, two])
    assert (group.label, group.task) == ("offline.td3_bc", "hopper-medium")
    assert group.last_scores().tolist() == [3, 4, 6]
    steps_V, values_VR = group.curve()
    assert steps_V.tolist() == [10, 20]
    assert values_VR.tolist() == [[1, 2, 5], [3, 4, 6]]


def test_curves_of_a_group_use_the_steps_that_all_runs_have(tmp_path: Path) -> None:
    one = write(tmp_path / "one", [[1], [2], [3]])
    two = write(tmp_path / "two", [[4], [5]], seeds=[7])
    (group,) = group_runs([one, two])
    assert group.curve()[0].tolist() == [10, 20]
    assert group.curve()[1].tolist() == [[1, 4], [2, 5]]
    assert group.last_scores().tolist() == [3, 5]


def test_a_seed_counts_once_and_the_longer_run_is_kept(tmp_path: Path) -> None:
    short = write(tmp_path / "a", [[1, 2]])
    long = write(tmp_path / "b", [[3, 4, 5], [6, 7, 8]])
    (group,) = group_runs([short, long])
    assert group.last_scores().tolist() == [6, 7, 8]
    assert [(run.path.name, column) for run, column in group.repeated] == [("a", 0), ("a", 1)]


def test_other_options_are_other_variants_named_by_what_differs(tmp_path: Path) -> None:
    weak = write(tmp_path / "a", [[1]], config={"alpha": 1.0, "hidden": [8]})
    strong = write(tmp_path / "b", [[2]], config={"alpha": 2.5, "hidden": [8]})
    half = write(tmp_path / "c", [[3]], config={"alpha": 2.5, "hidden": [8]}, precision="bf16")
    labels = [group.label for group in group_runs([weak, strong, half])]
    assert labels == [
        "offline.td3_bc (alpha=1.0, precision=float32)",
        "offline.td3_bc (alpha=2.5, precision=bf16)",
        "offline.td3_bc (alpha=2.5, precision=float32)",
    ]


def test_options_that_differ_only_between_datasets_do_not_split_an_algorithm(tmp_path: Path) -> None:
    other = card()["dataset"] | {"name": "hopper-expert", "fingerprint": "cd" * 32}
    one = write(tmp_path / "a", [[1]], config={"beta": 2.0})
    two = write(tmp_path / "b", [[2]], config={"beta": 5.0}, dataset=other)
    assert [(g.label, g.task) for g in group_runs([one, two])] == [
        ("offline.td3_bc", "hopper-expert"),
        ("offline.td3_bc", "hopper-medium"),
    ]


@pytest.mark.parametrize(
    "other",
    [
        {"dataset": card()["dataset"] | {"fingerprint": "cd" * 32}},
        {"dataset": card()["dataset"] | {"ref_max_score": 2000.0}},
        {"env_id": "Hopper-v4"},
        {"normalised": False},
    ],
)
def test_one_dataset_name_for_different_tasks_is_not_pooled(tmp_path: Path, other: dict[str, Any]) -> None:
    one = write(tmp_path / "a", [[1.0]])
    two = write(tmp_path / "b", [[2.0]], **other)
    groups = group_runs([one, two])
    assert len(groups) == 2
    assert all(group.task.startswith("hopper-medium (") for group in groups)
    assert len({group.task for group in groups}) == 2


def test_scores_by_label_covers_the_common_tasks(tmp_path: Path) -> None:
    other = card()["dataset"] | {"name": "hopper-expert", "fingerprint": "cd" * 32}
    runs = [
        write(tmp_path / "a", [[1, 2]]),
        write(tmp_path / "b", [[3]], dataset=other),
        write(tmp_path / "c", [[4, 5]], algorithm="offline.iql"),
        write(tmp_path / "d", np.zeros((0, 1)), algorithm="offline.bc"),  # no evaluations: not there
    ]
    scores = scores_by_label(group_runs(runs))
    assert {label: {task: v.tolist() for task, v in by.items()} for label, by in scores.items()} == {
        "offline.td3_bc": {"hopper-medium": [1, 2]},
        "offline.iql": {"hopper-medium": [4, 5]},
    }
    assert scores_by_label([]) == {}


# --- Versions and TensorBoard.


def test_versions_name_software_and_processors_but_not_the_machine() -> None:
    found = versions()
    assert found["numpy"] == np.__version__
    assert {"python", "corollary", "torch", "gymnasium", "mujoco", "cpu", "gpu", "threads"} <= set(found)
    assert all(isinstance(value, str) and value for value in found.values())
    assert platform.node() not in found.values()
    json.dumps(found)


def test_without_tensorboard_nothing_is_mirrored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = write(tmp_path / "run", [[1, 2]])
    assert run.last_scores().tolist() == [1, 2]
    assert not (tmp_path / "run/tensorboard").exists()


def test_scalars_are_mirrored_per_seed(tmp_path: Path) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write(tmp_path / "run", [[1, 2], [3, 4]])
    seen = loading.EventAccumulator(str(tmp_path / "run/tensorboard/seed_1")).Reload()
    assert [(event.step, event.value) for event in seen.Scalars("loss")] == [(10, 1), (20, 2)]
    assert [event.value for event in seen.Scalars("evaluation/score")] == [2, 4]
    assert [event.value for event in seen.Scalars("evaluation/return")] == [20, 40]
