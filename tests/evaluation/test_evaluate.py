"""The evaluation: paired, resumable after any kill, unharmed by bad policies; and its report."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toy_policies
from toy_policies import toy_diffusion

from hma_gym.cli import main as cli
from hma_gym.errors import InvalidArgument, PolicyError, ResumeError, UnknownName
from hma_gym.evaluation.episode_store import EpisodeResult, EpisodeStore
from hma_gym.evaluation.policies import EvaluateConfig, Evaluation, evaluate, main
from hma_gym.evaluation.policy_report import Run, wall_seconds, write_report
from hma_gym.evaluation.rollouts import Played
from hma_gym.judges.human import LabelQueue
from hma_gym.policies.diffusion import save_diffusion
from hma_gym.policies.loading import EpisodeSeed

LEARNED, TRUTH = "HMA-Lift-v0", "GroundTruth-Lift-v0"
BAD = {
    "not-finite": toy_policies.not_finite,
    "wrong-shape": toy_policies.wrong_shape,
    "raises": toy_policies.raises,
    "hangs": toy_policies.hangs,
}


def config(out: Path, checkpoint: Path | str, **changes: object) -> EvaluateConfig:
    settings: dict[str, object] = {"policies": ("random",), "envs": (LEARNED,), "episodes": 4, "batch": 2, "steps": 5}
    settings |= {"checkpoint": str(checkpoint), "out": out, "progress": False, "timeout": 8.0} | changes
    return EvaluateConfig(**settings)  # type: ignore[arg-type]


def plain(run: Path) -> dict[str, dict[str, object]]:
    """Every episode file without its wall time, by path."""
    found = {}
    for path in sorted(run.glob("episodes/*/*/*.json")):
        content = json.loads(path.read_text())
        del content["seconds"]
        found[str(path.relative_to(run))] = content | {"video": path.with_suffix(".mp4").read_bytes()}
    return found


@pytest.fixture(scope="module")
def evaluated(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[EvaluateConfig, Evaluation]:
    """Good and bad policies in the learned world."""
    out = tmp_path_factory.mktemp("evaluation")
    model = toy_diffusion()
    folder = save_diffusion(out / "policy", model.config, model.state_dict(), {})
    settings = config(out / "run", toy_folder, policies=("random", f"dp={folder}"))
    return settings, evaluate(settings, {"still": toy_policies.still, **BAD})


def test_every_episode_is_kept_with_its_verdict_start_seed_and_video(
    evaluated: tuple[EvaluateConfig, Evaluation],
) -> None:
    settings, evaluation = evaluated
    good = [r for r in evaluation.results if r.policy in ("random", "dp", "still")]
    assert [(r.policy, r.start) for r in good] == [(p, s) for p in ("random", "dp", "still") for s in range(4)]
    assert {r.steps for r in good} == {5} and len({r.seed for r in good}) == 4
    store = EpisodeStore(settings.out)
    assert all(store.video(r.env, r.policy, r.start).stat().st_size > 500 for r in good)
    assert all(0 <= r.probability <= 1 and r.seconds > 0 for r in good)


def test_bad_policies_are_named_and_harm_nobody(evaluated: tuple[EvaluateConfig, Evaluation]) -> None:
    _, evaluation = evaluated
    said = {label: str(error) for label, error in evaluation.failures.items()}
    assert set(said) == set(BAD)
    assert "policy 'not-finite': act() must return finite actions, got nan in dim 0" in said["not-finite"]
    assert "(N, H, A) = (2, H, 7), got (2, 2, 6)" in said["wrong-shape"]
    assert "policy 'raises': act raised KeyError: 'gripper'" in said["raises"]
    assert "policy 'hangs': it did not answer within 8 seconds and was ended" in said["hangs"]
    assert [r.start for r in evaluation.results if r.policy == "raises"] == [0, 1]  # its first batch is kept
    page = evaluation.report.read_text()
    assert all(f"policy &#x27;{label}&#x27; failed" in page for label in BAD)


def test_the_same_call_again_plays_nothing_and_says_the_same(evaluated: tuple[EvaluateConfig, Evaluation]) -> None:
    settings, evaluation = evaluated
    before = {path: path.stat().st_mtime_ns for path in settings.out.glob("episodes/*/*/*")}
    again = evaluate(settings, {"still": toy_policies.still})
    assert again.results == tuple(r for r in evaluation.results if r.policy in ("random", "dp", "still"))
    assert {path: path.stat().st_mtime_ns for path in settings.out.glob("episodes/*/*/*")} == before


def test_another_evaluation_in_the_same_folder_is_refused(evaluated: tuple[EvaluateConfig, Evaluation]) -> None:
    settings, _ = evaluated
    with pytest.raises(ResumeError, match=r"'HMA-Lift-v0' = .*'steps': 5.*and now it is.*'steps': 6"):
        evaluate(config(settings.out, settings.checkpoint or "", steps=6))
    with pytest.raises(ResumeError, match=r"evaluated with 'dp'.*choose another folder"):
        evaluate(config(settings.out, settings.checkpoint or "", policies=("dp=random",)))


_KILLED = """
import sys
from pathlib import Path
from hma_gym.evaluation.policies import EvaluateConfig, evaluate
if __name__ == "__main__":
    evaluate(EvaluateConfig(policies=("random", "still=python:toy_policies:still"), envs=("HMA-Lift-v0",), episodes=4,
        batch=2, steps=5, checkpoint=sys.argv[1], out=Path(sys.argv[2]), progress=False))
"""


def test_a_kill_loses_and_repeats_nothing(toy_folder: Path, tmp_path: Path) -> None:
    script, killed = tmp_path / "run.py", tmp_path / "killed"
    script.write_text(_KILLED)
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    process = subprocess.Popen(
        [sys.executable, str(script), str(toy_folder), str(killed)],
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while len(list(killed.glob("episodes/*/*/*.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # its worker notices and ends
    finished = {p: p.stat().st_mtime_ns for p in killed.glob("episodes/*/*/*.json")}
    settings = config(killed, toy_folder, policies=("random", "still=python:toy_policies:still"), timeout=100.0)
    evaluate(settings)
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in finished.items())
    resumed = plain(killed)
    assert len(resumed) == 8
    # Once more, from what a kill in the middle of a batch would leave: videos without verdicts, and half written.
    for finished_one in list(killed.glob("episodes/*/*/*.json"))[::3]:
        finished_one.unlink()
        finished_one.with_suffix(".mp4").write_bytes(b"half")
    evaluate(settings)
    assert plain(killed) == resumed
    whole = config(tmp_path / "whole", toy_folder, policies=settings.policies)
    evaluate(whole)
    assert plain(tmp_path / "whole") == resumed


def test_people_may_be_the_judge(toy_folder: Path, tmp_path: Path) -> None:
    settings = config(tmp_path, toy_folder, judge="human", episodes=2, timeout=100.0)
    evaluation = evaluate(settings)
    assert "2 episodes wait for people" in evaluation.report.read_text()
    with LabelQueue.open(tmp_path / "labels") as queue:
        items = queue.store.next_items("ann", 5)
        assert len(items) == 2 and all(queue.video(item.item).exists() for item in items)
        queue.store.save("ann", [(items[0].item, "success")])
        said = {key: outcome.success for key, outcome in queue.outcomes().items()}
    assert set(said) == {"HMA-Lift-v0/random/0", "HMA-Lift-v0/random/1"}
    evaluate(settings)
    rows = list(csv.DictReader((tmp_path / "episodes.csv").read_text().splitlines()))
    assert sorted(row["verdict"] for row in rows) == ["", "1"]
    with pytest.raises(ResumeError, match="'judge': 'human'"):
        evaluate(config(tmp_path, toy_folder, episodes=2))


@pytest.mark.gl
def test_both_worlds_start_alike_and_are_compared(tmp_path: Path) -> None:
    settings = config(
        tmp_path, "lift-64", envs=(LEARNED, TRUTH), episodes=2, steps=2, workers=1, policies=("random",), timeout=100.0
    )
    evaluation = evaluate(settings, {"still": toy_policies.still})
    assert not evaluation.failures and len(evaluation.results) == 8
    seeds = {(r.policy, r.env): [] for r in evaluation.results}
    for r in evaluation.results:
        seeds[r.policy, r.env].append((r.start, r.seed))
    assert len({tuple(value) for value in seeds.values()}) == 1
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["comparisons"][LEARNED]["counts"]["neither"] == 4
    assert "times as fast as GroundTruth-Lift-v0" in evaluation.report.read_text()


def test_what_is_asked_for_is_checked_before_anything_is_played(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, match, changes in (
        (InvalidArgument, "must be at most 6, the size of the bank", {"episodes": 7}),
        (InvalidArgument, "label 'random' is used twice", {"policies": ("random", "random")}),
        (InvalidArgument, "policy label 'a b' must be letters", {"policies": ("a b=random",)}),
        (InvalidArgument, "name at least one policy", {"policies": ()}),
        (InvalidArgument, "envs must be of one task", {"envs": (LEARNED, "GroundTruth-Stack-v0")}),
        (InvalidArgument, "episodes must be positive", {"episodes": 0}),
        (UnknownName, "unknown environment 'CartPole-v1'", {"envs": ("CartPole-v1",)}),
        (UnknownName, "unknown held-out policy 'x'", {"held_out": ("x",)}),
    ):
        with pytest.raises(error, match=match):
            evaluate(config(tmp_path / "no", toy_folder, **changes))
    with pytest.raises(InvalidArgument, match="must be a function or class of a module"):
        evaluate(config(tmp_path / "no", toy_folder), {"mine": lambda episodes: toy_policies.still(episodes)})
    assert not (tmp_path / "no").exists()
    assert cli(["evaluate", "--policies", "nowhere", "--out", str(tmp_path / "no")]) == 2
    assert "unknown policy 'nowhere'" in capsys.readouterr().err


# ---------------------------------------------------------------------- the report, on made-up episodes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four policies, 6 starts, both worlds; the learned one is wrong about one episode of each policy but the first."""
    out = tmp_path_factory.mktemp("report")
    store = EpisodeStore(out)
    labels = ("never", "seldom", "often", "always")
    results = []
    for i, label in enumerate(labels):
        for start in range(6):
            for env in (LEARNED, TRUTH):
                true = start < 2 * i
                success = not true if (env == LEARNED and i and start == 5) else true
                result = EpisodeResult(
                    label, env, start, 7, 3, success, success, 0.5, 0.1 if env == LEARNED else 0.6, 2
                )
                frames = np.full((4, 16, 16, 3), 40 * start, np.uint8)
                played = Played(EpisodeSeed(start, 7), frames, success, success, 0.5, 0.1)
                store.write(played, result, 20)
                results.append(result)
    return Run(
        out=out,
        results=results,
        families=dict.fromkeys(labels, "made up"),
        envs=(LEARNED, TRUTH),
        learned=(LEARNED,),
        success="end",
        held_out=("seldom", "often"),
        failures={"broken": "policy 'broken': act raised OSError: <oh>"},
        verdicts=None,
        judge="classifier",
        videos=10,
        checkpoint="toy 0123",
        digests=dict.fromkeys(labels, "abcd"),
        command="hma-gym evaluate --policies never seldom",
    )


def test_the_report_is_self_contained_and_says_what_happened(run: Run) -> None:
    page = write_report(run).read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "Best in ground truth: <b>always</b> at 100 %" in page and "Best in the learned world" in page
    assert "cannot be relied on yet" in page
    assert "act raised OSError: &lt;oh&gt;" in page
    assert page.count("data:video/mp4") == 14  # pairs: 3 that differ, 2 that fail, 2 that succeed
    assert re.findall(r'<div class="(pair(?: differ)?)">', page) == ["pair differ"] * 3 + ["pair"] * 4
    assert "6.0 times as fast as GroundTruth-Lift-v0" in page
    for said in ("hma-gym evaluate --policies never seldom", "toy 0123", "HMA-Lift-v0, held out", "commit"):
        assert said in page


def test_the_files_beside_it_hold_every_episode_and_figure(run: Run) -> None:
    write_report(run)
    rows = list(csv.DictReader((run.out / "episodes.csv").read_text().splitlines()))
    assert len(rows) == 48 and all((run.out / row["video"]).exists() for row in rows)
    content = json.loads((run.out / "report.json").read_text())
    assert [policy["success"][TRUTH]["value"] for policy in content["policies"]] == [0, 2 / 6, 4 / 6, 1]
    comparison = content["comparisons"][LEARNED]
    assert comparison["counts"] == {"both": 11, "only_true": 1, "only_learned": 2, "neither": 10}
    assert comparison["statistics"]["mean absolute error"]["value"] == pytest.approx(3 / 6 / 4)
    assert content["comparisons"][f"{LEARNED}, held out"]["policies"] == ["seldom", "often"]
    assert content["wall_seconds"][LEARNED] == pytest.approx(24 * 0.1 / 2) == wall_seconds(run.results, LEARNED)


def test_what_people_say_replaces_the_machines_verdict(run: Run) -> None:
    keys = [(r.env, r.policy, r.start) for r in run.results if r.env == LEARNED]
    said: dict[tuple[str, str, int], bool | None] = dict.fromkeys(keys, True)
    said[LEARNED, "never", 0] = None
    page = write_report(replace(run, verdicts=said, judge="human")).read_text()
    assert "1 episodes wait for people" in page
    content = json.loads((run.out / "report.json").read_text())
    assert all(policy["success"][LEARNED]["value"] == 1 for policy in content["policies"])
    assert content["comparisons"][LEARNED]["counts"]["only_true"] == 0


def test_the_command_line_says_which_policy_failed(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path, toy_folder, policies=("bad=python:toy_policies:not_finite",), episodes=2)
    with pytest.raises(PolicyError, match=r"policy 'bad': act\(\) must return finite .* results of the others are in"):
        main(settings)
    assert "going on with the other policies" in capsys.readouterr().err
