"""Configurations: frozen dataclasses whose defaults are the paper's, their checks, and named presets with a source."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from .dataset import View
from .errors import ConfigError, suggest

C = TypeVar("C")
Sampling = Literal["uniform", "return", "advantage"]


@dataclass(frozen=True)
class Preset:
    """Settings that a source used for one family of datasets.

    Attributes:
        settings: the fields that differ from the defaults.
        source: where they stand, with the confidence tag of the reference card.
    """

    settings: Mapping[str, Any]
    source: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all settings: every field is of its annotated type, every float finite."""

    def __post_init__(self) -> None:
        """Check types; subclasses check ranges after calling this."""
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            finite = ", finite" if isinstance(value, float) and not math.isfinite(value) else ""
            self.require(f.name, _fits(value, f.type), f"of type {_name(f.type)}{finite}")

    def require(self, name: str, holds: bool, allowed: str) -> None:
        """Raise a :class:`ConfigError` naming the field, its value and the allowed range unless `holds`."""
        if not holds:
            raise ConfigError(f"{type(self).__name__}.{name} must be {allowed}; got {getattr(self, name)!r}.")


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Base of all configurations.

    Attributes:
        hidden: widths of the hidden layers of every network.
    """

    hidden: tuple[int, ...] = (256, 256)


@dataclass(frozen=True, kw_only=True)
class OfflineConfig(Config):
    """What every offline algorithm shares.

    Attributes:
        batch_size: rows per gradient step, drawn with replacement; at least 1.
        state_transform: ``"standardize"`` is (s - mean) / (std + 1e-3) with the dataset's statistics; ``"none"``.
        reward_transform: a name of :mod:`corollary.core.transforms`, or several applied in order.
        view: ``"full"`` trains on every row with a known successor; ``"d4rl_qlearning"`` on exactly the rows that
            D4RL's ``qlearning_dataset`` gives (drops every timeout row and the last row), as most published runs did; a
            preset changes it only where it says so.
        sampling: which rows a step draws: all alike (``"uniform"``), or more of trajectories with a high ``"return"``,
            or a high ``"advantage"`` over what their first state promises (:mod:`corollary.core.sampling`).
        sampling_temperature: alpha > 0 of that soft-max over scores in [0, 1]; small values draw the best trajectory
            alone, large ones draw all rows alike. 0.1 and 0.2 are published. Unused with ``sampling="uniform"``.
        sampling_per: ``"transition"``: a trajectory's share grows with its length, as in the published runs;
            ``"trajectory"``: it does not.
        weighting: ``"sample"`` draws rows with these probabilities; ``"loss"`` draws all alike and multiplies each
            row's share of every loss instead.
    """

    batch_size: int = 256
    state_transform: str = "standardize"
    reward_transform: str | tuple[str, ...] = "none"
    view: View = "full"
    sampling: Sampling = "uniform"
    sampling_temperature: float = 0.1
    sampling_per: Literal["transition", "trajectory"] = "transition"
    weighting: Literal["sample", "loss"] = "sample"

    def __post_init__(self) -> None:
        """Check types and ranges; subclasses check theirs after calling this."""
        super().__post_init__()
        self.require("batch_size", self.batch_size >= 1, "at least 1")
        self.require("hidden", len(self.hidden) >= 1 and min(self.hidden) >= 1, "one or more positive widths")
        self.require("sampling_temperature", self.sampling_temperature > 0, "> 0")
        reweighted = self.sampling != "uniform"
        self.require("weighting", reweighted or self.weighting == "sample", "'sample' unless sampling reweights rows")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type: plain types, literals, tuples and unions of them; floats finite."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return value in parts
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        elements = parts[:1] * len(value) if parts[-1] is ... else parts
        return len(elements) == len(value) and all(map(_fits, value, elements))
    if parts:
        return any(_fits(value, part) for part in parts)
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")


def make_config(kind: type[C], options: Mapping[str, Any], presets: Mapping[str, Preset], preset: str | None) -> C:
    """Build a configuration from defaults, then a preset, then explicit options.

    Raises:
        ConfigError: for an unknown preset or option (the nearest name is suggested), or a value out of range.
    """
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    settings: dict[str, Any] = {}
    if preset is not None:
        if preset not in presets:
            there = ", ".join(presets) or "none"
            raise ConfigError(f"Unknown preset {preset!r} (there are: {there}).{suggest(preset, presets)}")
        settings |= presets[preset].settings
    for name, value in options.items():
        if name not in known:
            raise ConfigError(f"Unknown option {name!r}; {kind.__name__} has {', '.join(known)}.{suggest(name, known)}")
        value = value.item() if isinstance(value, np.generic) else value
        settings[name] = tuple(value) if isinstance(value, list) else value
    return kind(**settings)


def parse_option(kind: type[Any], text: str) -> tuple[str, Any]:
    """Read ``name=value`` for a configuration class, converting the value to the field's type.

    Raises:
        ConfigError: if there is no ``=``, no such field, or the value does not convert.
    """
    name, equals, raw = text.partition("=")
    known = {f.name: f for f in dataclasses.fields(kind)}
    if not equals:
        raise ConfigError(f"Options are written name=value; got {text!r}.")
    if name not in known:
        raise ConfigError(f"Unknown option {name!r}; {kind.__name__} has {', '.join(known)}.{suggest(name, known)}")
    return name, _convert(name, raw, known[name].default, known[name].type)


def _convert(name: str, raw: str, default: Any, kind: Any) -> Any:
    if raw.lower() in ("none", "null") and not isinstance(default, str):
        return None
    given = [each for each in typing.get_args(kind) if each is not type(None)]
    if type(None) in typing.get_args(kind) and len(given) == 1:
        (kind,) = given
    try:
        if kind is bool:
            return {"true": True, "false": False}[raw.lower()]
        if typing.get_origin(kind) is tuple:
            element = typing.get_args(kind)[0]
            return tuple(element(part) for part in raw.strip("()[]").split(",") if part)
        if isinstance(default, str) or kind is str:
            parts = tuple(part for part in raw.split("+") if part)
            return parts if len(parts) > 1 else raw
        if kind is int:
            return int(raw)
        return float(raw)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"Option {name} cannot be {raw!r}: its default is {default!r}.") from error
