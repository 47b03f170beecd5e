r"""What a check is: a claim, the problems it is tried on, what is measured, what was claimed, and what must fail.

A check is data and functions. `cases` makes batches of problems from a seed, `measure` returns what happened and
`bound` what was claimed, both for every problem of a batch; `assumptions` say on which problems the claim is made, and
`mutants` are the same check with one thing wrong, each of which must be caught, because a check that cannot fail
proves nothing. How a claim is decided follows from its kind:

``identity``     both sides are equal, up to rounding
``inequality``   measured <= bound, up to rounding
``mean``         E X <= bound, from independent runs: an anytime-valid confidence sequence (S1)
``probability``  P(bad) <= bound, from independent runs: exact binomial tests (S2)
``rate``         a curve falls like T^-p: the fitted slope and its bootstrap interval (S3); at best CONSISTENT
``fact``         yes or no

Author's guide with a worked example: docs/add_a_check.md.
"""

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..core.errors import CorollaryError, suggest

Kind = Literal["identity", "inequality", "mean", "probability", "rate", "fact"]
Tier = Literal["fast", "full"]

ROUNDING = 256 * 2.220446049250313e-16


class CheckError(CorollaryError):
    """A check that is not well-formed, or an id that does not exist."""


class Case:
    """A batch of B problems of one check: named tensors and models, all with the axis B first.

    Args:
        names: what each problem is called; B of them.
        parts: what the check's functions read, as attributes.
    """

    def __init__(self, names: Sequence[str], **parts: Any) -> None:
        self.names = tuple(names)
        self.parts = parts

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["parts"][name]
        except KeyError:
            raise AttributeError(f"This case has no part {name!r}; it has {', '.join(self.parts)}.") from None

    def __len__(self) -> int:
        return len(self.names)

    def filled(self, number: float) -> Tensor:
        """Return the same number for every problem, ``[B]``."""
        return torch.full((len(self),), number, dtype=torch.float64)

    def with_parts(self, **parts: Any) -> "Case":
        """Return a copy with some parts replaced or added."""
        return Case(self.names, **(self.parts | parts))


@dataclass(frozen=True)
class Draw:
    """How much to try, and the random numbers to try it with.

    Attributes:
        rng: NumPy's generator, seeded by check and run.
        tier: ``"fast"`` for the default test suite, ``"full"`` for a report.
    """

    rng: np.random.Generator
    tier: Tier = "fast"

    def number(self, fast: int, full: int) -> int:
        """Return how many problems (or runs, or steps) this tier affords."""
        return fast if self.tier == "fast" else full

    def generator(self) -> torch.Generator:
        """Return a PyTorch generator that continues these random numbers."""
        return torch.Generator().manual_seed(int(self.rng.integers(2**62)))


Function = Callable[[Case], Tensor]
Cases = Callable[[Draw], Iterable[Case]]


@dataclass(frozen=True)
class Mutant:
    """A check with one thing wrong; it must fail.

    Attributes:
        what: the mistake, in a few words.
        measure, bound, cases: what replaces the check's own; ``None`` leaves it.
        share: least share in (0, 1] of the problems that must be violated; 0 asks for one problem.
    """

    what: str
    measure: Function | None = None
    bound: Function | None = None
    cases: Cases | None = None
    share: float = 0.0


@dataclass(frozen=True)
class Adversary:
    """A search for the problem that comes nearest to a bound.

    Attributes:
        size: numbers that describe one problem.
        build: turns descriptions ``[n, size]``, any real numbers, into a case of n problems.
        scale: standard deviation of the first descriptions.
    """

    size: int
    build: Callable[[Tensor], Case]
    scale: float = 1.0


@dataclass(frozen=True)
class Check:
    """One claim and how it is tried.

    Attributes:
        id: short and unique, for instance ``"FND-05c"``.
        title: the claim in a few words.
        claim: the claim as a formula, with its assumptions.
        source: where it is stated, or that it is derived here.
        kind: decides how; see the module's head.
        cases: makes the problems.
        measure: what happened. Identity, inequality, fact: ``[B]`` or ``[B, ...]``, compared entry by entry. Mean and
            probability: independent runs ``[B, n]``. Rate: runs of a curve ``[B, n, points]``.
        bound: what was claimed, ``[B]`` or as `measure`. Rate: the claimed exponent p ``[B]``. Fact: what `measure`
            must equal.
        mutants: what must fail; at least one, except of a fact.
        tags: topics, and the names of the algorithms that rest on the claim.
        assumptions: by name, ``[B]`` bool: where False the claim is not made, and the problem is left out and counted.
        extremal: problems on which the bound is attained.
        adversary: search for such problems.
        trivial: a bound that holds anyway, ``[B]``; if it is nowhere larger, the check is VACUOUS.
        range: least and greatest value of X, for kind ``"mean"``; a function gives them for each problem, ``[B, 2]``.
        grid: the points T of a curve, for kind ``"rate"``.
        tolerance: of this check instead of rounding, relative to ``1 + |bound|``; printed with the result.
        not_mutants: natural mistakes that cannot be caught, with the reason.
        loose: why the bound may be far from attained, if it is.
    """

    id: str
    title: str
    claim: str
    source: str
    kind: Kind
    cases: Cases
    measure: Function
    bound: Function
    mutants: tuple[Mutant, ...]
    tags: tuple[str, ...] = ()
    assumptions: Mapping[str, Callable[[Case], Tensor]] = field(default_factory=lambda: MappingProxyType({}))
    extremal: Cases | None = None
    adversary: Adversary | None = None
    trivial: Function | None = None
    range: tuple[float, float] | Function | None = None
    grid: tuple[int, ...] = ()
    tolerance: float | None = None
    not_mutants: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    loose: str = ""

    def __post_init__(self) -> None:
        """Refuse a check that cannot fail, or lacks what its kind needs."""
        if self.kind not in get_args(Kind):
            raise CheckError(f"{self.id}: the kind {self.kind!r} is none of {', '.join(get_args(Kind))}.")
        if isinstance(self.tags, str):
            raise CheckError(f"{self.id}: tags are a tuple of names; got the string {self.tags!r}.")
        if not self.mutants and self.kind != "fact":
            raise CheckError(f"{self.id} has no mutant: a check that cannot fail proves nothing.")
        if self.kind == "mean" and self.range is None:
            raise CheckError(f"{self.id}: a check of a mean needs the range of what is averaged.")
        if self.kind == "rate" and len(self.grid) < 6:
            raise CheckError(f"{self.id}: a check of a rate needs a grid of at least 6 points.")

    @property
    def topic(self) -> str:
        """What the first part of the id stands for."""
        return TOPICS.get(self.id.partition("-")[0], "Others")


TOPICS = {
    "FND": "Foundations",
    "EXP": "Exploration",
    "REG": "Regularised control",
    "ROB": "Robustness",
    "RSK": "Risk",
    "PO": "Policy optimisation",
    "OFF": "Offline learning",
    "BAN": "Bandits",
    "GAM": "Games",
    "LLM": "Language models",
}
"""What the first part of an id stands for, in the order of reports; ids that begin otherwise come last."""

_REGISTRY: dict[str, Check] = {}


def register(check: Check) -> Check:
    """Add a check to the registry; raises a :class:`CheckError` if its id is taken."""
    if check.id in _REGISTRY:
        raise CheckError(f"There are two checks with the id {check.id}.")
    _REGISTRY[check.id] = check
    return check


def all_checks() -> dict[str, Check]:
    """Return every registered check by its id, topic by topic, in the order of ids."""
    importlib.import_module(f"{__package__}.catalogue")  # registers the library's own
    topics = [*TOPICS]

    def place(name: str) -> tuple[int, str]:
        topic = name.partition("-")[0]
        return (topics.index(topic) if topic in TOPICS else len(topics)), name

    return {name: _REGISTRY[name] for name in sorted(_REGISTRY, key=place)}


def select(*words: str) -> list[Check]:
    """Return the checks that `words` name: ids, beginnings of ids, tags, or an algorithm's name or last part.

    Raises:
        CheckError: for a word that names none; the nearest id or tag is suggested.
    """
    checks = list(all_checks().values())
    if not words:
        return checks
    known = sorted({c.id for c in checks} | {tag for c in checks for tag in c.tags})
    chosen: set[str] = set()
    for word in words:
        found = [
            c
            for c in checks
            if c.id.lower().startswith(word.lower())
            or any(word.lower() in (tag, tag.rpartition(".")[2]) for tag in c.tags)
        ]
        if not found:
            raise CheckError(f"No check is called {word!r} or has that tag.{suggest(word, known)}")
        chosen |= {c.id for c in found}
    return [c for c in checks if c.id in chosen]


def rounding(case: Case) -> float:
    """Return the relative tolerance for values of this case's model: 256 u (1 + gamma) / (1 - gamma) log2(2 + S).

    The factor is a bound on the condition of ``I - gamma P``. A case without a model gets 16 times that of gamma = 0,
    S = 10.
    """
    mdp = case.parts.get("mdp")
    if mdp is None:
        return ROUNDING * math.log2(12) * 16
    gamma = float(mdp.discount.max())
    return ROUNDING * (1 + gamma) / (1 - gamma) * math.log2(2 + mdp.n_states)
