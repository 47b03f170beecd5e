"""Spaces: gymnasium's own flattening as the second derivation, actions inside their space, exact JSON, refusals."""

import json

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector.utils import concatenate, create_empty_array

from corollary.core.errors import CheckpointError, DataError, EnvironmentMismatchError
from corollary.core.spaces import Actions, Observations, flatten_steps, space_from_json, space_to_json

UNSORTED = spaces.Dict([("z", spaces.Box(-1, 1, (2,))), ("a", spaces.Discrete(3, start=-1))])
OBSERVATIONS = {
    "vector": spaces.Box(-np.inf, np.inf, (3,), np.float64),
    "half bounded": spaces.Box(np.array([-np.inf, 0], np.float32), np.array([1, np.inf], np.float32)),
    "matrix": spaces.Box(-1, 1, (2, 3)),
    "number": spaces.Box(-1, 1, ()),
    "bytes": spaces.Box(0, 255, (4,), np.uint8),
    "integers": spaces.Box(-5, 2**62 + 1, (2, 2), np.int64),
    "discrete": spaces.Discrete(4),
    "discrete from -2": spaces.Discrete(4, start=-2),
    "small discrete": spaces.Discrete(4, start=1, dtype=np.int8),
    "multidiscrete": spaces.MultiDiscrete([2, 3, 1]),
    "multidiscrete from 5": spaces.MultiDiscrete([2, 3], start=[5, -1]),
    "multidiscrete matrix": spaces.MultiDiscrete([[2, 3], [4, 1]], dtype=np.int32),
    "multibinary": spaces.MultiBinary(3),
    "multibinary matrix": spaces.MultiBinary([2, 2]),
    "dict": spaces.Dict(b=spaces.Box(-1, 1, (2, 2)), a=spaces.Discrete(3), c=spaces.MultiBinary(2)),
    "unsorted dict": UNSORTED,
    "nested dict": spaces.Dict(goal=UNSORTED, state=spaces.Box(-1, 1, (2,)), none=spaces.Box(-1, 1, (0,))),
}
ACTIONS = {
    "box": spaces.Box(np.array([-1, -0.1], np.float32), np.array([0.3, 2], np.float32)),
    "box of float64": spaces.Box(-0.1, 0.7, (2,), np.float64),
    "discrete": spaces.Discrete(3),
    "discrete from -1": spaces.Discrete(3, start=-1),
    "small discrete": spaces.Discrete(3, dtype=np.int16),
    "multidiscrete": spaces.MultiDiscrete([3, 2]),
    "multidiscrete from 7": spaces.MultiDiscrete([3, 2], start=[7, -7], dtype=np.int32),
}


def samples(space: gymnasium.Space, n: int = 5) -> list:
    space.seed(0)
    return [space.sample() for _ in range(n)]


# ----------------------------------------------------------------------------------------------------- observations


@pytest.mark.parametrize("space", OBSERVATIONS.values(), ids=OBSERVATIONS)
def test_encoding_is_gymnasiums_flattening(space) -> None:
    observations = Observations(space, "Env")
    values = samples(space)
    expected = np.stack([spaces.flatten(space, value) for value in values]).astype(np.float32)
    batch = concatenate(space, values, create_empty_array(space, len(values)))
    assert observations.dim == expected.shape[1]
    for value, row in zip(values, expected, strict=True):
        vector = observations.encode(value)
        assert vector.dtype == np.float32
        np.testing.assert_array_equal(vector, row)
        assert observations.is_single(value)
    rows = observations.encode_batch(batch)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, expected)
    assert not observations.is_single(batch)


def test_encoding_by_hand() -> None:
    observation = {"z": np.array([0.5, -1], np.float32), "a": 0}  # the entries' order is the space's, a counts from -1
    assert Observations(UNSORTED, "Env").encode(observation).tolist() == [0.5, -1, 0, 1, 0]
    assert Observations(spaces.MultiDiscrete([2, 3]), "Env").encode(np.array([1, 0])).tolist() == [0, 1, 1, 0, 0]
    assert Observations(spaces.Box(0, 9, (2, 2)), "Env").encode([[1, 2], [3, 4]]).tolist() == [1, 2, 3, 4]


def test_a_float32_vector_is_not_copied() -> None:
    observation = np.zeros(3, np.float32)
    assert np.shares_memory(Observations(spaces.Box(-1, 1, (3,)), "Env").encode(observation), observation)


MISFITS = [
    ("vector", np.zeros(4), "shape"),
    ("vector", np.zeros((3, 1)), "shape"),
    ("vector", {"x": np.zeros(3)}, "float"),
    ("matrix", np.zeros(6), "shape"),
    ("discrete", 4, "value 4"),
    ("discrete", -1, "value -1"),  # which as an index would quietly mean the last category
    ("discrete from -2", 2, "value 2"),
    ("discrete", 0.5, "float"),
    ("multidiscrete", np.array([0, 3, 0]), "outside its 3"),
    ("multidiscrete", np.array([0, 0]), "shapes"),
    ("multibinary", np.array([0, 1]), "shape"),
    ("dict", {"a": 0, "b": np.zeros((2, 2))}, "no entry 'c'"),
    ("dict", np.zeros(9), ""),
]


@pytest.mark.parametrize(("name", "value", "part"), MISFITS)
def test_an_observation_outside_its_space_is_named(name, value, part) -> None:
    observations = Observations(OBSERVATIONS[name], "Some/Env-v0")
    with pytest.raises(EnvironmentMismatchError, match=r"^An observation is outside .* of Some/Env-v0 .*mend") as error:
        observations.encode(value)
    assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("vector", np.zeros(3)),
        ("vector", np.zeros((2, 4))),
        ("discrete", np.array([0, 4])),
        ("discrete", np.array([0, -1])),
        ("multibinary", np.zeros((2, 4))),
        ("dict", {"a": np.zeros(2, int), "b": np.zeros((2, 2, 2))}),
        ("dict", {"a": np.zeros(2, int), "b": np.zeros((2, 2, 2)), "c": np.zeros((3, 2))}),  # of different lengths
        ("vector", {"x": np.zeros((2, 3))}),
    ],
)
def test_a_batch_outside_its_space_is_named(name, batch) -> None:
    with pytest.raises(EnvironmentMismatchError, match=r"outside the observation space .* of Some/Env-v0"):
        Observations(OBSERVATIONS[name], "Some/Env-v0").encode_batch(batch)


@pytest.mark.parametrize(
    ("name", "value"), [("vector", np.zeros((1, 1, 3))), ("discrete", np.zeros((2, 2))), ("dict", np.zeros(9))]
)
def test_axes_that_fit_neither_one_observation_nor_a_batch(name, value) -> None:
    with pytest.raises(EnvironmentMismatchError, match="Some/Env-v0"):
        Observations(OBSERVATIONS[name], "Some/Env-v0").is_single(value)


IMAGE = spaces.Box(0, 255, (4, 5, 3), np.uint8)
REFUSED_OBSERVATIONS = {
    "image": (IMAGE, "images"),
    "image in a dict": (spaces.Dict(camera=IMAGE, state=spaces.Box(-1, 1, (2,))), "images"),
    "tuple": (spaces.Tuple([spaces.Discrete(2), spaces.Discrete(3)]), "FlattenObservation"),
    "text": (spaces.Text(5), "FlattenObservation"),
    "sequence": (spaces.Sequence(spaces.Discrete(2)), "ObservationWrapper"),
    "graph": (spaces.Graph(spaces.Box(-1, 1, (2,)), None), "ObservationWrapper"),
    "empty": (spaces.Box(-1, 1, (0,)), "empty"),
    "empty dict": (spaces.Dict(), "empty"),
}


@pytest.mark.parametrize(("space", "part"), REFUSED_OBSERVATIONS.values(), ids=REFUSED_OBSERVATIONS)
def test_unsupported_observations_are_refused_in_one_sentence(space, part) -> None:
    with pytest.raises(EnvironmentMismatchError) as error:
        Observations(space, "Some/Env-v0")
    message = str(error.value)
    assert message.startswith("Some/Env-v0 ")
    assert part in message
    assert message.endswith(".")


class Shows(gymnasium.Env):
    """An environment with a given observation space."""

    action_space = spaces.Discrete(2)

    def __init__(self, space: gymnasium.Space) -> None:
        self.observation_space = space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}


@pytest.mark.parametrize("name", ["image", "image in a dict", "tuple", "text"])
def test_the_remedy_named_works(name) -> None:
    env = gymnasium.wrappers.FlattenObservation(Shows(REFUSED_OBSERVATIONS[name][0]))
    observation, _ = env.reset(seed=0)
    assert Observations(env.observation_space, "Env").encode(observation).shape == (
        spaces.flatdim(env.observation_space),
    )


def test_steps_of_unsupported_spaces_are_a_data_error() -> None:
    with pytest.raises(DataError, match="Text"):
        flatten_steps(spaces.Text(3), ["abc"])


# ---------------------------------------------------------------------------------------------------------- actions


@pytest.mark.parametrize("space", ACTIONS.values(), ids=ACTIONS)
def test_actions_belong_to_the_space(space) -> None:
    actions = Actions(space, "Env")
    draw = np.random.default_rng(0)
    if actions.kind == "continuous":
        rows = draw.normal(0, 3, (50, actions.dim)).astype(np.float32)
        assert not all(space.contains(row.astype(space.dtype)) for row in rows)  # control: clipping has work to do
    else:
        rows = draw.integers(0, actions.sizes, (50, actions.dim))
    made = actions.to_env(rows)
    assert len(made) == 50
    assert all(space.contains(action) for action in made)
    np.testing.assert_array_equal(actions.to_env_batch(rows), np.asarray(made))


def test_actions_by_hand() -> None:
    box = Actions(ACTIONS["box"], "Env")
    rows = np.array([[0.25, -3], [9, 1]], np.float32)
    np.testing.assert_array_equal(box.to_env_batch(rows), np.array([[0.25, -0.1], [0.3, 1]], np.float32))
    assert rows[1, 0] == 9  # the caller's rows, which learning needs unclipped, stay
    assert (box.kind, box.dim, box.sizes) == ("continuous", 2, ())
    np.testing.assert_array_equal(box.low, np.array([-1, -0.1], np.float32))

    shifted = Actions(ACTIONS["discrete from -1"], "Env")
    chosen = shifted.to_env(np.array([[0], [2]]))
    assert chosen == [-1, 1]
    assert all(type(action) is int for action in chosen)
    assert (shifted.kind, shifted.dim, shifted.sizes) == ("discrete", 1, (3,))

    several = Actions(spaces.MultiDiscrete([3, 2], start=[7, -7]), "Env")
    made = several.to_env_batch(np.array([[0, 1], [2, 0]]))
    assert made.tolist() == [[7, -6], [9, -7]]
    assert made.dtype == np.int64
    assert (several.dim, several.sizes) == (2, (3, 2))


@pytest.mark.parametrize("limit", [np.inf, np.finfo(np.float64).max])
def test_an_unbounded_action_is_not_clipped(limit) -> None:
    space = spaces.Box(np.array([-limit, -1.0]), np.array([limit, limit]), dtype=np.float64)
    actions = Actions(space, "Env")
    assert actions.to_env_batch(np.array([[-1e30, -5], [1e30, 1e20]])).tolist() == [[-1e30, -1], [1e30, 1e20]]
    assert actions.low.tolist() == [-np.inf, -1]
    assert actions.high.tolist() == [np.inf, np.inf]


@pytest.mark.parametrize("name", ["box", "discrete from -1", "multidiscrete from 7"])
def test_a_vector_environment_takes_the_batch(name) -> None:
    received = []

    class Records(Shows):
        action_space = ACTIONS[name]

        def step(self, action):
            received.append(action)
            return self.observation_space.sample(), 0.0, False, False, {}

    env = gymnasium.vector.SyncVectorEnv([lambda: Records(spaces.Box(-1, 1, (2,)))] * 2)
    env.reset(seed=0)
    actions = Actions(env.single_action_space, "Env")
    rows = np.array([[0, 1], [2, 0]])[:, : actions.dim]
    env.step(actions.to_env_batch(rows))
    for got, expected in zip(received, actions.to_env(rows), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1, 1, (2, 2)),
        spaces.Box(-1, 1, ()),
        spaces.Box(0, 5, (2,), np.int32),
        spaces.MultiDiscrete([[2, 3]]),
        spaces.MultiBinary(2),
        spaces.Dict(a=spaces.Discrete(2)),
        spaces.Tuple([spaces.Discrete(2)]),
        spaces.Box(-1, 1, (0,)),
    ],
    ids=str,
)
def test_unsupported_actions_are_refused_in_one_sentence(space) -> None:
    with pytest.raises(EnvironmentMismatchError, match=r"^Some/Env-v0 .*action space .*\.$"):
        Actions(space, "Some/Env-v0")


# ------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("space", [*OBSERVATIONS.values(), *ACTIONS.values()], ids=[*OBSERVATIONS, *ACTIONS])
def test_json_round_trip(space) -> None:
    text = json.dumps(space_to_json(space), allow_nan=False)
    back = space_from_json(json.loads(text))
    assert back == space
    assert json.dumps(space_to_json(back), allow_nan=False) == text
    if isinstance(space, spaces.Box):  # whose equality allows a tolerance
        assert back.low.tobytes() == space.low.tobytes()
        assert back.high.tobytes() == space.high.tobytes()
    if isinstance(space, spaces.Dict):  # whose equality ignores the order, on which the vector depends
        assert list(back.spaces) == list(space.spaces)


def test_infinite_bounds_are_strings() -> None:
    written = space_to_json(OBSERVATIONS["half bounded"])
    assert (written["low"], written["high"]) == (["-inf", 0.0], [1.0, "inf"])


def test_a_changed_bound_changes_the_json() -> None:
    near = spaces.Box(-1, np.nextafter(np.float32(1), np.float32(2)), (2,))
    assert near == spaces.Box(-1, 1, (2,))  # control: gymnasium's equality does not see it
    assert space_to_json(near) != space_to_json(spaces.Box(-1, 1, (2,)))


def test_unknown_and_damaged_json() -> None:
    with pytest.raises(EnvironmentMismatchError, match="cannot be stored"):
        space_to_json(spaces.Dict(a=spaces.Text(3)))
    with pytest.raises(CheckpointError, match="newer"):
        space_from_json({"type": "Torus"})
    for damaged in ({}, {"type": "Box", "shape": [2]}, {"type": "Discrete", "n": 0}, {"type": "Dict", "spaces": [1]}):
        with pytest.raises(CheckpointError, match="restore"):
            space_from_json(damaged)
