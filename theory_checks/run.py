"""Running checks: every claim on its problems, every mutant, the search for tight problems; and what came out."""

import itertools
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .adversary import FLOOR, kept, search
from .check import Case, Cases, Check, CheckError, Draw, Function, Tier, rounding
from .inference import error_budget, fitted_slope, mean_at_most, probability_at_most

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE", "VACUOUS", "CONSISTENT", "ERROR"]

_RATE_MARGIN = 0.1


@dataclass(frozen=True)
class Point:
    """One problem: what was measured and what was claimed, at the entry where the two are closest to violation."""

    name: str
    measured: float
    bound: float
    holds: bool
    decided: bool = True
    origin: Literal["random", "extremal", "adversary"] = "random"
    telling: bool = True  # whether the bound is well above rounding, so that the ratio says something

    @property
    def ratio(self) -> float:
        """``measured / bound``; 1 is attained, nan says nothing."""
        return self.measured / self.bound if self.bound and self.telling else math.nan


@dataclass(frozen=True)
class Killed:
    """What became of a mutant: it must be caught."""

    what: str
    caught: bool
    share: float
    detail: str


@dataclass(frozen=True)
class Result:
    """What came out of one check.

    Attributes:
        check: the check.
        verdict: of the claim and its mutants together.
        points: one for each problem.
        mutants: one for each mutant.
        left_out: problems on which an assumption does not hold, by assumption.
        seconds: wall time.
        note: what a reader of the verdict must know (a fitted slope, an error).
        curve: of a rate: grid, mean error, for plots.
    """

    check: Check
    verdict: Verdict
    points: tuple[Point, ...]
    mutants: tuple[Killed, ...]
    left_out: dict[str, int]
    seconds: float
    note: str = ""
    curve: dict[str, list[float]] = field(default_factory=dict)

    @property
    def ratios(self) -> NDArray[np.float64]:
        """Finite ratios measured / bound of an inequality."""
        ratios = np.array([p.ratio for p in self.points], np.float64)
        return ratios[np.isfinite(ratios)]

    @property
    def max_ratio(self) -> float:
        """The tightest problem's ratio; nan where ratios mean nothing."""
        return float(self.ratios.max()) if self.check.kind in ("inequality", "mean") and self.ratios.size else math.nan

    @property
    def detectable(self) -> float:
        """The smallest factor by which the bound could be too small and be caught: 1 / `max_ratio`."""
        return 1 / self.max_ratio if self.max_ratio > 0 else math.nan

    @property
    def passed(self) -> bool:
        """Whether the row is green."""
        return self.verdict in ("PASS", "CONSISTENT")


def run_check(
    check: Check, tier: Tier = "fast", seed: int = 0, number: int = 1, adversary: bool | None = None
) -> Result:
    """Run one check, its mutants and its search.

    Args:
        check: the check.
        tier: how much to try.
        seed: of all random numbers; the same seed gives the same result.
        number: position of this check among the statistical ones of the run, from 1: its share of the error budget.
        adversary: search for tight problems, from the kept one on; by default in the full tier only. Without a search
            the kept one is tried.

    Raises:
        CheckError: for another tier, or a negative seed.
    """
    if tier not in get_args(Tier) or seed < 0:
        raise CheckError(
            f"A check runs with a tier of {', '.join(get_args(Tier))} and a seed >= 0; got {tier!r}, {seed}."
        )
    began = time.perf_counter()
    try:
        result = _run(check, tier, seed, number, tier == "full" if adversary is None else adversary)
    except Exception as error:  # a check that breaks must not end the report
        result = Result(check, "ERROR", (), (), {}, 0.0, f"{type(error).__name__}: {error}")
    return Result(**{**result.__dict__, "seconds": time.perf_counter() - began})


def run_checks(
    checks: Sequence[Check],
    tier: Tier = "fast",
    seed: int = 0,
    *,
    adversary: bool | None = None,
    tell: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Run checks one after the other and `tell` each result as it comes."""
    results = []
    for check, number in numbered(checks):
        results.append(run_check(check, tier, seed, number, adversary))
        tell(results[-1])
    return results


def numbered(checks: Iterable[Check]) -> Iterator[tuple[Check, int]]:
    """Yield each check with its position among the statistical ones of a run, from 1; it sets the error budget."""
    statistical = 0
    for check in checks:
        statistical += check.kind in ("mean", "probability", "rate")
        yield check, max(1, statistical)


def _run(check: Check, tier: Tier, seed: int, number: int, adversary: bool) -> Result:
    shares = _shares(number)
    left_out: dict[str, int] = {}
    points: list[Point] = []
    notes: list[str] = []
    curve: dict[str, list[float]] = {}
    vacuous = check.trivial is not None
    for origin, cases in (("random", check.cases), ("extremal", check.extremal)):
        if cases is None:
            continue
        for case in _admitted(check, cases(_draw(check, tier, seed)), left_out):
            new, note, found = _decide(check, case, check.measure, check.bound, shares, origin)
            points += new
            notes += [note] if note else []
            curve |= found
            if check.trivial is not None:
                vacuous &= bool((check.bound(case) >= check.trivial(case)).all())
    if check.adversary is not None:
        tightest = search(check, tier, seed) if adversary else kept(check)
        if tightest is not None:
            built = check.adversary.build(tightest)
            points += _decide(check, built, check.measure, check.bound, shares, "adversary")[0]
    killed = tuple(_try_mutant(check, index, tier, seed, _shares(number)) for index in range(len(check.mutants)))
    verdict = _verdict(check, points, killed, vacuous)
    notes += _reasons(verdict, points, killed, vacuous)
    return Result(check, verdict, tuple(points), killed, left_out, 0.0, "; ".join(notes), curve)


def _reasons(verdict: Verdict, points: Sequence[Point], killed: Sequence[Killed], vacuous: bool) -> list[str]:
    """Say in a sentence why the verdict is not a pass."""
    if verdict == "FAIL":
        broken = [p for p in points if not p.holds]
        first = f"{broken[0].name}: measured {broken[0].measured:.6g}, claimed {broken[0].bound:.6g}"
        return [f"{len(broken)} of {len(points)} problems break it, {first}"]
    if verdict == "INCONCLUSIVE":
        undecided = [p.name for p in points if not p.decided]
        return [f"{len(undecided)} of {len(points)} problems are not decided, {undecided[0]} the first"]
    if verdict == "VACUOUS":
        passed = [f"the mutant {k.what!r} was not caught" for k in killed if not k.caught]
        return passed + (["the bound is nowhere below what holds anyway"] if vacuous else [])
    return []


def _verdict(check: Check, points: Sequence[Point], killed: Sequence[Killed], vacuous: bool) -> Verdict:
    if not points:
        raise CheckError(f"{check.id}: no problem meets the assumptions.")
    if not all(p.holds for p in points):
        return "FAIL"
    if not all(p.decided for p in points):
        return "INCONCLUSIVE"
    if vacuous or not all(k.caught for k in killed):
        return "VACUOUS"
    return "CONSISTENT" if check.kind == "rate" else "PASS"


def _shares(number: int) -> Iterator[float]:
    """Yield the error probability of each problem of check `number`; with all other checks' they add up to 1e-4."""
    whole = error_budget(number)
    return (error_budget(problem, whole) for problem in itertools.count(1))


def _draw(check: Check, tier: Tier, seed: int) -> Draw:
    return Draw(np.random.default_rng([seed, zlib.crc32(check.id.encode())]), tier)


def _admitted(check: Check, cases: Iterable[Case], left_out: dict[str, int]) -> Iterable[Case]:
    """Yield the cases' problems on which every assumption holds; count the others."""
    for case in cases:
        keep = torch.ones(len(case), dtype=torch.bool)
        for name, holds in check.assumptions.items():
            here = holds(case)
            left_out[name] = left_out.get(name, 0) + int((keep & ~here).sum())
            keep &= here
        if bool(keep.all()):
            yield case
        elif bool(keep.any()):
            yield _part(case, keep)


def _part(case: Case, keep: Tensor) -> Case:
    where = keep.nonzero().squeeze(1)

    def chosen(part: object) -> object:
        if isinstance(part, Tensor) and part.ndim and len(part) == len(case):
            return part[where]
        return part[where] if hasattr(part, "transition") else part  # type: ignore[index]

    return Case([case.names[int(i)] for i in where], **{name: chosen(part) for name, part in case.parts.items()})


# ------------------------------------------------------------------------------------------------------ decisions


def _decide(
    check: Check, case: Case, measure: Function, bound: Function, shares: Iterator[float], origin: str
) -> tuple[list[Point], str, dict[str, list[float]]]:
    measured, claimed = measure(case), bound(case)
    if check.kind in ("identity", "inequality", "fact"):
        return _compared(check, case, measured, claimed, origin), "", {}
    points, notes, curve = [], [], {}
    for i, name in enumerate(case.names):
        runs, limit = measured[i].numpy(), float(claimed[i])
        if check.kind == "rate":
            slope = fitted_slope(check.grid, runs, np.random.default_rng(0))
            holds = slope.low <= -limit + _RATE_MARGIN
            points.append(Point(name, slope.exponent, -limit, holds, origin=origin))  # type: ignore[arg-type]
            notes.append(f"slope only: {slope.exponent:.2f} [{slope.low:.2f}, {slope.high:.2f}], claimed {-limit:.2f}")
            curve = {"grid": [float(t) for t in check.grid], "error": runs.mean(0).tolist(), "claimed": [-limit]}
            continue
        if check.kind == "mean":
            assert check.range is not None
            low, high = check.range if isinstance(check.range, tuple) else check.range(case)[i].tolist()
            interval = mean_at_most(runs, limit, next(shares), low, high)
        else:
            interval = probability_at_most(runs, limit, next(shares))
        points.append(
            Point(
                name,
                float(np.mean(runs)),
                limit,
                interval.decision != "FAIL",
                interval.decision != "INCONCLUSIVE",
                origin,  # type: ignore[arg-type]
            )
        )
    return points, "; ".join(notes), curve


def _compared(check: Check, case: Case, measured: Tensor, claimed: Tensor, origin: str) -> list[Point]:
    """One point for each problem: the entry that is worst."""
    for side in (measured, claimed):
        if not isinstance(side, Tensor) or side.shape[:1] != (len(case),):
            raise CheckError(f"{check.id}: measure and bound must return tensors with {len(case)} rows.")
    axes = max(measured.ndim, claimed.ndim)
    # Numbers of one side stand for all entries of their problem: a shorter side gets its missing axes at the end.
    sides = (side.double().reshape(*side.shape, *[1] * (axes - side.ndim)) for side in (measured, claimed))
    left, right = torch.broadcast_tensors(*sides)
    left, right = left.reshape(len(case), -1), right.reshape(len(case), -1)
    if check.kind == "fact":
        gap, scale = (left - right).abs(), torch.zeros_like(left)
    else:
        gap = (left - right).abs() if check.kind == "identity" else left - right
        scale = 1 + torch.maximum(left.abs(), right.abs()).amax(1, keepdim=True)
    relative = rounding(case) if check.tolerance is None else check.tolerance
    excess = gap - relative * scale
    excess = torch.where(excess.isnan(), torch.full_like(excess, torch.inf), excess)
    telling = right > FLOOR * relative * scale
    if check.kind == "inequality":  # of entries that hold the tightest, unless rounding makes it
        tightness = torch.where(telling, left / right, torch.full_like(left, -torch.inf))
        worst = torch.where((excess > 0).any(1), excess.argmax(1), tightness.argmax(1))
    else:
        worst = excess.argmax(1)
    rows = torch.arange(len(case))
    found = (left[rows, worst], right[rows, worst], excess.amax(1), telling[rows, worst])
    return [
        Point(name, float(m), float(b), bool(e <= 0), origin=origin, telling=bool(t))  # type: ignore[arg-type]
        for name, m, b, e, t in zip(case.names, *found, strict=True)
    ]


def _try_mutant(check: Check, index: int, tier: Tier, seed: int, shares: Iterator[float]) -> Killed:
    mutant = check.mutants[index]
    measure, bound = mutant.measure or check.measure, mutant.bound or check.bound
    sources: list[Cases] = [mutant.cases] if mutant.cases is not None else [check.cases]
    if mutant.cases is None and check.extremal is not None:
        sources.append(check.extremal)
    points: list[Point] = []
    for cases in sources:
        given = cases(_draw(check, tier, seed))
        # A mutant with cases of its own may break an assumption: that is then what it is about.
        admitted = given if mutant.cases is not None else _admitted(check, given, {})
        for case in admitted:
            points += _decide(check, case, measure, bound, shares, "random")[0]
    # A number that is none is no violation: it says that the mutant could not be measured.
    violated = [p for p in points if not p.holds and not math.isnan(p.measured) and not math.isnan(p.bound)]
    share = len(violated) / len(points) if points else 0.0
    caught = bool(violated) and share >= mutant.share
    example = max(violated, key=lambda p: abs(p.measured - p.bound), default=None)
    detail = f"{len(violated)} of {len(points)} violated"
    if example is not None:
        detail += f", for instance {example.name}: {example.measured:.4g} against {example.bound:.4g}"
    return Killed(mutant.what, caught, share, detail)
