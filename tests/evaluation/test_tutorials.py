"""The tutorials' code runs from top to bottom, in ground truth too, with a toy world and a toy budget."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import hma_gym.dynamics.checkpoint as checkpoint
from hma_gym import cli
from hma_gym.data.episodes import Episode
from hma_gym.data.robomimic_hdf5 import Dataset, EpisodeWriter, open_dataset

DOCS = Path(__file__).resolve().parents[2] / "docs"


def run(page: str, budget: dict[str, str], blocks: int) -> None:
    """Execute a page's Python, each text of the budget in place of the page's own."""
    text = (DOCS / page).read_text()
    for own, small in budget.items():
        assert own in text, own
        text = text.replace(own, small)
    examples = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(examples) == blocks
    namespace: dict[str, object] = {"__name__": "tutorial"}
    for example in examples:
        exec(compile(example, page, "exec"), namespace)


@pytest.fixture
def world(lift_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, where the shipped checkpoint is a tiny untrained one."""
    shutil.copytree(lift_folder, tmp_path / "shipped" / "lift-64")
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def enlarged(dataset: Dataset, path: Path) -> Path:
    """The toy episodes at 64 x 64."""
    writer = EpisodeWriter(path, env_args={"env_name": "Toy", "type": 1, "env_kwargs": {}}, info={"seed": 0})
    for index in range(24):
        episode = dataset[index]
        images = episode.images_THWC.repeat(4, axis=1).repeat(4, axis=2)
        writer.append(Episode(**{**vars(episode), "images_THWC": images}))
    return writer.merge()


@pytest.mark.gl
@pytest.mark.filterwarnings("ignore:.*Overwriting existing videos.*")
def test_mpc(world: Path) -> None:
    run(
        "mpc.md",
        {
            'search = 63, ICEM(samples=256, elites=24, rounds=3, carry="mean")': "search = 3, ICEM(4, 1, 1)",
            "horizon=16, execute=4": "horizon=3, execute=2",
            "count=4, horizon=16": "count=2, horizon=3",
            'options={"start": 2}': 'options={"start": 1}',  # the toy's bank has two
        },
        blocks=6,
    )


@pytest.mark.gl
def test_rl(world: Path, toy_dataset: Dataset) -> None:
    pytest.importorskip("stable_baselines3")
    data = enlarged(open_dataset(toy_dataset.path), world / "demos.hdf5")
    calibrate = f"calibrate --checkpoint lift-64 --data {data} --split train --episodes 16 --steps 7 --no-progress"
    assert cli.main(calibrate.split()) == 0
    run(
        "rl.md",
        {
            "timesteps, horizon = 50_000, 63": "timesteps, horizon = 16, 2",
            "make(16, ": "make(2, ",
            "batch_size=horizon * 4": "batch_size=horizon * 2",
            "make(8, ": "make(2, ",
            "n_eval_episodes=8": "n_eval_episodes=2",
            'evaluate_every = Path("demos.hdf5"), 10_000': 'evaluate_every = Path("demos.hdf5"), 2',
            "clone_steps=2000": "clone_steps=1, num_envs=1",
            "episodes=16": "episodes=1",
        },
        blocks=3,
    )
    assert len((world / "runs" / "tutorial" / "metrics.jsonl").read_text().splitlines()) == 3
