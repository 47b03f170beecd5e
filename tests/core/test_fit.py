"""The training loop: exact counts, averages, evaluations that change nothing, and runs that stop and go on."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from corollary.core import checkpoint
from corollary.core.dataset import Dataset
from corollary.core.errors import CheckpointError, ConfigError, CorollaryError, DataError, EnvironmentMismatchError
from corollary.core.loop import Report
from corollary.core.runs import Run
from corollary.offline import BC, CDSA, IQL, TD3BC

SMALL: dict[str, Any] = {"hidden": (16, 16), "batch_size": 8}
SEEDS = [4, 9]


def small(**options: Any) -> TD3BC:
    return TD3BC(SEEDS, **SMALL | options)


def bits(agent: TD3BC, folder: Path) -> dict[str, torch.Tensor]:
    """Everything a checkpoint holds: networks, targets, optimisers."""
    return checkpoint.read(agent.save(folder / "bits"))[1]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


class Recorder:
    """A callback that keeps its reports and asks to stop at one step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.reports: list[Report] = []
        self.stop_at = stop_at

    def __call__(self, agent: TD3BC, report: Report) -> bool:
        assert agent.step == report.step
        self.reports.append(report)
        return report.step == self.stop_at

    def steps(self, evaluations: bool = False) -> list[int]:
        return [report.step for report in self.reports if (report.evaluation is not None) == evaluations]


# -- Steps and logs


@pytest.mark.parametrize("n_steps", [1, 7, 10])
def test_exactly_the_steps_asked_for(pendulum, n_steps) -> None:
    agent = small().fit(pendulum, n_steps, log_every=5)
    assert agent.step == n_steps
    for name, expected in (("critic", n_steps), ("actor", n_steps // 2)):  # a policy step every second one
        counts = {int(state["step"]) for state in agent.optimizers[name].state.values()}
        assert counts == ({expected} if expected else set())


def test_a_second_fit_goes_on_where_the_first_one_ended(pendulum, tmp_path) -> None:
    parts, whole = small().fit(pendulum, 5).fit(pendulum, 7), small().fit(pendulum, 12)
    assert parts.step == whole.step == 12
    assert equal(bits(parts, tmp_path), bits(whole, tmp_path))


def test_logs_come_at_every_interval_and_at_the_end(pendulum) -> None:
    recorder = Recorder()
    small().fit(pendulum, 12, log_every=5, callbacks=[recorder])
    assert recorder.steps() == [5, 10, 12]


def test_metrics_are_averages_over_the_interval_per_seed(pendulum) -> None:
    each, averaged = Recorder(), Recorder()
    small().fit(pendulum, 12, log_every=1, callbacks=[each])
    small().fit(pendulum, 12, log_every=5, callbacks=[averaged])
    for first, last, report in zip((0, 5, 10), (5, 10, 12), averaged.reports, strict=True):
        interval = [step.metrics for step in each.reports[first:last]]
        for name, values in report.metrics.items():
            reported = [metrics[name] for metrics in interval if name in metrics]
            assert values.shape == (2,)
            np.testing.assert_allclose(values, np.mean(reported, 0), rtol=1e-12)
    # The policy's metrics exist on every second step only, so their averages are over fewer updates.
    assert "critic_loss" in each.reports[0].metrics
    assert "policy_loss" not in each.reports[0].metrics
    assert "policy_loss" in averaged.reports[0].metrics


def test_callbacks_run_in_order_and_any_of_them_can_stop(pendulum, tmp_path) -> None:
    first, second = Recorder(stop_at=6), Recorder()
    agent = small().fit(pendulum, 100, log_every=3, callbacks=[first, second], run_dir=tmp_path / "run")
    assert agent.step == 6
    assert first.steps() == second.steps() == [3, 6]
    assert checkpoint.read(tmp_path / "run" / "checkpoint")[0]["step"] == 6


@pytest.mark.parametrize(("shown", "expected"), [(True, "offline.td3_bc (2 seeds)"), (False, ""), (None, "")])
def test_progress_shows_on_demand_and_is_silent_without_a_terminal(pendulum, capsys, shown, expected) -> None:
    small().fit(pendulum, 2, progress=shown)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected in captured.err
    assert bool(captured.err) == bool(expected)


# -- Evaluations


@pytest.mark.parametrize(("eval_every", "expected"), [(None, [10]), (4, [4, 8, 10]), (5, [5, 10])])
def test_evaluations_come_at_their_steps_and_at_the_end(pendulum, eval_every, expected) -> None:
    recorder = Recorder()
    small().fit(pendulum, 10, eval_env="Pendulum-v1", eval_every=eval_every, eval_episodes=1, callbacks=[recorder])
    assert recorder.steps(evaluations=True) == expected
    for report in recorder.reports:
        if report.evaluation is not None:
            assert report.metrics == {}
            assert report.evaluation.returns_SE.shape == (2, 1)


def test_watching_a_run_does_not_change_what_it_learns(pendulum, tmp_path) -> None:
    alone = small().fit(pendulum, 10)

    def look(agent: TD3BC, report: Report) -> None:
        agent.predict(pendulum.observations[:3], deterministic=False)
        torch.rand(1)  # the global generator has no say either

    watched = small().fit(
        pendulum, 10, eval_env="Pendulum-v1", eval_every=3, eval_episodes=1, log_every=2, save_every=4,
        run_dir=tmp_path / "run", callbacks=[look],
    )  # fmt: skip
    assert equal(bits(alone, tmp_path), bits(watched, tmp_path))
    other = TD3BC([4, 10], **SMALL).fit(pendulum, 10)
    assert not equal(bits(alone, tmp_path), bits(other, tmp_path))  # control


def test_an_environment_that_does_not_fit_is_refused_before_training(pendulum, tmp_path) -> None:
    agent = small()
    with pytest.raises(EnvironmentMismatchError, match="MountainCarContinuous-v0 has observation space"):
        agent.fit(pendulum, 10, eval_env="MountainCarContinuous-v0", run_dir=tmp_path / "run")
    assert agent.step == 0
    assert not (tmp_path / "run").exists()


# -- The run directory


def test_what_a_run_directory_holds(pendulum, tmp_path) -> None:
    agent = small().fit(
        pendulum, 10, eval_env="Pendulum-v1", eval_every=5, eval_episodes=2, log_every=4, run_dir=tmp_path / "run",
        command={"dataset": "pendulum"},
    )  # fmt: skip
    run = Run.read(tmp_path / "run")
    assert run.card["algorithm"] == "offline.td3_bc"
    assert run.card["seeds"] == SEEDS
    assert run.card["n_steps"] == 10
    assert run.card["config"]["hidden"] == [16, 16]
    assert run.card["command"] == {"dataset": "pendulum"}
    assert run.card["dataset"]["fingerprint"] == pendulum.fingerprint
    assert run.card["transforms"]["state"]["mean"] == pytest.approx(
        pendulum.transitions().obs.double().mean(0).tolist()
    )
    assert run.steps_L.tolist() == [4, 8, 10]
    assert run.metrics["critic_loss"].shape == (3, 2)
    assert [record.step for record in run.evaluations] == [5, 10]
    assert run.evaluations[0].evaluation.returns_SE.shape == (2, 2)
    loaded = TD3BC.load(tmp_path / "run" / "checkpoint")
    assert equal(bits(loaded, tmp_path), bits(agent, tmp_path))


@pytest.mark.parametrize(
    ("save_every", "eval_every", "expected"),
    [(None, None, [4, 8, 10]), (None, 4, [4, 8, 10]), (3, 4, [3, 6, 9, 10]), (100, 4, [10])],
)
def test_checkpoints_come_when_asked_for(pendulum, tmp_path, monkeypatch, save_every, eval_every, expected) -> None:
    saved = []
    monkeypatch.setattr("corollary.core.loop.SAVE_EVERY", 4)
    monkeypatch.setattr(TD3BC, "save", lambda agent, path: saved.append(agent.step))
    small().fit(
        pendulum, 10, eval_env="Pendulum-v1", eval_every=eval_every, eval_episodes=1, save_every=save_every,
        run_dir=tmp_path / "run",
    )  # fmt: skip
    assert saved == expected


def test_a_run_directory_is_not_overwritten(pendulum, tmp_path) -> None:
    small().fit(pendulum, 2, run_dir=tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="already holds a run: continue it by resuming, or choose another"):
        small().fit(pendulum, 2, run_dir=tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


# -- Stopping and going on

STOPPED_RUNS = """
import os, signal, sys
from corollary.core.dataset import Dataset
from corollary.offline import TD3BC

dataset, root = Dataset.load(sys.argv[1]), sys.argv[2]
for name in sys.argv[3:]:
    child = os.fork()
    if child == 0:
        def stop(agent, report):
            if report.step == 6 and report.evaluation is None:
                os.kill(os.getpid(), getattr(signal, name))
        agent = TD3BC([4, 9], hidden=(16, 16), batch_size=8)
        agent.fit(dataset, 12, run_dir=f"{root}/{name}", save_every=4, log_every=2, callbacks=[stop],
                  eval_env="Pendulum-v1", eval_every=2, eval_episodes=1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def stopped(pendulum, tmp_path_factory) -> Path:
    """Runs of 12 steps stopped by a signal while step 6 is being logged; checkpoints are due at 4, 8 and 12."""
    root = tmp_path_factory.mktemp("stopped")
    script = [sys.executable, "-c", STOPPED_RUNS, pendulum.save(root / "data.hdf5"), root, "SIGKILL", "SIGINT"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(script, env=os.environ | threads, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["-9", "-2"]
    assert "KeyboardInterrupt" in done.stderr
    return root


@pytest.mark.parametrize(("name", "saved_step"), [("SIGKILL", 4), ("SIGINT", 6)])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(pendulum, stopped, tmp_path, name, saved_step) -> None:
    run_dir = stopped / name
    assert checkpoint.read(run_dir / "checkpoint")[0]["step"] == saved_step
    every = {"save_every": 4, "log_every": 2, "eval_env": "Pendulum-v1", "eval_every": 2, "eval_episodes": 1}
    resumed = small().fit(pendulum, 12, run_dir=run_dir, resume=True, **every)
    whole = small().fit(pendulum, 12, run_dir=tmp_path / "whole", **every)
    assert resumed.step == 12
    assert equal(bits(resumed, tmp_path), bits(whole, tmp_path))
    runs = Run.read(run_dir), Run.read(tmp_path / "whole")
    assert runs[0].steps_L.tolist() == runs[1].steps_L.tolist() == [2, 4, 6, 8, 10, 12]
    for metric, values in runs[1].metrics.items():
        np.testing.assert_array_equal(runs[0].metrics[metric], values)
    for a, b in zip(runs[0].evaluations, runs[1].evaluations, strict=True):
        assert a.step == b.step
        np.testing.assert_array_equal(a.evaluation.returns_SE, b.evaluation.returns_SE)


def test_the_comparison_sees_a_state_that_is_not_restored(pendulum, tmp_path) -> None:
    """The control: going on with target networks copied from the online ones, a mistake found in the field."""
    whole, stopped = small().fit(pendulum, 12), small().fit(pendulum, 6)
    stopped.critic_target.load_state_dict(stopped.critic.state_dict())
    assert not equal(bits(stopped.fit(pendulum, 6), tmp_path), bits(whole, tmp_path))


def test_ctrl_c_finishes_the_step_saves_and_gives_the_signal_back(pendulum, tmp_path) -> None:
    def interrupt(agent: TD3BC, report: Report) -> None:
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    agent = small()
    with pytest.raises(KeyboardInterrupt):
        agent.fit(pendulum, 10, log_every=1, run_dir=tmp_path / "run", callbacks=[interrupt])
    assert agent.step == 3
    assert checkpoint.read(tmp_path / "run" / "checkpoint")[0]["step"] == 3
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_between_two_lines_of_the_log_loses_no_metrics(pendulum, tmp_path) -> None:
    def interrupted(observe: Any) -> Any:
        def update(batch: Any) -> Any:
            if agent.step == 4:  # while the fifth step is taken
                os.kill(os.getpid(), signal.SIGINT)
            return observe(batch)

        return update

    agent = small()
    agent.update = interrupted(agent.update)
    with pytest.raises(KeyboardInterrupt):
        agent.fit(pendulum, 10, log_every=3, run_dir=tmp_path / "run")
    assert Run.read(tmp_path / "run").steps_L.tolist() == [3, 5]


def test_a_second_ctrl_c_does_not_wait(pendulum, tmp_path) -> None:
    def insist(agent: TD3BC, report: Report) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still here")

    with pytest.raises(KeyboardInterrupt):
        small().fit(pendulum, 10, log_every=1, run_dir=tmp_path / "run", callbacks=[insist])
    assert not checkpoint.exists(tmp_path / "run" / "checkpoint")


def test_training_works_outside_the_main_thread(pendulum) -> None:
    agent = small()
    thread = threading.Thread(target=agent.fit, args=(pendulum, 3))
    thread.start()
    thread.join()
    assert agent.step == 3


def test_a_run_without_a_checkpoint_yet_starts_anew(pendulum, tmp_path) -> None:
    """Killed before its first checkpoint, or never started: both with the same command."""
    whole = small().fit(pendulum, 6, run_dir=tmp_path / "never", resume=True)
    small().fit(pendulum, 4, log_every=1, run_dir=tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoint")
    card = tmp_path / "killed" / "run.json"
    card.write_text(card.read_text().replace('"n_steps": 4', '"n_steps": 6'))
    with pytest.warns(UserWarning, match="killed has no checkpoint yet: the run starts anew, from step 0"):
        resumed = small().fit(pendulum, 6, log_every=2, run_dir=tmp_path / "killed", resume=True)
    assert resumed.step == whole.step == 6
    assert equal(bits(resumed, tmp_path), bits(whole, tmp_path))
    assert Run.read(tmp_path / "killed").steps_L.tolist() == [2, 4, 6]


def test_a_complete_run_without_its_checkpoint_stays_as_it_is(pendulum, tmp_path) -> None:
    small().fit(pendulum, 4, log_every=1, run_dir=tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    logs = tmp_path / "run" / "run.json", tmp_path / "run" / "metrics.jsonl"
    before = [file.read_bytes() for file in logs]
    for n_steps in (4, 6):
        with pytest.raises(ConfigError, match="run is complete, and its checkpoint is missing: put it back"):
            small().fit(pendulum, n_steps, run_dir=tmp_path / "run", resume=True)
    assert [file.read_bytes() for file in logs] == before


def test_resuming_a_finished_run_does_nothing_and_a_longer_one_goes_on(pendulum, tmp_path) -> None:
    small().fit(pendulum, 6, run_dir=tmp_path / "run")
    assert small().fit(pendulum, 6, run_dir=tmp_path / "run", resume=True).step == 6
    longer = small().fit(pendulum, 9, run_dir=tmp_path / "run", resume=True)
    assert equal(bits(longer, tmp_path), bits(small().fit(pendulum, 9), tmp_path))
    assert Run.read(tmp_path / "run").card["n_steps"] == 9


def test_a_complete_run_stays_as_it_is_and_is_not_resumed_to_fewer_steps(pendulum, tmp_path) -> None:
    run = tmp_path / "run"
    small().fit(pendulum, 6, run_dir=run)
    card = (run / "run.json").read_bytes()
    small().fit(pendulum, 6, run_dir=run, resume=True)
    assert (run / "run.json").read_bytes() == card
    agent = small()
    with pytest.raises(ConfigError, match="has taken 6 of 6 steps: resumed, it cannot end at 4"):
        agent.fit(pendulum, 4, run_dir=run, resume=True)
    assert (run / "run.json").read_bytes() == card
    assert agent.step == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small(alpha=1.0), r"belongs to another run: its alpha is 2\.5, here it is 1\.0"),
        (lambda: TD3BC([4], **SMALL), r"belongs to another run: its seeds is \(4, 9\), here it is \(4,\)"),
        (lambda: small(precision="float64"), "its precision is 'float32', here it is 'float64'"),
        (lambda: IQL(SEEDS, **SMALL), r"is a checkpoint of offline\.td3_bc, not of offline\.iql"),
    ],
)
def test_another_run_is_not_resumed(pendulum, tmp_path, make, message) -> None:
    small().fit(pendulum, 2, run_dir=tmp_path / "run")
    with pytest.raises(CheckpointError, match=message):
        make().fit(pendulum, 4, run_dir=tmp_path / "run", resume=True)


def test_a_run_is_not_resumed_on_other_data(pendulum, tmp_path) -> None:
    small().fit(pendulum, 2, run_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"is another run: its dataset\.fingerprint is"):
        small().fit(pendulum.top_fraction(0.5), 4, run_dir=tmp_path / "run", resume=True)


# -- Refusals


@pytest.mark.parametrize("kind", [TD3BC, CDSA])
def test_a_refused_fit_does_not_bind_the_agent_to_its_data(kind, pendulum, tmp_path) -> None:
    other = Dataset.from_arrays(
        np.arange(40.0).reshape(20, 2), np.zeros((20, 1)), np.ones(20), np.ones(20, bool), np.zeros(20, bool)
    )
    kind(1, **SMALL).fit(pendulum, 1, run_dir=tmp_path / "taken")
    agent, fresh = kind(1, **SMALL), kind(1, **SMALL)
    for options, error in (
        ({"eval_env": "Reacher-v5"}, EnvironmentMismatchError),
        ({"run_dir": tmp_path / "taken"}, ConfigError),
    ):
        with pytest.raises(error):
            agent.fit(pendulum, 2, **options)
        with pytest.raises(CorollaryError, match="has not learnt yet"):
            agent.predict(pendulum.observations[0])
    agent.fit(other, 2)
    fresh.fit(other, 2)
    assert equal(bits(agent, tmp_path), bits(fresh, tmp_path / "fresh"))


def test_divergence_is_told_once_and_names_the_seed(pendulum) -> None:
    agent = small().fit(pendulum, 2)
    with torch.no_grad():
        agent.critic.net.weights[0][1] = float("nan")  # of the second seed
    with pytest.warns(RuntimeWarning) as caught:
        agent.fit(pendulum, 4, log_every=1)
    told = [str(warning.message) for warning in caught]
    assert len(told) == 1  # of two steps with that loss
    assert "diverged: at step 3 critic_loss is not finite (seed 9)" in told[0]


def test_double_precision_is_not_lost_in_the_transforms(pendulum) -> None:
    agent = small(precision="float64").fit(pendulum, 1)
    rows = pendulum.transitions(view=agent.config.view).obs
    assert torch.equal(agent.data.obs, agent.transform_states(rows.double()))
    assert not torch.equal(agent.data.obs, agent.transform_states(rows).double())  # the control


@pytest.mark.parametrize("value", [2.5, 1e5, True, "10"])
def test_counts_that_are_not_whole_are_named(pendulum, value) -> None:
    with pytest.raises(ConfigError, match=f"n_steps must be a whole number, as int.1e5. is; got {value!r}"):
        small().fit(pendulum, value)


@pytest.mark.parametrize("name", ["n_steps", "log_every", "eval_every", "save_every", "eval_episodes"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_below_one_are_named(pendulum, name, value) -> None:
    agent = small()
    with pytest.raises(ConfigError, match=f"{name} must be at least 1; got {value}"):
        agent.fit(pendulum, **{"n_steps": 5, name: value})
    assert agent.step == 0


def test_resuming_needs_a_run_directory(pendulum) -> None:
    with pytest.raises(ConfigError, match="resume=True needs the run_dir"):
        small().fit(pendulum, 5, resume=True)


def test_data_of_other_shapes_or_discrete_actions_are_named(pendulum) -> None:
    agent = BC(**SMALL).fit(pendulum, 1)
    flags = {"terminated": np.arange(20) == 19, "truncated": np.zeros(20, bool)}
    wide = Dataset.from_arrays(np.zeros((20, 4)), np.zeros((20, 1)), np.zeros(20), **flags)
    with pytest.raises(DataError, match="built for 3 observation and 1 action dimensions; arrays has 4 and 1"):
        agent.fit(wide, 1)
    discrete = Dataset.from_arrays(np.zeros((20, 3)), np.zeros(20, int), np.zeros(20), **flags)
    with pytest.raises(DataError, match=r"offline\.bc needs continuous actions; arrays has discrete ones"):
        BC(**SMALL).fit(discrete, 1)
