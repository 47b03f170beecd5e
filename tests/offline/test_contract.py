"""What every algorithm promises; the sweep takes each class in the registry, so a new one is tested by being there.

Data are random steps of Reacher, a MuJoCo environment with two actions whose episodes end by their time limit.
"""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import onnxruntime
import pytest
import torch

import corollary
from corollary.core import checkpoint
from corollary.core.agent import algorithm_class, algorithms, load_agent
from corollary.core.collect import collect
from corollary.core.dataset import Dataset
from corollary.core.errors import CheckpointError, ConfigError, CorollaryError, EnvironmentMismatchError
from corollary.core.offline_agent import OfflineAgent
from corollary.core.transforms import REWARD_TRANSFORMS, STATE_TRANSFORMS
from corollary.kernels.streams import RandomStream

Agent = OfflineAgent[Any]
Kind = type[Agent]
State = dict[str, torch.Tensor]

ENV = "Reacher-v5"
SEEDS = [11, 3, 7]
STEPS = 20

KINDS = algorithms("offline")
# Optimizers without a learning rate of their own, and whose they have.
SHARED_RATE = {"entropy": "actor", "multiplier": "critic"}


def small(kind: Kind, width: int = 16) -> dict[str, Any]:
    """Options that make every network of an algorithm small."""
    fields = [f.name for f in dataclasses.fields(kind.config_type) if f.name.endswith("hidden")]
    return dict.fromkeys(fields, (width, width)) | {"batch_size": 8}


every_algorithm = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture(scope="module")
def reacher() -> Dataset:
    return collect(ENV, n_steps=300, seed=0, progress=False)


@pytest.fixture(scope="module")
def observations(reacher) -> Any:
    return reacher.observations[::7]


@pytest.fixture(scope="module")
def trained(reacher) -> dict[Kind, Agent]:
    """One agent per class, trained for a few steps; the tests below only look at it."""
    return {kind: kind(SEEDS, **small(kind)).fit(reacher, STEPS) for kind in KINDS.values()}


def state_of(agent: Agent, folder: Path) -> State:
    return checkpoint.read(agent.save(folder / f"state of {id(agent)}"))[1]


def same_bits(a: State, b: State) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


# -- Registry and configuration


@every_algorithm
def test_the_name_is_the_module(kind) -> None:
    assert kind.__module__ == f"corollary.{kind.algorithm}"
    assert algorithm_class(kind.algorithm) is kind


def test_the_registry_has_the_first_four_and_suggests_a_name() -> None:
    assert {"offline.bc", "offline.iql", "offline.prdc", "offline.td3_bc"} <= KINDS.keys()
    with pytest.raises(ConfigError, match=r"Unknown algorithm 'offline\.prcd'.*Did you mean 'offline\.prdc'\?"):
        algorithm_class("offline.prcd")


@every_algorithm
def test_configurations_survive_json(kind) -> None:
    for preset in (None, *kind.presets):
        config = kind(preset=preset).config
        again = kind(**json.loads(json.dumps(dataclasses.asdict(config)))).config
        assert again == config
        assert hash(again) == hash(config)


@every_algorithm
def test_presets_change_what_they_say_and_name_their_source(kind) -> None:
    for name, preset in kind.presets.items():
        config = kind(preset=name).config
        assert {key: getattr(config, key) for key in preset.settings} == preset.settings
        assert preset.source
        rewards = config.reward_transform
        assert ({rewards} if isinstance(rewards, str) else {*rewards}) <= {*REWARD_TRANSFORMS}
        assert config.state_transform in STATE_TRANSFORMS
        assert kind(preset=name, batch_size=3).config == dataclasses.replace(config, batch_size=3)


@every_algorithm
def test_unknown_options_and_presets_are_named_with_a_suggestion(kind) -> None:
    with pytest.raises(ConfigError, match=r"Unknown option 'batch_siez'.*Did you mean 'batch_size'\?"):
        kind(batch_siez=8)
    with pytest.raises(ConfigError, match="Unknown preset 'nothing like it'"):
        kind(preset="nothing like it")
    for preset in kind.presets:
        with pytest.raises(ConfigError, match="Did you mean "):
            kind(preset=preset + "x")
    with pytest.raises(ConfigError, match=r"batch_size must be at least 1; got 0"):
        kind(batch_size=0)


@every_algorithm
@pytest.mark.parametrize("seeds", [0, [], [1, 1], -1, [-1]])
def test_impossible_seeds_are_named(kind, seeds) -> None:
    with pytest.raises(ConfigError, match="seeds must be a positive number or a list of different seeds"):
        kind(seeds)


@every_algorithm
def test_unknown_precisions_and_transforms_are_named(kind, reacher) -> None:
    with pytest.raises(ConfigError, match="precision must be one of float32, bf16, float64; got 'fp8'"):
        kind(precision="fp8")
    with pytest.raises(ConfigError, match=r"reward transform 'nones'.*Did you mean 'none'\?"):
        kind(reward_transform="nones", **small(kind)).fit(reacher, 1)
    with pytest.raises(ConfigError, match=r"state transform 'standardise'.*Did you mean 'standardize'\?"):
        kind(state_transform="standardise", **small(kind)).fit(reacher, 1)


# -- Acting


@every_algorithm
def test_predict_is_stable_baselines(kind, trained, observations) -> None:
    agent = trained[kind]
    many, state = agent.predict(observations)
    one, _ = agent.predict(observations[0], state=None, episode_start=np.array([True]), deterministic=True)
    assert state is None
    assert many.shape == (len(observations), 2)
    assert one.shape == (2,)
    assert many.dtype == one.dtype == np.float32
    np.testing.assert_allclose(one, many[0], rtol=1e-5, atol=1e-6)
    assert agent.predict(observations[:0])[0].shape == (0, 2)
    assert agent.predict(observations[:2].tolist())[0].shape == (2, 2)


@every_algorithm
@pytest.mark.parametrize("deterministic", [True, False])
def test_actions_stay_in_the_box(kind, trained, observations, deterministic) -> None:
    action, _ = trained[kind].predict(1e4 * observations, deterministic=deterministic)
    assert np.abs(action).max() <= 1
    assert np.isfinite(action).all()


@every_algorithm
def test_acting_for_all_seeds_is_acting_for_each(kind, trained, observations) -> None:
    agent = trained[kind]
    together = agent.act(torch.tensor(observations).expand(3, -1, -1))
    assert together.shape == (3, len(observations), 2)
    for index in range(3):
        alone, _ = agent.select(index).predict(observations)
        np.testing.assert_allclose(together[index], alone, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(together[0], together[1], atol=1e-3)  # control: the seeds differ


@every_algorithm
def test_wrong_observations_are_named(kind, trained) -> None:
    for shape in ((3,), (2, 3), (1, 2, 10), ()):
        with pytest.raises(EnvironmentMismatchError, match=r"observations \[10\] or \[n, 10\]; got shape"):
            trained[kind].predict(np.zeros(shape))


@every_algorithm
def test_an_agent_that_has_not_learnt_says_so(kind, tmp_path) -> None:
    agent = kind()
    for use in (
        lambda: agent.predict(np.zeros(10)),
        lambda: agent.act(torch.zeros(1, 1, 10)),
        lambda: agent.save(tmp_path / "agent"),
        lambda: agent.select(0),
        lambda: agent.export_onnx(tmp_path / "policy.onnx"),
        lambda: corollary.evaluate(agent, ENV, 1),
    ):
        with pytest.raises(CorollaryError, match=rf"{kind.__name__} has not learnt yet: call fit"):
            use()
    assert not any(tmp_path.iterdir())


@every_algorithm
def test_positions_that_do_not_exist_are_named(kind, trained) -> None:
    assert trained[kind].select(-1).seeds == (7,)
    for index in (3, -4):
        with pytest.raises(ConfigError, match=f"has 3 seeds; there is no seed index {index}"):
            trained[kind].select(index)
        with pytest.raises(ConfigError, match=f"there is no seed index {index}"):
            trained[kind].export_onnx("never.onnx", index)


@every_algorithm
def test_seeds_may_come_from_numpy(kind) -> None:
    assert kind(np.int64(2)).seeds == (0, 1)
    assert kind(np.arange(3, 5)).seeds == (3, 4)
    assert all(type(seed) is int for seed in kind([np.int32(7)]).seeds)


@every_algorithm
def test_a_device_that_is_not_there_is_named(kind, trained, tmp_path) -> None:
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ConfigError, match=f"The device '{device}' cannot be used here"):
            kind(device=device)
    path = trained[kind].save(tmp_path / "agent")
    with pytest.raises(ConfigError, match="The device 'gpu' cannot be used here"):
        load_agent(path, device="gpu")


@every_algorithm
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seeds", "many"),
        ("seeds", []),
        ("config", {"hidden": 3}),
        ("config", None),
        ("problem", {}),
        ("step", None),
        ("step", -1),
    ],
)
def test_an_altered_description_is_named(kind, trained, tmp_path, name, value) -> None:
    path = trained[kind].save(tmp_path / "agent")
    description = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(description | {name: value}))
    with pytest.raises(CheckpointError, match=rf"agent was altered, or does not fit this version of {kind.algorithm}"):
        load_agent(path)


@every_algorithm
def test_onnx_gives_the_actions_of_predict(kind, trained, observations, tmp_path) -> None:
    for index in (0, 2):
        path = trained[kind].export_onnx(tmp_path / "policy.onnx", index)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (action,) = session.run(None, {"observation": observations})
        expected, _ = trained[kind].select(index).predict(observations)
        np.testing.assert_allclose(action, expected, rtol=0, atol=1e-5)


@every_algorithm
def test_evaluation_in_the_real_environment(kind, trained) -> None:
    result = corollary.evaluate(trained[kind], ENV, 2)
    assert result.env_id == ENV
    assert (result.lengths_SE == 50).all()
    assert np.isfinite(result.returns_SE).all()
    assert len(np.unique(result.returns_SE)) == 6


@every_algorithm
def test_an_environment_with_other_spaces_is_named_with_the_data(kind, trained) -> None:
    with pytest.raises(EnvironmentMismatchError, match=r"Pendulum-v1 has observation space.*'reacher-v5-random'"):
        corollary.evaluate(trained[kind], "Pendulum-v1", 1)


class ResetInTurn(gymnasium.Wrapper):  # type: ignore[type-arg]
    """Resets with one seed after the other, as `corollary.evaluate` does."""

    def __init__(self, first_seed: int) -> None:
        super().__init__(gymnasium.make(ENV))
        self.seeds = itertools.count(first_seed)

    def reset(self, **kwargs: Any) -> Any:
        return super().reset(seed=next(self.seeds))


@pytest.mark.peer
@every_algorithm
def test_evaluate_policy_of_stable_baselines_finds_the_same_returns(kind, trained) -> None:
    evaluation = pytest.importorskip("stable_baselines3.common.evaluation")
    monitor = pytest.importorskip("stable_baselines3.common.monitor")
    returns, lengths = evaluation.evaluate_policy(
        trained[kind], monitor.Monitor(ResetInTurn(5)), n_eval_episodes=3, return_episode_rewards=True
    )
    ours = corollary.evaluate(trained[kind], ENV, 3, first_seed=5)
    assert lengths == ours.lengths_SE[0].tolist()
    np.testing.assert_allclose(returns, ours.returns_SE[0], rtol=1e-4)


@every_algorithm
def test_a_seed_that_diverges_leaves_the_others_as_they_are(kind, reacher, tmp_path) -> None:
    well, ill = (kind(SEEDS, **small(kind)).fit(reacher, 2) for _ in range(2))
    with torch.no_grad():
        for tensor in ill.networks.state_dict().values():
            tensor[1] = float("nan")
    assert ill.diverged().tolist() == [False, True, False]
    well.fit(reacher, 6).learn(ENV, 6)
    with pytest.warns(RuntimeWarning, match=r"diverged.*\(seed 3\)|\(seed 3\).*diverged"):
        ill.fit(reacher, 6).learn(ENV, 6)
    for index in (0, 2):
        ours, theirs = (
            {name: tensor.nan_to_num(7.5) for name, tensor in state_of(agent.select(index), tmp_path).items()}
            for agent in (well, ill)
        )
        assert same_bits(ours, theirs)
    with pytest.warns(RuntimeWarning, match=r"diverged \(seed 3\)"):
        result = corollary.evaluate(ill, ENV, 2)
    assert np.isnan(result.returns_SE).tolist() == [[False] * 2, [True] * 2, [False] * 2]


# -- Saving and loading


@every_algorithm
def test_a_saved_agent_comes_back_whole(kind, trained, observations, tmp_path) -> None:
    agent = trained[kind]
    path = agent.save(tmp_path / "agent")
    for loaded in (kind.load(path), load_agent(path), corollary.load_agent(str(path))):
        assert type(loaded) is kind
        assert loaded.config == agent.config
        assert (loaded.seeds, loaded.step, loaded.precision) == (tuple(SEEDS), STEPS, "float32")
        assert loaded.problem == agent.problem
        assert np.array_equal(loaded.predict(observations)[0], agent.predict(observations)[0])
        assert same_bits(state_of(loaded, tmp_path), state_of(agent, tmp_path))


@every_algorithm
def test_presets_are_remembered(kind, reacher, tmp_path) -> None:
    for preset in kind.presets:
        agent = kind(preset=preset, **small(kind))
        if agent.config.reward_transform not in ("none", "return_range"):
            continue  # made for the rewards of another domain
        path = agent.fit(reacher, 1).save(tmp_path / "agent")
        assert kind.load(path).preset == preset
        assert kind.load(path).config == agent.config


@every_algorithm
def test_a_checkpoint_of_another_algorithm_is_named(kind, trained, tmp_path) -> None:
    other = next(k for k in KINDS.values() if k is not kind)
    path = trained[other].save(tmp_path / "agent")
    with pytest.raises(CheckpointError, match=rf"is a checkpoint of {other.algorithm}, not of {kind.algorithm}"):
        kind.load(path)


@every_algorithm
def test_a_checkpoint_that_does_not_fit_is_named(kind, trained, tmp_path) -> None:
    """As of another version of the library: a tensor fewer, another shape, an option that is gone."""
    config, tensors = checkpoint.read(trained[kind].save(tmp_path / "whole"))
    name = min(name for name in tensors if name.startswith("network/"))  # a file's order is no order
    options = config["config"]
    for changed_config, changed_tensors in (
        (config, {n: t for n, t in tensors.items() if n != name}),
        (config, tensors | {name: tensors[name][:, :1]}),
        (config | {"config": options | {"batch_syze": 3}}, tensors),
        ({key: value for key, value in config.items() if key != "problem"}, tensors),
    ):
        path = checkpoint.write(tmp_path / "changed", changed_config, changed_tensors)
        with pytest.raises(CheckpointError, match=rf"does not fit this version of {kind.algorithm}"):
            kind.load(path)


# -- Reproducibility


@every_algorithm
def test_the_same_seed_is_the_same_run_to_the_bit(kind, reacher, trained, tmp_path) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    again = kind(SEEDS, **small(kind)).fit(reacher, STEPS)
    assert same_bits(state_of(again, tmp_path), state_of(trained[kind], tmp_path))
    assert torch.equal(torch_state, torch.get_rng_state())  # no global generator is drawn from
    assert np.array_equal(numpy_state[1], np.random.get_state()[1])  # noqa: NPY002
    other = kind([11, 3, 8], **small(kind)).fit(reacher, STEPS)
    assert not same_bits(state_of(other, tmp_path), state_of(trained[kind], tmp_path))


RESUMED_ELSEWHERE = """
import os, sys
from corollary.core.agent import load_agent
from corollary.core.dataset import Dataset

def refuse_pickles(event, arguments):
    if event == "pickle.find_class":
        raise RuntimeError(f"a pickle was loaded: {arguments}")

dataset, root, n_steps = Dataset.load(sys.argv[1]), sys.argv[2], int(sys.argv[3])
sys.addaudithook(refuse_pickles)
for name in sys.argv[4:]:
    load_agent(f"{root}/{name} half").fit(dataset, n_steps).save(f"{root}/{name} resumed")
"""


@pytest.fixture(scope="module")
def resumed(reacher, tmp_path_factory) -> Path:
    """Every algorithm trained for half of its steps here, and for the other half by another process."""
    root = tmp_path_factory.mktemp("resumed")
    for name, kind in KINDS.items():
        kind(SEEDS, **small(kind)).fit(reacher, STEPS // 2).save(root / f"{name} half")
    data = reacher.save(root / "data.hdf5")
    script = [sys.executable, "-c", RESUMED_ELSEWHERE, data, root, str(STEPS - STEPS // 2), *KINDS]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(script, env=os.environ | threads, check=True)
    return root


@pytest.mark.rung(4)
@every_algorithm
def test_stopped_and_resumed_in_a_new_process_is_never_stopped(kind, trained, resumed, tmp_path) -> None:
    config, tensors = checkpoint.read(resumed / f"{kind.algorithm} resumed")
    assert config["step"] == STEPS
    whole = state_of(trained[kind], tmp_path)
    assert any(name.startswith("optimizer/") for name in whole)
    assert same_bits(tensors, whole)
    half = checkpoint.read(resumed / f"{kind.algorithm} half")[1]
    moved = [name for name in whole if not torch.equal(half[name], whole[name])]
    assert len(moved) >= 0.9 * len(whole)  # control: the second half did change nearly every tensor


@pytest.fixture(scope="module")
def precise(reacher) -> dict[Kind, Agent]:
    return {kind: kind(SEEDS, precision="float64", **small(kind)).fit(reacher, STEPS) for kind in KINDS.values()}


@every_algorithm
@pytest.mark.parametrize("index", [0, 2])
def test_a_seed_alone_is_the_same_run_as_among_three(kind, precise, reacher, index, tmp_path) -> None:
    alone = kind([SEEDS[index]], precision="float64", **small(kind)).fit(reacher, STEPS)
    chosen = precise[kind].select(index)
    assert alone.seeds == chosen.seeds
    a, b = state_of(alone, tmp_path), state_of(chosen, tmp_path)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-9)
    neighbour = state_of(precise[kind].select(1), tmp_path)  # control
    assert max(float((a[n] - neighbour[n]).abs().max()) for n in a if n.startswith("network/")) > 1e-2


@every_algorithm
def test_a_selected_seed_goes_on_as_it_would_among_the_others(kind, precise, reacher, tmp_path) -> None:
    path = precise[kind].save(tmp_path / "agent")
    together = kind.load(path).fit(reacher, 5).select(1)
    alone = precise[kind].select(1).fit(reacher, 5)
    a, b = state_of(alone, tmp_path), state_of(together, tmp_path)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-9)


# -- Weights of rows


@every_algorithm
def test_a_row_of_weight_zero_teaches_nothing(kind, reacher, tmp_path) -> None:
    """Weights are part of every loss: what stands in a row of weight 0 is of no consequence."""
    weight = torch.cat([torch.full((3, 4), 2.0), torch.zeros(3, 4)], 1).double()

    def trained_on(weight: torch.Tensor | None, last_row: int) -> State:
        agent = kind(SEEDS, precision="float64", **small(kind))
        data = agent.prepare(reacher)
        rows = torch.arange(8).repeat(3, 1)
        rows[:, 4:] = last_row  # the second half of the batch
        for _ in range(4):
            agent.update(data.gather(rows)._replace(weight=weight))
            agent.step += 1
        return {name: t for name, t in state_of(agent, tmp_path).items() if name.startswith("network/")}

    def distance(a: State, b: State) -> float:
        return max(float((a[name] - b[name]).abs().max()) for name in a)

    assert distance(trained_on(weight, 20), trained_on(weight, 70)) < 1e-12
    assert distance(trained_on(None, 20), trained_on(None, 70)) > 1e-4  # control: without weights they do teach
    assert distance(trained_on(torch.ones(3, 8).double(), 20), trained_on(None, 20)) < 1e-12
    assert distance(trained_on(weight, 20), trained_on(None, 20)) > 1e-4


# -- Going on in an environment


@every_algorithm
def test_learning_from_logged_rows_alone_is_going_on_with_fit(kind, reacher, tmp_path) -> None:
    """Networks, optimisers with their step counts, transforms and the order of batches survive the switch."""
    options = small(kind)
    if hasattr(kind().config, "actor_lr_decay_steps"):
        options["actor_lr_decay_steps"] = None  # the decay is over on the switch

    def learnt(agent: Agent) -> State:
        return {name: t for name, t in state_of(agent, tmp_path).items() if not name.startswith("extra/experience/")}

    went = kind(SEEDS, **options).fit(reacher, 7).learn(ENV, 5, offline_share=1.0)
    stayed = kind(SEEDS, **options).fit(reacher, 7)
    data = stayed.prepare(reacher)
    stayed.online_phase = True  # FamO2O's family is told another balance in it
    for _ in range(5):
        stayed.update(data.gather(*stayed.sampler.rows(stayed.step, stayed.config.batch_size)))
        stayed.step += 1
    assert (went.step, went.clock, stayed.step) == (12, 5, 12)
    assert same_bits(learnt(went), learnt(stayed))
    mixed = kind(SEEDS, **options).fit(reacher, 7).learn(ENV, 5, offline_share=0.5)  # control: experience teaches
    assert not same_bits(learnt(mixed), learnt(stayed))


@every_algorithm
def test_fine_tuning_stops_and_resumes_to_the_bit(kind, reacher, tmp_path) -> None:
    """`fit`, then `learn`: saved in the middle of an episode and continued is never stopped; nothing is lost."""
    mix: dict[str, Any] = {"offline_share": 0.5, "buffer_size": 100}
    whole = kind(SEEDS, **small(kind)).fit(reacher, 4).learn(ENV, 8, **mix)
    half = kind(SEEDS, **small(kind)).fit(reacher, 4).learn(ENV, 3, **mix)
    again = kind.load(half.save(tmp_path / "half")).learn(ENV, 5, dataset=reacher, **mix)
    assert (again.step, again.clock, again.online_phase) == (12, 8, True)
    a, b = state_of(again, tmp_path), state_of(whole, tmp_path)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name].nan_to_num(), b[name].nan_to_num()) for name in a)
    stayed = kind(SEEDS, **small(kind)).fit(reacher, 12)
    moved = [n for n in b if n.startswith("network/") and not torch.equal(b[n], state_of(stayed, tmp_path)[n])]
    assert moved  # control: experience did teach


# -- Precision and diagnostics


@pytest.fixture
def same_noise(monkeypatch) -> None:
    """Every precision draws float64's numbers: float32's are made of other bits, which a policy may well notice."""

    def stream(agent: Agent, purpose: str) -> RandomStream:
        numbers = RandomStream(agent.seeds, purpose, dtype=torch.float64)
        for name in ("normal", "uniform"):
            draw = getattr(numbers, name)
            setattr(numbers, name, lambda step, shape, draw=draw: draw(step, shape).to(agent.dtype))
        return numbers

    monkeypatch.setattr(OfflineAgent, "stream", stream)


@every_algorithm
def test_every_precision_trains_in_its_dtype(kind, reacher, observations, tmp_path, same_noise) -> None:
    wide = small(kind, width=64)  # wide enough for bfloat16 to be used
    agents = {p: kind(2, precision=p, **wide).fit(reacher, STEPS) for p in ("float32", "bf16", "float64")}
    for precision, agent in agents.items():
        dtype = torch.float64 if precision == "float64" else torch.float32
        assert {parameter.dtype for parameter in agent.networks.parameters()} == {dtype}
        assert all(parameter.isfinite().all() for parameter in agent.networks.parameters())
        assert kind.load(agent.save(tmp_path / precision)).precision == precision
    actions = {precision: agent.predict(observations)[0] for precision, agent in agents.items()}
    assert {action.dtype for action in actions.values()} == {np.dtype(np.float32)}
    np.testing.assert_allclose(actions["float32"], actions["float64"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(actions["bf16"], actions["float64"], rtol=0, atol=0.1)
    assert not np.array_equal(actions["bf16"], actions["float32"])


@every_algorithm
def test_diagnostics_are_finite_and_per_seed(kind, reacher) -> None:
    seen: dict[str, int] = {}

    def look(agent: Agent, report: Any) -> None:
        for name, values in report.metrics.items():
            assert values.shape == (3,)
            assert np.isfinite(values).all(), name
            seen[name] = seen.get(name, 0) + 1

    kind(SEEDS, **small(kind)).fit(reacher, 6, log_every=1, callbacks=[look])
    assert "policy_loss" in seen


@every_algorithm
def test_each_learning_rate_reaches_its_own_optimizer(kind, reacher) -> None:
    names = [name for name in kind.config_type.__dataclass_fields__ if name.endswith("_lr") or name == "learning_rate"]
    rates = {name: 10.0 ** -(2 + number) for number, name in enumerate(names)}
    fixed = {"actor_lr_decay_steps": None} if "actor_lr_decay_steps" in kind.config_type.__dataclass_fields__ else {}
    agent = kind(**small(kind), **rates, **fixed).fit(reacher, 1)
    for name, optimizer in agent.optimizers.items():
        expected = rates.get("learning_rate", rates.get(f"{SHARED_RATE.get(name, name)}_lr"))
        assert [group["lr"] for group in optimizer.param_groups] == [expected] * len(optimizer.param_groups), name


@every_algorithm
def test_what_has_an_optimizer_moves(kind, reacher) -> None:
    """Every network that has an optimiser moves, and what has none (a target) moves too or equals its twin."""
    # Reacher's rewards are negative, and a weight max(Q - V, 0) is then zero until V has followed.
    dataset = dataclasses.replace(reacher, rewards=-reacher.rewards)
    agent = kind(**small(kind)).fit(dataset, 1)
    before = {name: parameter.clone() for name, parameter in agent.networks.named_parameters()}
    agent.fit(dataset, 20)
    for name, parameter in agent.networks.named_parameters():
        assert not torch.equal(before[name], parameter), name
