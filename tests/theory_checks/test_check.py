"""The framework on made-up checks: each verdict, assumptions, mutants, the search for tight problems, the command."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from corollary.cli import main
from corollary.theory_checks import check as checks
from corollary.theory_checks.check import Adversary, Case, Check, CheckError, Draw, Mutant, register, rounding, select
from corollary.theory_checks.families import garnet
from corollary.theory_checks.report import summary_line, write_html, write_json
from corollary.theory_checks.run import Point, Result, run_check, run_checks


def numbers(draw: Draw) -> Iterator[Case]:
    """Ten numbers x in [0, 1) and some y."""
    for part in range(2):
        names = [f"number {part}.{i}" for i in range(5)]
        yield Case(names, x=torch.from_numpy(draw.rng.random(5)), y=torch.arange(5.0))


def made(**changes: Any) -> Check:
    """A check of ``x^2 <= x``, which holds on [0, 1]."""
    parts: dict[str, Any] = {
        "id": "TOY-1",
        "title": "squares",
        "claim": "x^2 <= x on [0, 1]",
        "source": "nobody",
        "kind": "inequality",
        "tags": ("toys", "offline.prdc"),
        "cases": numbers,
        "measure": lambda case: case.x**2,
        "bound": lambda case: case.x,
        "mutants": (Mutant("a tenth", bound=lambda case: case.x / 10),),
    }
    return Check(**(parts | changes))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Check]:
    """A registry with nothing in it."""
    empty: dict[str, Check] = {}
    checks.all_checks()
    monkeypatch.setattr(checks, "_REGISTRY", empty)
    return empty


def verdict(**changes: Any) -> str:
    return run_check(made(**changes)).verdict


# -------------------------------------------------------------------------------------------------------- verdicts


def test_pass() -> None:
    result = run_check(made())
    assert (result.verdict, result.passed, len(result.points)) == ("PASS", True, 10)
    assert result.mutants[0].caught
    assert 0 < result.max_ratio < 1
    assert result.detectable == pytest.approx(1 / result.max_ratio)
    assert result.seconds > 0


def test_fail_names_the_problem() -> None:
    result = run_check(made(measure=lambda case: 2 * case.x))
    assert (result.verdict, result.passed) == ("FAIL", False)
    violated = [p for p in result.points if not p.holds]
    assert len(violated) == 10
    assert violated[0].measured == pytest.approx(2 * violated[0].bound)
    assert violated[0].name == "number 0.0"
    assert result.note.startswith("10 of 10 problems break it, number 0.0: measured ")


def test_a_single_entry_of_a_single_problem_makes_it_fail() -> None:
    def measure(case: Case) -> Tensor:
        rows = torch.zeros(len(case), 3, dtype=torch.float64)
        rows[-1, 1] = 2
        return rows

    result = run_check(made(measure=measure, bound=lambda case: torch.ones(len(case))))
    assert [p.holds for p in result.points] == [True] * 4 + [False] + [True] * 4 + [False]
    assert result.points[4].measured == 2


def test_a_number_for_each_problem_is_compared_with_all_entries_of_its_own_problem() -> None:
    # As many entries as problems: what is meant for problem i must not be taken for entry i.
    limit = torch.arange(5.0, dtype=torch.float64)
    wide = made(measure=lambda case: limit.unsqueeze(1).expand(5, 5), bound=lambda case: limit)
    assert all(p.holds for p in run_check(wide).points)
    narrow = made(measure=lambda case: limit, bound=lambda case: limit.unsqueeze(1).expand(5, 5))
    assert all(p.holds for p in run_check(narrow).points)
    swapped = made(measure=lambda case: limit.expand(5, 5), bound=lambda case: limit)
    assert [p.holds for p in run_check(swapped).points] == [False] * 4 + [True] + [False] * 4 + [True]


def test_not_a_number_fails() -> None:
    assert verdict(measure=lambda case: case.x * float("nan")) == "FAIL"


def test_inconclusive() -> None:
    def runs(case: Case) -> Tensor:
        return case.x.new_tensor(np.random.default_rng(0).random((len(case), 50)))

    result = run_check(
        made(kind="mean", range=(0.0, 1.0), measure=runs, bound=lambda case: torch.full_like(case.x, 0.5))
    )
    assert result.verdict == "INCONCLUSIVE"
    assert not result.passed
    assert re.search(r"^\d+ of 10 problems are not decided, number 0.0 the first$", result.note.rpartition("; ")[2])


def test_vacuous_because_a_mutant_passes() -> None:
    result = run_check(made(mutants=(Mutant("nothing wrong", bound=lambda case: case.x),)))
    assert result.verdict == "VACUOUS"
    assert (result.mutants[0].caught, result.mutants[0].detail) == (False, "0 of 10 violated")
    assert result.note == "the mutant 'nothing wrong' was not caught"


def test_vacuous_because_a_mutant_cannot_be_measured() -> None:
    result = run_check(made(mutants=(Mutant("nothing there", measure=lambda case: case.x * float("nan")),)))
    assert (result.verdict, result.mutants[0].caught) == ("VACUOUS", False)


def test_vacuous_because_too_few_problems_notice_the_mutant() -> None:
    mutant = Mutant("three of five", bound=lambda case: case.x * (case.y < 2), share=0.7)
    assert verdict(mutants=(mutant,)) == "VACUOUS"
    assert verdict(mutants=(Mutant(mutant.what, bound=mutant.bound, share=0.6),)) == "PASS"


def test_vacuous_because_the_bound_says_nothing() -> None:
    ones = lambda case: torch.ones_like(case.x)  # noqa: E731
    result = run_check(
        made(bound=lambda case: 1 + case.x, trivial=ones, mutants=(Mutant("0", bound=lambda c: 0 * c.x),))
    )
    assert (result.verdict, result.note) == ("VACUOUS", "the bound is nowhere below what holds anyway")
    assert verdict(trivial=ones) == "PASS"


def rate(power: float, claimed: float, runs: int = 30) -> Result:
    grid = tuple(2**k for k in range(4, 11))

    def curves(case: Case) -> Tensor:
        noise = torch.from_numpy(np.random.default_rng(0).uniform(0.8, 1.2, (len(case), runs, len(grid))))
        return noise * torch.tensor(grid, dtype=torch.float64) ** -power

    def wanted(case: Case) -> Tensor:
        return torch.full((len(case),), claimed)

    flat = Mutant("flat", measure=lambda case: torch.ones(len(case), runs, len(grid)))
    return run_check(made(kind="rate", grid=grid, measure=curves, bound=wanted, mutants=(flat,)))


def test_consistent_is_the_best_that_a_slope_can_be() -> None:
    found = rate(0.5, 0.5)
    assert (found.verdict, found.passed) == ("CONSISTENT", True)
    assert "slope only: -0.5" in found.note
    assert found.curve["claimed"] == [-0.5]
    assert len(found.curve["error"]) == len(found.curve["grid"]) == 7
    assert rate(1.0, 0.5).verdict == "CONSISTENT"  # faster than claimed
    assert rate(0.25, 0.5).verdict == "FAIL"


def test_error_says_what_broke_and_ends_nothing() -> None:
    def broken(case: Case) -> Tensor:
        raise RuntimeError("no such thing")

    results = run_checks([made(measure=broken), made()])
    assert [r.verdict for r in results] == ["ERROR", "PASS"]
    assert results[0].note == "RuntimeError: no such thing"


@pytest.mark.parametrize("wrong", [lambda case: case.x[:3], lambda case: 1.0, lambda case: case.x.sum()])
def test_error_where_a_side_has_not_one_row_per_problem(wrong) -> None:
    result = run_check(made(measure=wrong))
    assert result.verdict == "ERROR"
    assert "must return tensors with 5 rows" in result.note


def test_error_where_no_problem_is_left() -> None:
    result = run_check(made(assumptions={"never": lambda case: case.x < 0}))
    assert result.verdict == "ERROR"
    assert "no problem meets the assumptions" in result.note


# ------------------------------------------------------------------------------------------------------ other kinds


def test_an_identity_is_held_to_rounding_from_both_sides() -> None:
    one = made(kind="identity", measure=lambda case: case.x + 1e-13, bound=lambda case: case.x)
    assert run_check(one).verdict == "PASS"
    for shift in (1e-10, -1e-10):
        off = made(kind="identity", measure=lambda case, d=shift: case.x + d, bound=lambda case: case.x)
        assert run_check(off).verdict == "FAIL"
        assert run_check(made(**{**vars(off), "tolerance": 1e-9})).verdict == "PASS"
    assert math.isnan(run_check(one).max_ratio)


def test_a_fact_allows_no_rounding() -> None:
    kind = {"kind": "fact", "bound": lambda case: torch.ones(len(case))}
    assert verdict(**kind, measure=lambda case: torch.ones(len(case)), mutants=()) == "PASS"
    assert verdict(**kind, measure=lambda case: torch.ones(len(case)) * (1 + 1e-6), mutants=()) == "FAIL"


def test_a_probability() -> None:
    def bad(share: float) -> Any:
        return lambda case: torch.arange(1000).expand(len(case), -1) < 1000 * share

    kind = {"kind": "probability", "bound": lambda case: torch.full((len(case),), 0.1)}
    mutants = (Mutant("all bad", measure=bad(1.0)),)
    assert verdict(**kind, measure=bad(0.01), mutants=mutants) == "PASS"
    assert verdict(**kind, measure=bad(0.1), mutants=mutants) == "INCONCLUSIVE"
    assert verdict(**kind, measure=bad(0.3), mutants=mutants) == "FAIL"


def test_a_mean_that_is_decided() -> None:
    def runs(centre: float) -> Any:
        return lambda case: torch.from_numpy(np.random.default_rng(0).random((len(case), 3000)) * 2 * centre)

    kind = {"kind": "mean", "range": (0.0, 2.0), "bound": lambda case: torch.full_like(case.x, 0.6)}
    mutants = (Mutant("twice", measure=runs(0.9)),)
    assert verdict(**kind, measure=runs(0.3), mutants=mutants) == "PASS"
    assert verdict(**kind, measure=runs(0.9), mutants=mutants) == "FAIL"


def test_statistical_checks_and_their_problems_share_the_budget() -> None:
    seen = []

    def runs(case: Case) -> Tensor:
        return torch.zeros(len(case), 400, dtype=torch.bool)

    def limit(share: float) -> Check:
        parts = {"kind": "probability", "measure": runs, "bound": lambda case: torch.full((len(case),), share)}
        two = {"cases": lambda draw: [Case(["first"]), Case(["second"])]}
        return made(**parts, **two, mutants=(Mutant("bad", measure=lambda case: ~runs(case)),))

    # 400 clean runs show less than 1 - alpha^(1/400), alpha = 1e-4 (6 / pi^2)^2 / (j i)^2 for problem i of test j:
    # 0.0252 and 0.0286 in the first test of a run, 0.0286 and 0.0319 in the second.
    run_checks([limit(0.030), made(), limit(0.030)], tell=seen.append)
    assert [r.verdict for r in seen] == ["PASS", "PASS", "INCONCLUSIVE"]
    assert [p.decided for p in seen[2].points] == [True, False]


# ------------------------------------------------------------------------------------------------------ assumptions


def test_problems_left_out_are_counted_by_the_first_assumption_that_fails() -> None:
    result = run_check(
        made(
            assumptions={"y < 4": lambda case: case.y < 4, "y > 0": lambda case: (case.y > 0) & (case.y < 4)},
            measure=lambda case: case.x**2 + 10 * ((case.y == 0) | (case.y == 4)),
        )
    )
    assert result.verdict == "PASS"
    assert result.left_out == {"y < 4": 2, "y > 0": 2}
    assert [p.name for p in result.points] == [f"number {part}.{i}" for part in range(2) for i in (1, 2, 3)]


def test_models_are_left_out_with_their_tensors() -> None:
    def cases(draw: Draw) -> Iterator[Case]:
        mdp = garnet(draw.rng, 4, 3, 2, 2, [0.0, 0.5, 0.9, 0.99])
        yield Case(mdp.names, mdp=mdp, x=torch.arange(4.0), shared=torch.zeros(7), said="so")

    seen = []

    def measure(case: Case) -> Tensor:
        seen.append((case.mdp.discount.tolist(), case.x.tolist(), len(case.shared), case.said))
        return torch.zeros(len(case))

    result = run_check(made(cases=cases, assumptions={"far": lambda case: case.mdp.discount > 0.6}, measure=measure))
    assert seen[0] == ([0.9, 0.99], [2.0, 3.0], 7, "so")
    assert result.left_out == {"far": 2}


def test_a_mutant_with_its_own_problems_may_break_an_assumption() -> None:
    def outside(draw: Draw) -> Iterator[Case]:
        yield Case(["two"], x=torch.tensor([2.0], dtype=torch.float64))

    inside = {"in [0, 1]": lambda case: case.x <= 1}
    assert verdict(assumptions=inside, mutants=(Mutant("x = 2", cases=outside, share=1.0),)) == "PASS"
    assert verdict(cases=outside, assumptions=inside) == "ERROR"


# -------------------------------------------------------------------------------------------- extremes and adversary


def test_extremal_problems_join_and_mutants_see_them() -> None:
    def tight(draw: Draw) -> Iterator[Case]:
        yield Case(["one"], x=torch.ones(1, dtype=torch.float64))

    slightly = (Mutant("a millionth less", bound=lambda case: case.x * (1 - 1e-6)),)
    assert verdict(mutants=slightly) == "VACUOUS"
    result = run_check(made(mutants=slightly, extremal=tight))
    assert result.verdict == "PASS"
    assert (result.points[-1].name, result.points[-1].origin) == ("one", "extremal")
    assert result.max_ratio == 1


def test_the_adversary_finds_a_tight_problem() -> None:
    # x (1 - x) <= 1/4 with equality at 1/2, in ten dimensions at once: random points stay far away.
    def spread(n: int, x: Tensor) -> Case:
        return Case([f"point {i}" for i in range(n)], x=x)

    def cases(draw: Draw) -> Iterator[Case]:
        yield spread(20, torch.from_numpy(draw.rng.random((20, 10))))

    one = made(
        cases=cases,
        measure=lambda case: (4 * case.x * (1 - case.x)).prod(-1) / 4,
        bound=lambda case: torch.full((len(case),), 0.25, dtype=torch.float64),
        mutants=(Mutant("a thousandth", bound=lambda case: torch.full((len(case),), 2.5e-4, dtype=torch.float64)),),
        adversary=Adversary(10, lambda z: spread(len(z), z.sigmoid())),
    )
    plain, searched = run_check(one), run_check(one, adversary=True)
    assert plain.max_ratio < 0.6
    assert searched.max_ratio > 0.99
    assert searched.points[-1].origin == "adversary"
    assert run_check(one, "full").max_ratio > 0.9999


def test_the_adversary_keeps_to_the_assumptions() -> None:
    one = made(
        measure=lambda case: case.x.clamp(min=0),
        bound=lambda case: torch.ones_like(case.x),
        assumptions={"x <= 1/2": lambda case: case.x <= 0.5},
        mutants=(Mutant("a tenth", bound=lambda case: torch.full_like(case.x, 0.1)),),
        adversary=Adversary(1, lambda z: Case([f"z {i}" for i in range(len(z))], x=z[:, 0])),
    )
    result = run_check(one, adversary=True)
    assert result.verdict == "PASS"
    assert 0.49 < result.points[-1].measured <= 0.5


def test_the_adversary_can_refute() -> None:
    # False only near x = 0.999, which the ten random numbers do not meet.
    one = made(
        measure=lambda case: case.x,
        bound=lambda case: torch.full_like(case.x, 0.999),
        mutants=(Mutant("a tenth", bound=lambda case: torch.full_like(case.x, 0.1)),),
        adversary=Adversary(1, lambda z: Case([f"z {i}" for i in range(len(z))], x=z[:, 0].sigmoid())),
    )
    assert run_check(one).verdict == "PASS"
    assert run_check(one, adversary=True).verdict == "FAIL"


def test_ratios_made_by_rounding_do_not_count() -> None:
    tiny = made(measure=lambda case: 2e-15 + 0 * case.x, bound=lambda case: 1e-15 + 0 * case.x)
    result = run_check(made(**{**vars(tiny), "mutants": (Mutant("1", measure=lambda case: 1 + case.x),)}))
    assert result.verdict == "PASS"
    assert math.isnan(result.max_ratio)
    assert math.isnan(Point("p", 1.0, 0.0, True).ratio)


# ----------------------------------------------------------------------------------------------------- determinism


def test_the_same_seed_gives_the_same_result_whatever_ran_before() -> None:
    first = run_check(made(), seed=3)
    run_checks([made(id="OTHER"), made(id="ANOTHER")], seed=3)
    np.random.default_rng(0).random(10)
    torch.manual_seed(9)
    again = run_check(made(), seed=3)
    assert first.points == again.points
    assert first.mutants == again.mutants
    assert run_check(made(), seed=4).points != first.points
    assert run_check(made(id="TOY-2"), seed=3).points != first.points


def test_the_tiers_draw_as_much_as_they_say() -> None:
    def some(draw: Draw) -> Iterator[Case]:
        n = draw.number(3, 8)
        yield Case([str(i) for i in range(n)], x=torch.from_numpy(draw.rng.random(n)))

    assert len(run_check(made(cases=some)).points) == 3
    assert len(run_check(made(cases=some), "full").points) == 8


def test_pytorch_s_generators_continue_the_random_numbers() -> None:
    draws = [Draw(np.random.default_rng(seed)) for seed in (0, 0, 1)]
    first, same, other = (torch.rand(3, generator=draw.generator()).tolist() for draw in draws)
    assert first == same != other


def test_the_rounding_that_is_allowed() -> None:
    mdp = garnet(np.random.default_rng(18), 1, 10, 2, 2, 0.99)
    assert rounding(Case(mdp.names, mdp=mdp)) == pytest.approx(256 * 2.22e-16 * 199 * math.log2(12), rel=1e-3)
    assert rounding(Case(["x"])) < 1e-11


# ------------------------------------------------------------------------------------------- well-formed and found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mutants": ()}, "TOY-1 has no mutant"),
        ({"kind": "mean"}, "needs the range"),
        ({"kind": "rate", "grid": (1, 2, 3, 4, 5)}, "at least 6 points"),
    ],
)
def test_checks_that_cannot_work_are_refused(changes, said) -> None:
    with pytest.raises(CheckError, match=said):
        made(**changes)


def test_an_id_is_taken_once(registry) -> None:
    register(made())
    with pytest.raises(CheckError, match="two checks with the id TOY-1"):
        register(made())


def test_selecting(registry) -> None:
    for name, tags in (("TOY-1a", ("toys", "offline.prdc")), ("TOY-1b", ("toys",)), ("NUM-1", ("offline.iql",))):
        register(made(id=name, tags=tags))

    def ids(*words: str) -> list[str]:
        return [c.id for c in select(*words)]

    assert ids() == ["NUM-1", "TOY-1a", "TOY-1b"]
    assert ids("TOY-1") == ["TOY-1a", "TOY-1b"]
    assert ids("toy-1b") == ["TOY-1b"]
    assert ids("toys", "TOY-1a") == ["TOY-1a", "TOY-1b"]
    assert ids("prdc") == ids("PRDC") == ids("offline.prdc") == ["TOY-1a"]
    with pytest.raises(CheckError, match=r"No check is called 'NUM-2' .* Did you mean 'NUM-1'"):
        select("NUM-2")


def test_a_case_says_what_it_has() -> None:
    case = Case(["a"], x=torch.zeros(1))
    assert case.with_parts(y=1).y == 1
    with pytest.raises(AttributeError, match="no part 'y'; it has x"):
        _ = case.y


# ----------------------------------------------------------------------------------------------------- the command


def test_the_command_reports_and_succeeds(registry, capsys, tmp_path) -> None:
    register(made())
    assert main(["check", "TOY-1", "--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]) == 0
    assert "1 check: 1 PASS; 1 of 1 mutants caught" in capsys.readouterr().out
    written = json.loads((tmp_path / "r.json").read_text())
    assert (written["tier"], written["seed"]) == ("fast", 0)
    assert [c["verdict"] for c in written["checks"]] == ["PASS"]
    assert len(written["checks"][0]["problems"]) == 10
    assert "x^2 &lt;= x on [0, 1]" in (tmp_path / "r.html").read_text()


def test_the_command_fails_where_a_check_does(registry, capsys) -> None:
    register(made())
    register(made(id="TOY-2", measure=lambda case: 2 * case.x))
    assert main(["check"]) == 2
    said = capsys.readouterr().err
    assert "TOY-2 FAIL: squares" in said
    assert "1 of 2 checks did not pass" in said


def test_a_vacuous_check_is_no_success(registry) -> None:
    register(made(mutants=(Mutant("nothing wrong", bound=lambda case: case.x),)))
    assert main(["check"]) == 2


def test_an_unknown_id_is_a_user_s_error_with_a_suggestion(registry, capsys) -> None:
    register(made())
    assert main(["check", "TOY-7"]) == 1
    assert "No check is called 'TOY-7' or has that tag. Did you mean 'TOY-1'?" in capsys.readouterr().err


def test_listing_runs_nothing(registry, capsys) -> None:
    def never(draw: Draw) -> Iterator[Case]:
        raise AssertionError

    register(made(cases=never))
    assert main(["check", "--list"]) == 0
    assert "TOY-1" in capsys.readouterr().out


def test_the_seed_is_the_commands(registry, tmp_path) -> None:
    register(made())
    files = [tmp_path / f"{i}.json" for i in range(3)]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        assert main(["check", "--seed", str(seed), "--json", str(file)]) == 0
    first, same, other = (json.loads(file.read_text())["checks"][0]["problems"] for file in files)
    assert first == same != other


def test_reports_of_every_verdict_are_written(tmp_path) -> None:
    results = [
        run_check(made()),
        run_check(made(measure=lambda case: 2 * case.x)),
        run_check(made(measure=lambda case: math.nan * case.x)),  # nothing that could be drawn
        run_check(made(measure=lambda case: case.nothing)),
        run_check(made(mutants=(Mutant("nothing wrong", bound=lambda case: case.x),))),
        rate(0.5, 0.5),
    ]
    assert summary_line(results).startswith("6 checks: 1 PASS, 1 CONSISTENT, 2 FAIL, 1 VACUOUS, 1 ERROR;")
    page = write_html(results, tmp_path / "all.html").read_text()
    for word in ("PASS", "CONSISTENT", "FAIL", "VACUOUS", "ERROR", "slope only", "nothing to draw"):
        assert word in page
    json.loads(write_json(results, tmp_path / "all.json").read_text())


def test_typing_errors_in_a_check_or_a_run_are_named() -> None:
    with pytest.raises(CheckError, match="the kind 'inequalty' is none of"):
        made(kind="inequalty")
    with pytest.raises(CheckError, match="tags are a tuple"):
        made(tags="toys")
    for tier, seed in (("fsat", 0), ("fast", -1)):
        with pytest.raises(CheckError, match="a seed >= 0"):
            run_check(made(), tier, seed)
