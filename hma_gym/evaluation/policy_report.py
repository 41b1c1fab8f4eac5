"""The report of an evaluation: ``report.html`` (self-contained), ``report.json`` and ``episodes.csv``.

Shape legend: P policies, E starts.
"""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from hma_gym.data.robomimic_hdf5 import storage_errors, write_atomically
from hma_gym.evaluation.episode_store import EpisodeResult, EpisodeStore
from hma_gym.evaluation.page import Heading, Table, Text, Video, render_page
from hma_gym.evaluation.policy_charts import LEARNED_COLOUR, TRUE_COLOUR, Row, Svg, rates_chart, scatter_chart
from hma_gym.evaluation.policy_scores import Comparison, Verdicts, compare, judge_criteria, number, rate
from hma_gym.evaluation.provenance import provenance
from hma_gym.metrics.statistics import Interval

_STYLE = """<style>
.sure { font-size: 1.15rem; border-left: 4px solid currentColor; padding-left: .8rem; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 1rem; }
.pair { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .7rem; }
.pair b { display: block; } .pair.differ { border-color: #c0392b; }
.pair div { display: flex; gap: .4rem; } .pair div > span { flex: 1; font-size: .85rem; }
.pair video { width: 100%; }
.charts { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; } .charts > svg { flex: 1 1 22rem; }
</style>
<script>
// Videos play, both of a pair together, while they are on the screen.
addEventListener("DOMContentLoaded", () => {
  const watch = new IntersectionObserver(entries => entries.forEach(({ target, isIntersecting }) =>
    target.querySelectorAll("video").forEach(v => isIntersecting ? v.play() : v.pause())));
  document.querySelectorAll(".pair").forEach(pair => watch.observe(pair));
});
</script>"""


@dataclass(frozen=True)
class Run:
    """Everything that the report says something about.

    Attributes:
        out: the run's folder.
        results: finished episodes.
        families: policy label -> family, in the order of the roster.
        envs: gymnasium ids, and ``learned`` those that are learned.
        success: which verdict counts.
        held_out: labels reported separately too.
        failures: label -> what was wrong with a policy.
        verdicts: (env, label, start) -> what people say, None while they have not; None where they are not the judge.
        judge: who judges in learned environments.
        videos: pairs in the report.
        checkpoint: name and hash.
        digests: label -> hash of the policy's weights.
        command: the command line.
    """

    out: Path
    results: Sequence[EpisodeResult]
    families: Mapping[str, str]
    envs: Sequence[str]
    learned: Sequence[str]
    success: Literal["end", "ever"]
    held_out: Sequence[str]
    failures: Mapping[str, str]
    verdicts: Mapping[tuple[str, str, int], bool | None] | None
    judge: str
    videos: int
    checkpoint: str
    digests: Mapping[str, str]
    command: str

    def verdict(self, result: EpisodeResult) -> float:
        """1 success, 0 failure, NaN not known yet."""
        if self.verdicts is not None and result.env in self.learned:
            said = self.verdicts[result.env, result.policy, result.start]
            return math.nan if said is None else float(said)
        return float(result.success_end if self.success == "end" else result.success_ever)

    def truth(self) -> str | None:
        """The first environment that is not learned."""
        return next((env for env in self.envs if env not in self.learned), None)


@dataclass(frozen=True)
class _Markup:
    """Markup as it is."""

    text: str

    def html(self) -> str:
        return self.text


def write_report(run: Run) -> Path:
    """Write the three files; returns the page.

    Raises:
        StorageError: the folder cannot be written.
    """
    starts = sorted({result.start for result in run.results})
    tables = {env: _verdicts(run, env, starts) for env in run.envs}
    comparisons = _compare_all(run, tables)
    facts = provenance(torch.device("cpu"))
    page = run.out / "report.html"
    with storage_errors(run.out):
        run.out.mkdir(parents=True, exist_ok=True)
    write_atomically(run.out / "episodes.csv", _csv(run).encode())
    content = _json(run, tables, comparisons, facts)
    write_atomically(run.out / "report.json", (json.dumps(content, indent=1) + "\n").encode())
    write_atomically(page, _page(run, tables, comparisons, facts).encode())
    return page


def _verdicts(run: Run, env: str, starts: Sequence[int]) -> Verdicts:
    """(P, E) verdicts in the order of the roster."""
    rows = {label: i for i, label in enumerate(run.families)}
    columns = {start: i for i, start in enumerate(starts)}
    table: NDArray[np.float64] = np.full((len(rows), len(columns)), np.nan)
    for result in run.results:
        if result.env == env:
            table[rows[result.policy], columns[result.start]] = run.verdict(result)
    return table


def _compare_all(run: Run, tables: Mapping[str, Verdicts]) -> dict[str, Comparison]:
    """Each learned environment against ground truth, all policies and (``env, held out``) the held-out ones alone."""
    truth, labels = run.truth(), list(run.families)
    found = {}
    for env in run.learned if truth is not None else ():
        assert truth is not None
        parts = {env: labels}
        if run.held_out:
            parts[f"{env}, held out"] = [label for label in labels if label in run.held_out]
            parts[f"{env}, not held out"] = [label for label in labels if label not in run.held_out]
        for name, part in parts.items():
            chosen = [labels.index(label) for label in part]
            comparison = compare(part, tables[truth][chosen], tables[env][chosen])
            if comparison is not None:
                found[name] = comparison
    return found


def wall_seconds(results: Sequence[EpisodeResult], env: str) -> float:
    """Wall time that the episodes of an environment took: what each process did at the same time counts once."""
    return sum(result.seconds / result.workers for result in results if result.env == env)


def _csv(run: Run) -> str:
    stream = io.StringIO()
    names = [field.name for field in dataclasses.fields(EpisodeResult)]
    writer = csv.writer(stream)
    writer.writerow([*names, "family", "verdict", "video"])
    store = EpisodeStore(Path())
    for result in run.results:
        video = store.video(result.env, result.policy, result.start)
        verdict = run.verdict(result)
        said = "" if math.isnan(verdict) else int(verdict)
        writer.writerow([*dataclasses.astuple(result), run.families[result.policy], said, video])
    return stream.getvalue()


def _interval_json(interval: Interval) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in dataclasses.asdict(interval).items()}


def _json(
    run: Run, tables: Mapping[str, Verdicts], comparisons: Mapping[str, Comparison], facts: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "command": run.command,
        "checkpoint": run.checkpoint,
        "judge": run.judge,
        "success": run.success,
        "policies": [
            {
                "label": label,
                "family": family,
                "digest": run.digests[label],
                "held_out": label in run.held_out,
                "failure": run.failures.get(label),
                "success": {env: _interval_json(rate(tables[env][i])) for env in run.envs},
            }
            for i, (label, family) in enumerate(run.families.items())
        ],
        "comparisons": {
            name: {
                "policies": list(comparison.policies),
                "statistics": {key: _interval_json(value) for key, value in comparison.statistics.items()},
                "undefined_draws": dict(comparison.undefined),
                "agreement": _interval_json(comparison.agreement.accuracy),
                "kappa": comparison.agreement.kappa,
                "counts": dataclasses.asdict(comparison.agreement),
                "criteria": [dataclasses.asdict(criterion) for criterion in judge_criteria(comparison)],
            }
            for name, comparison in comparisons.items()
        },
        "wall_seconds": {env: wall_seconds(run.results, env) for env in run.envs},
        "episodes": {env: sum(result.env == env for result in run.results) for env in run.envs},
        "provenance": dict(facts),
    }


def _page(
    run: Run, tables: Mapping[str, Verdicts], comparisons: Mapping[str, Comparison], facts: Mapping[str, Any]
) -> str:
    truth = run.truth()
    learned = run.learned[0] if run.learned else None
    rates = {env: [rate(verdicts_E) for verdicts_E in table] for env, table in tables.items()}
    order = sorted(range(len(run.families)), key=lambda i: _sort_key(rates, truth or run.envs[0], learned, i))
    labels = list(run.families)
    rows = [
        Row(labels[i], _known(rates, truth, i), _known(rates, learned, i))
        for i in order
        if _known(rates, truth, i) or _known(rates, learned, i)
    ]
    elements: list[Any] = [_Markup(_STYLE), _Markup(_summary(run, rows, comparisons, tables))]
    elements += [
        Text(f"policy {label!r} failed: {(said.partition(': ')[2] or said).rstrip('.')}. Its finished episodes count.")
        for label, said in run.failures.items()
    ]
    charts = [rates_chart(rows)]
    if truth is not None and learned is not None:
        charts.append(scatter_chart(rows))
    elements.append(_Markup(f"{_legend(truth, learned)}{_side_by_side(charts)}"))
    elements.append(_policy_table(run, rates, order, comparisons))
    for name, comparison in comparisons.items():
        elements += [Heading(f"How far {name} can be believed"), *_comparison_tables(comparison)]
    elements += [Heading("Watch"), *_videos(run, truth, learned)]
    elements += [Heading("Speed"), *_speed(run, truth)]
    elements += [Heading("Where this comes from"), Text(run.command, code=True), *_sources(run, facts)]
    against = f", against {truth}" if truth is not None and learned is not None else ""
    return render_page(f"{len(run.families)} policies in {learned or truth}{against}", elements)


def _known(rates: Mapping[str, Sequence[Interval]], env: str | None, i: int) -> Interval | None:
    if env is None or math.isnan(rates[env][i].value):
        return None
    return rates[env][i]


def _sort_key(rates: Mapping[str, Sequence[Interval]], first: str, second: str | None, i: int) -> tuple[float, float]:
    values = [rates[env][i].value if env is not None else math.nan for env in (first, second)]
    known = [0.0 if math.isnan(value) else -value for value in values]
    return known[0], known[1]


def _summary(
    run: Run, rows: Sequence[Row], comparisons: Mapping[str, Comparison], tables: Mapping[str, Verdicts]
) -> str:
    """What a reader wants to know first."""
    said = []
    for world, intervals in (
        ("ground truth", [(row.label, row.true) for row in rows]),
        ("the learned world", [(row.label, row.learned) for row in rows]),
    ):
        known = [(label, interval) for label, interval in intervals if interval is not None]
        if known:
            top = max(interval.value for _, interval in known)
            best = [label for label, interval in known if interval.value == top]
            interval = next(interval for _, interval in known if interval.value == top)
            said.append(f"Best in {world}: <b>{html.escape(', '.join(best))}</b> at {_percent(interval)}.")
    for name, comparison in comparisons.items():
        if name in run.learned:
            criteria = judge_criteria(comparison)
            missed = [criterion.text for criterion in criteria if criterion.kept is False]
            r = comparison.statistics["Pearson r"]
            said.append(
                f"Learned and true success correlate with r = {number(r.value)} [{number(r.low)}, {number(r.high)}]; "
                f"the verdicts agree in {_percent(comparison.agreement.accuracy)} of the episodes."
            )
            said.append(
                "<b>Its ranking can be believed: all floors are reached.</b>"
                if not missed
                else f"<b>Its ranking cannot be relied on yet</b>: {len(missed)} of {len(criteria)} floors are missed."
            )
    waiting = sum(int(np.isnan(run.verdict(result))) for result in run.results)
    if waiting:
        said.append(f"{waiting} episodes wait for people's verdicts and are not counted.")
    episodes = tables[run.envs[0]].shape[1]
    said.append(f"{episodes} starts, the same for every policy and world; 95 % intervals.")
    return f'<p class="sure">{" ".join(said)}</p>'


def _percent(interval: Interval) -> str:
    return f"{100 * interval.value:.0f} % [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def _legend(truth: str | None, learned: str | None) -> str:
    parts = [
        f'<span style="color:{colour}">●</span> {html.escape(env)}'
        for env, colour in ((truth, TRUE_COLOUR), (learned, LEARNED_COLOUR))
        if env is not None
    ]
    return f"<p>Success rate, best policy at the top: {' &nbsp; '.join(parts)}</p>"


def _side_by_side(charts: Sequence[Svg]) -> str:
    return f'<div class="charts">{"".join(chart.html() for chart in charts)}</div>'


def _policy_table(
    run: Run,
    rates: Mapping[str, Sequence[Interval]],
    order: Sequence[int],
    comparisons: Mapping[str, Comparison],
) -> Table:
    labels = list(run.families)
    truth = run.truth()
    learned = run.learned[0] if run.learned and run.learned[0] in comparisons else None
    header = ["policy", "family", *(f"success in {env}" for env in run.envs)]
    if learned is not None:
        header += ["gap", "episodes that agree"]
    rows = []
    for i in order:
        label = labels[i]
        row = [f"{label} (held out)" if label in run.held_out else label, run.families[label]]
        for env in run.envs:
            interval = _known(rates, env, i)
            row.append("none played" if interval is None else _percent(interval))
        if learned is not None and truth is not None:
            comparison = comparisons[learned]
            if label in comparison.policies:
                at = comparison.policies.index(label)
                gap = comparison.learned_P[at] - comparison.true_P[at]
                agreement = comparison.agreement_P[at]
                row += [f"{gap:+.2f}", f"{agreement.both + agreement.neither} of {agreement.episodes}"]
            else:
                row += ["", ""]
        rows.append(row)
    return Table(header, rows)


def _comparison_tables(comparison: Comparison) -> list[Any]:
    rows = [
        [name, number(value.value), f"{number(value.low)} to {number(value.high)}"]
        for name, value in comparison.statistics.items()
    ]
    agreement, kappa = comparison.agreement, comparison.agreement.kappa
    accuracy = agreement.accuracy
    rows += [
        ["episodes that agree", f"{accuracy.value:.3f}", f"{accuracy.low:.3f} to {accuracy.high:.3f} (Wilson)"],
        ["Cohen's kappa", "not defined" if kappa is None else number(kappa), ""],
    ]
    criteria = [
        [criterion.text, criterion.value, {True: "yes", False: "no", None: "does not apply"}[criterion.kept]]
        for criterion in judge_criteria(comparison)
    ]
    undefined = max(comparison.undefined.values())
    note = f"; in {100 * undefined:.1f} % of the draws a correlation was not defined" if undefined else ""
    return [
        Table(["floor", "measured", "reached"], criteria),
        Table(["measure", "value", "95 % interval"], rows),
        Text(
            f"Success in both worlds: {agreement.both} episodes; in ground truth only: {agreement.only_true}; in the "
            f"learned world only: {agreement.only_learned}; in neither: {agreement.neither}. Intervals are a bootstrap "
            f"over policies and starts{note}. MMRV: success lost, at worst, by trusting the learned order (0 is "
            "perfect). Bias above 0: the learned world is too kind.",
            dim=True,
        ),
    ]


def _videos(run: Run, truth: str | None, learned: str | None) -> list[Any]:
    """Pairs of the same start, episodes whose verdicts differ first, then failures, then successes."""
    by_key = {(result.env, result.policy, result.start): result for result in run.results}
    shown = [env for env in (truth, learned) if env is not None]
    pairs = []
    for label in run.families:
        for start in sorted({result.start for result in run.results}):
            found = [by_key.get((env, label, start)) for env in shown]
            present = [result for result in found if result is not None]
            if len(present) == len(shown) and not any(math.isnan(run.verdict(result)) for result in present):
                pairs.append(present)
    verdicts = [[run.verdict(result) for result in pair] for pair in pairs]
    differing = [pair for pair, v in zip(pairs, verdicts, strict=True) if len(set(v)) > 1]
    failing = [pair for pair, v in zip(pairs, verdicts, strict=True) if set(v) == {0.0}]
    succeeding = [pair for pair, v in zip(pairs, verdicts, strict=True) if set(v) == {1.0}]
    # Spread over the roster: every k-th of each kind.
    quota = (run.videos * 6 // 10, run.videos * 2 // 10, run.videos - run.videos * 6 // 10 - run.videos * 2 // 10)
    chosen = [
        pair
        for kind, count in zip((differing, failing, succeeding), quota, strict=True)
        for pair in _spread(kind, count)
    ]
    store = EpisodeStore(run.out)
    cells = []
    for pair in chosen:
        values = [run.verdict(result) for result in pair]
        differ = len(set(values)) > 1
        films = "".join(
            f"<span>{html.escape(result.env)}<br>{'success' if value else 'failure'}"
            f"{Video(store.video(result.env, result.policy, result.start), result.env).html()}</span>"
            for result, value in zip(pair, values, strict=True)
        )
        title = f"{pair[0].policy}, start {pair[0].start}" + (": verdicts differ" if differ else "")
        cells.append(
            f'<div class="pair{" differ" if differ else ""}"><b>{html.escape(title)}</b><div>{films}</div></div>'
        )
    kinds = f"{len(differing)} pairs differ, {len(failing)} fail in both, {len(succeeding)} succeed in both"
    if len(shown) == 1:
        kinds = f"{len(failing)} episodes fail, {len(succeeding)} succeed"
    return [
        Text(f"{kinds}; {len(chosen)} are shown, failures first. All videos lie in the run's folder.", dim=True),
        _Markup(f'<div class="pairs">{"".join(cells)}</div>'),
    ]


def _spread(items: Sequence[list[EpisodeResult]], count: int) -> list[list[EpisodeResult]]:
    if not items or not count:
        return []
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int))]


def _speed(run: Run, truth: str | None) -> list[Any]:
    rows = []
    for env in run.envs:
        results = [result for result in run.results if result.env == env]
        if results:
            wall = wall_seconds(run.results, env)
            workers = max(result.workers for result in results)
            rows.append([env, str(len(results)), str(workers), f"{wall:.0f}", f"{wall / len(results):.2f}"])
    found: list[Any] = [
        Table(["environment", "episodes", "processes", "wall time, s", "wall time per episode, s"], rows)
    ]
    for env in run.learned if truth is not None else ():
        assert truth is not None
        counts = [sum(result.env == name for result in run.results) for name in (truth, env)]
        if all(counts):
            ratio = (wall_seconds(run.results, truth) / counts[0]) / (wall_seconds(run.results, env) / counts[1])
            found.append(Text(f"{env} is {ratio:.1f} times as fast as {truth}, the policies' own time included."))
    return found


def _sources(run: Run, facts: Mapping[str, Any]) -> list[Any]:
    rows = [
        ["checkpoint", run.checkpoint],
        ["judge", run.judge],
        ["verdict", f"success at the {run.success} of an episode"],
    ]
    if run.success == "ever":
        rows[-1][1] = "success at any frame of an episode"
    rows += [[f"policy {label}", f"{run.families[label]} {digest}".strip()] for label, digest in run.digests.items()]
    rows += [[key, json.dumps(value) if isinstance(value, dict) else str(value)] for key, value in facts.items()]
    return [Table(["", ""], rows)]
