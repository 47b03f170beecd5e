"""Configurations: presets, explicit options, ranges, suggestions, and reading options from text."""

import dataclasses
import json

import numpy as np
import pytest

from corollary.core.config import OfflineConfig, Preset, make_config, parse_option
from corollary.core.errors import ConfigError, suggest
from corollary.offline.awac import AWACConfig
from corollary.offline.odice import ODICEConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(OfflineConfig):
    """One field of every kind that configurations have."""

    rate: float = 0.5
    horizon: int | None = 10
    limits: tuple[float, float] = (-1.0, 1.0)
    fast: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("rate", 0 < self.rate <= 1, "in (0, 1]")


PRESETS = {"slow": Preset({"rate": 0.1, "horizon": None}, "a paper")}


def test_defaults_then_preset_then_options() -> None:
    assert make_config(Example, {}, PRESETS, None) == Example()
    assert make_config(Example, {}, PRESETS, "slow") == Example(rate=0.1, horizon=None)
    assert make_config(Example, {"rate": 0.2}, PRESETS, "slow") == Example(rate=0.2, horizon=None)


def test_json_gives_back_an_identical_configuration() -> None:
    config = Example(hidden=(64, 32), reward_transform=("a", "b"), limits=(-5.0, 2.0), rate=0.1 + 0.2)
    text = json.dumps(dataclasses.asdict(config))
    assert make_config(Example, json.loads(text), {}, None) == config


@pytest.mark.parametrize(
    ("options", "preset", "message"),
    [
        ({"raet": 1}, None, r"Unknown option 'raet'; Example has .*rate.*Did you mean 'rate'\?"),
        ({"zzz": 1}, None, "Unknown option 'zzz'"),
        ({}, "slwo", r"Unknown preset 'slwo' \(there are: slow\)\. Did you mean 'slow'\?"),
        ({"rate": 0}, None, r"Example\.rate must be in \(0, 1\]; got 0\."),
        ({"rate": float("nan")}, None, "rate must be of type float, finite; got nan"),
        ({"weighting": "loss"}, None, "weighting must be 'sample' unless sampling reweights rows"),
        ({"batch_size": 0}, None, "batch_size must be at least 1; got 0"),
        ({"hidden": ()}, None, "hidden must be one or more positive widths"),
        ({"hidden": [64, 0]}, None, r"hidden must be .* got \(64, 0\)"),
        ({"view": "flat"}, None, r"view must be of type Literal\['full', 'd4rl_qlearning'\]; got 'flat'"),
    ],
)
def test_bad_settings_are_named(options, preset, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(Example, options, PRESETS, preset)


def test_a_suggestion_is_made_only_for_near_names() -> None:
    with pytest.raises(ConfigError) as error:
        make_config(Example, {"zzz": 1}, PRESETS, None)
    assert "Did you mean" not in str(error.value)


def test_configurations_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Example().rate = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rate=1e-3", ("rate", 1e-3)),
        ("rate=1", ("rate", 1.0)),
        ("batch_size=64", ("batch_size", 64)),
        ("horizon=none", ("horizon", None)),
        ("horizon=5", ("horizon", 5)),
        ("hidden=64,32", ("hidden", (64, 32))),
        ("hidden=(64,)", ("hidden", (64,))),
        ("limits=-20,2", ("limits", (-20.0, 2.0))),
        ("fast=True", ("fast", True)),
        ("fast=false", ("fast", False)),
        ("view=full", ("view", "full")),
        ("reward_transform=none", ("reward_transform", "none")),
        ("reward_transform=a+b", ("reward_transform", ("a", "b"))),
    ],
)
def test_options_read_from_text_have_the_type_of_their_field(text, expected) -> None:
    name, value = parse_option(Example, text)
    assert (name, value) == expected
    assert type(value) is type(expected[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate", "Options are written name=value; got 'rate'"),
        ("raet=1", r"Unknown option 'raet'.*Did you mean 'rate'\?"),
        ("rate=fast", r"Option rate cannot be 'fast'.*0\.5"),
        ("batch_size=2.5", "Option batch_size cannot be '2.5'"),
        ("fast=yes", "Option fast cannot be 'yes'"),
        ("hidden=wide", "Option hidden cannot be 'wide'"),
    ],
)
def test_unreadable_options_are_named(text, message) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_option(Example, text)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"rate": "0.5"}, "float"),
        ({"rate": float("inf")}, "float, finite"),
        ({"rate": True}, "float"),
        ({"batch_size": 2.5}, "int"),
        ({"hidden": 256}, r"tuple\[int, \.\.\.\]"),
        ({"hidden": [16.5]}, r"tuple\[int, \.\.\.\]"),
        ({"reward_transform": 3}, r"str \| tuple\[str, \.\.\.\]"),
    ],
)
def test_settings_of_another_type_are_refused(options, kind) -> None:
    with pytest.raises(ConfigError, match=f"must be of type {kind}; got"):
        make_config(Example, options, {}, None)


def test_the_elements_of_a_tuple_are_read_by_its_annotation() -> None:
    """Also where the default is empty and shows no element."""
    from corollary.online import PPOConfig

    assert parse_option(PPOConfig, "critic_hidden=32,16") == ("critic_hidden", (32, 16))
    with pytest.raises(ConfigError, match="Option critic_hidden cannot be 'wide'"):
        parse_option(PPOConfig, "critic_hidden=wide")


def test_options_that_may_be_none_have_the_type_of_their_field() -> None:
    assert parse_option(AWACConfig, "actor_lr_decay_steps=100") == ("actor_lr_decay_steps", 100)
    assert parse_option(AWACConfig, "actor_hidden=32,16") == ("actor_hidden", (32, 16))
    assert parse_option(ODICEConfig, "actor_hidden=32,16") == ("actor_hidden", (32, 16))  # its default is no None
    assert parse_option(AWACConfig, "actor_hidden=none") == ("actor_hidden", None)
    with pytest.raises(ConfigError, match="actor_lr_decay_steps cannot be 'soon'"):
        parse_option(AWACConfig, "actor_lr_decay_steps=soon")


def test_numpy_numbers_are_numbers() -> None:
    config = make_config(Example, {"rate": np.float32(0.25), "batch_size": np.int64(8), "fast": np.True_}, {}, None)
    assert config == Example(rate=0.25, batch_size=8, fast=True)
    assert json.dumps(dataclasses.asdict(config))
    with pytest.raises(ConfigError, match="batch_size must be of type int; got"):
        make_config(Example, {"batch_size": np.float64(8.5)}, {}, None)


@pytest.mark.parametrize(
    ("name", "known", "nearest"),
    [
        ("bta", ["alpha", "beta"], "beta"),
        ("PPO", ["online.ppo", "online.spo"], "online.ppo"),
        ("td3bc", ["offline.bc", "offline.td3_bc"], "offline.td3_bc"),
        ("HOPPER", ["hopper", "walker2d"], "hopper"),
        ("hopper-v4", ["Hopper-v5"], "Hopper-v5"),
        ("zzz", ["alpha", "beta"], None),
    ],
)
def test_the_nearest_name_whatever_its_case(name, known, nearest) -> None:
    assert suggest(name, known) == ("" if nearest is None else f" Did you mean {nearest!r}?")
