"""What checks found, for people and for programs: a table on a terminal, one HTML page, JSON."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table
from rich.text import Text

from ..core.html import Html, count, element, figure_element, head, join, page, table
from ..core.runs import versions
from .run import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCHEMA = 1

_MEANING = {
    "PASS": "held on every problem, and every mutant was caught",
    "CONSISTENT": "the fitted slope does not contradict the claimed rate; constants are not tested",
    "FAIL": "violated beyond rounding, or beyond the stated confidence",
    "INCONCLUSIVE": "the statistical budget did not decide; never counted as a pass",
    "VACUOUS": "held, but could not have failed here: a mutant passed too, or the bound says nothing",
    "ERROR": "the check itself broke",
}
_COLOURS = {"PASS": "green", "CONSISTENT": "cyan", "FAIL": "red", "ERROR": "red", "VACUOUS": "yellow"}


# ------------------------------------------------------------------------------------------------------ terminal


def terminal_table(results: Sequence[Result]) -> Table:
    """Return the table that ``corollary check`` prints."""
    made = Table("check", "claim", "problems", "tightest", "mutants", "verdict", "s", box=None)
    for result in results:
        colour = _COLOURS.get(result.verdict, "yellow")
        made.add_row(
            result.check.id,
            result.check.title,
            str(len(result.points)),
            _number(result.max_ratio),
            f"{sum(k.caught for k in result.mutants)}/{len(result.mutants)}",
            Text(result.verdict, style=colour),
            f"{result.seconds:.1f}",
        )
    return made


def summary_line(results: Sequence[Result]) -> str:
    """Return the verdicts counted, and the mutants."""
    counts = {verdict: sum(r.verdict == verdict for r in results) for verdict in _MEANING}
    caught = sum(k.caught for r in results for k in r.mutants)
    mutants = sum(len(r.mutants) for r in results)
    verdicts = ", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n)
    seconds = sum(r.seconds for r in results)
    return f"{count(len(results), 'check')}: {verdicts}; {caught} of {mutants} mutants caught; {seconds:.0f} s"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"


# ---------------------------------------------------------------------------------------------------------- JSON


def as_json(results: Sequence[Result], **about: Any) -> dict[str, Any]:
    """Return everything that was found as plain data; `about` joins the head (seed, tier)."""
    return {
        "schema": SCHEMA,
        "versions": versions(),
        **about,
        "checks": [
            {
                "id": r.check.id,
                "title": r.check.title,
                "claim": r.check.claim,
                "source": r.check.source,
                "kind": r.check.kind,
                "tags": list(r.check.tags),
                "verdict": r.verdict,
                "note": r.note,
                "seconds": round(r.seconds, 3),
                "max_ratio": _finite(r.max_ratio),
                "least_detectable_factor": _finite(r.detectable),
                "left_out": r.left_out,
                "tolerance": r.check.tolerance,
                "mutants": [
                    {"what": k.what, "caught": k.caught, "share": k.share, "detail": k.detail} for k in r.mutants
                ],
                "problems": [
                    {
                        "name": p.name,
                        "origin": p.origin,
                        "measured": _finite(p.measured),
                        "bound": _finite(p.bound),
                        "holds": p.holds,
                        "decided": p.decided,
                    }
                    for p in r.points
                ],
            }
            for r in results
        ],
    }


def write_json(results: Sequence[Result], path: str | Path, **about: Any) -> Path:
    """Write :func:`as_json` to a file and return its path."""
    out = Path(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(as_json(results, **about), indent=1) + "\n", encoding="utf-8")
    return out


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---------------------------------------------------------------------------------------------------------- HTML


def write_html(results: Sequence[Result], path: str | Path, **about: Any) -> Path:
    """Write one self-contained page: the table, then every check with its claim, picture, mutants and problems."""
    sections = [
        element("h1", "Theory checks"),
        element("p", f"{summary_line(results)}.", class_="soft"),
        _preface(),
        _overview(results),
        *[_section(result) for result in results],
        _environment(about),
    ]
    out = Path(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page("Theory checks", *sections), encoding="utf-8", newline="\n")
    return out


def _preface() -> Html:
    told = (
        "Each row is a published claim, tried on problems small enough that its truth can be computed. For an "
        "inequality the page shows what was measured against what was claimed: the closer the tightest ratio is to 1, "
        "the more the check would have noticed. A check has to be able to fail, so every one is run again with one "
        "thing wrong (a mutant), and each of those has to be caught before the row counts as a pass."
    )
    meanings = [element("li", element("strong", verdict), f": {text}.") for verdict, text in _MEANING.items()]
    return join(element("p", told), element("ul", *meanings))


def _overview(results: Sequence[Result]) -> Html:
    names = ("check", "claim", "problems", "tightest", "detectable", "mutants", "verdict", "s")
    rows, topic = [], ""
    for r in results:
        if r.check.topic != topic:
            topic = r.check.topic
            rows.append(element("tr", element("th", topic, scope="rowgroup", colspan=str(len(names))), class_="group"))
        link = Html(f'<a href="#{r.check.id}" style="white-space: nowrap">{r.check.id}</a>')
        caught = f"{sum(k.caught for k in r.mutants)} of {len(r.mutants)}"
        numbers = (str(len(r.points)), _number(r.max_ratio), _number(r.detectable), caught)
        cells = [element("th", link, scope="row"), element("td", r.check.title)]
        cells += [element("td", text, class_="number") for text in numbers]
        cells += [element("td", _verdict(r)), element("td", f"{r.seconds:.1f}", class_="number")]
        rows.append(element("tr", *cells))
    about = (
        "Tightest: the largest ratio of measured to claimed. Detectable: the factor by which a bound would have to be "
        "too small for these problems to refute it; 1 means that the bound is attained. Mutants: how many were caught."
    )
    return join(element("h2", "All checks"), table(head(names, number=slice(2, 6)), rows, about))


def _verdict(result: Result) -> Html:
    return element("span", result.verdict) if result.passed else element("mark", result.verdict)


def _section(result: Result) -> Html:
    check = result.check
    parts = [
        Html(f'<h2 id="{check.id}">{join(f"{check.id}: {check.title}")}</h2>'),
        element("p", element("code", check.claim)),
        element("p", f"Source: {check.source}. Verdict: ", _verdict(result), f", {_MEANING[result.verdict]}."),
    ]
    if result.note:
        parts.append(element("p", result.note))
    if check.loose:
        parts.append(element("p", f"The bound is loose here: {check.loose}", class_="soft"))
    if result.points:
        parts.append(_picture(result))
    parts.append(_mutants(result))
    if any(result.left_out.values()):
        told = ", ".join(f"{n} ({name})" for name, n in result.left_out.items() if n)
        parts.append(element("p", f"Problems on which an assumption does not hold, left out: {told}.", class_="soft"))
    if check.tolerance is not None:
        parts.append(element("p", f"Tolerance of this check: {check.tolerance:g}, relative.", class_="soft"))
    if check.tags:
        parts.append(element("p", f"Rests on it or is about it: {', '.join(check.tags)}.", class_="soft"))
    return join(*parts)


def _mutants(result: Result) -> Html:
    rows = [
        element(
            "tr",
            element("td", killed.what),
            element("td", "caught" if killed.caught else element("mark", "not caught")),
            element("td", killed.detail),
        )
        for killed in result.mutants
    ]
    rows += [
        element("tr", element("td", what), element("td", "cannot be"), element("td", why))
        for what, why in result.check.not_mutants.items()
    ]
    return table(head(("made wrong", "outcome", "")), rows) if rows else Html()


def _environment(about: dict[str, Any]) -> Html:
    rows = [
        element("tr", element("th", str(name), scope="row"), element("td", str(value)))
        for name, value in {**about, **versions()}.items()
    ]
    return join(element("h2", "How this was run"), table(Html(), rows))


# ------------------------------------------------------------------------------------------------------ pictures


def _picture(result: Result) -> Html:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained", dpi=160)
    axes = figure.subplots()
    if result.curve:
        caption = _draw_rate(axes, result)
    elif result.check.kind == "identity":
        caption = _draw_residuals(axes, result)
    else:
        caption = _draw_bound(axes, result)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure_element(figure, f"{result.check.id}: measured and claimed", caption)


def _draw_bound(axes: "Axes", result: Result) -> str:
    """Measured against bound, one mark for each problem, and the line where the two are equal."""
    styles = {"random": ("o", "#0072b2"), "extremal": ("D", "#d55e00"), "adversary": ("*", "#009e73")}
    shown = [(p.bound, p.measured, p.origin) for p in result.points if math.isfinite(p.bound + p.measured)]
    if not shown:
        return "No problem has finite numbers on both sides, so there is nothing to draw."
    values = np.array([[bound, measured] for bound, measured, _ in shown])
    positive = values[:, 0][values[:, 0] > 0]
    logarithmic = result.check.kind in ("inequality", "mean") and positive.size > 0 and values[:, 0].min() >= 0
    if logarithmic:
        floor = max(positive.min() * 1e-3, values.max() * 1e-9)
        values = np.maximum(values, floor)
        axes.set_xscale("log")
        axes.set_yscale("log")
    for origin, (marker, colour) in styles.items():
        chosen = [i for i, (_, _, o) in enumerate(shown) if o == origin]
        if chosen:
            axes.plot(
                values[chosen, 0],
                values[chosen, 1],
                marker,
                color=colour,
                markersize=4 if origin == "random" else 8,
                alpha=0.6 if origin == "random" else 1,
                markeredgewidth=0,
                label=origin,
            )
    ends = [values.min(), values.max()]
    axes.plot(ends, ends, color="#888888", linewidth=1, label="measured = claimed")
    axes.set(xlabel="claimed", ylabel="measured")
    axes.legend(frameon=False, fontsize=8)
    where = "on" if result.check.kind == "fact" else "below"
    return f"One mark for each problem; the claim holds {where} the line." + (
        " Values below the frame are drawn on its edge." if logarithmic else ""
    )


def _draw_residuals(axes: "Axes", result: Result) -> str:
    """How far the two sides of an identity are apart, relative to their size."""
    gaps = [abs(p.measured - p.bound) / (1 + max(abs(p.measured), abs(p.bound))) for p in result.points]
    exponents = np.log10(np.maximum(gaps, 1e-17))
    axes.hist(exponents, bins=np.arange(-17, max(-8, exponents.max()) + 0.5, 0.25), color="#0072b2")  # type: ignore[arg-type]
    axes.set(xlabel="log10 of |left - right| / (1 + size)", ylabel="problems")
    return (
        "Both sides of the identity were computed separately; this is how far they are apart, relative to their size."
    )


def _draw_rate(axes: "Axes", result: Result) -> str:
    """The measured curve and the claimed slope through its first point."""
    grid, error = np.array(result.curve["grid"]), np.array(result.curve["error"])
    axes.loglog(grid, error, "o-", color="#0072b2", label="measured")
    axes.loglog(grid, error[0] * (grid / grid[0]) ** result.curve["claimed"][0], color="#888888", label="claimed slope")
    axes.set(xlabel="T", ylabel="error")
    axes.legend(frameon=False, fontsize=8)
    return "Slope only: the height of the claimed line is chosen so that it begins where the measurements do."
