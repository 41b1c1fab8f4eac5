"""The recipe that makes a learned world of your own data in one command: tokenizer, judge, dynamics, checkpoint.

    hma-gym train world --data mine.hdf5 --out runs/mine --minutes 120

    gymnasium.make("HMA-v0", checkpoint="runs/mine/checkpoint", max_episode_steps=80)

The tokenizer and the judge have their folders under ``out``; every stage resumes where it stopped: the same line again
goes on. The stages are the recipes of :mod:`hma_gym.training.recipes.tokenizer`, :mod:`hma_gym.training.judge` and
:mod:`hma_gym.training.recipes.dynamics`, for those who want to set more of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from hma_gym.data.robomimic_hdf5 import open_dataset
from hma_gym.errors import DatasetError, InvalidArgument
from hma_gym.training.judge import JudgeTrainConfig, train_judge
from hma_gym.training.recipes.dynamics import DynamicsOptions, train_dynamics
from hma_gym.training.recipes.tokenizer import RECIPES, TokenizerOptions, train_tokenizer

TOKENIZER_SHARE, JUDGE_SHARE, BODY_SHARE = 0.15, 0.1, 0.12

#: Steps of the body's training that fit into its share of a minute, on one CPU core; and the most that it needs.
BODY_STEPS_A_MINUTE, BODY_STEPS = 50, 6000


@dataclass(frozen=True)
class WorldOptions:
    """Options of ``hma-gym train world``.

    Attributes:
        data: robomimic HDF5 files with images of one size; the action and state dims of robots (domains) may differ.
            Files without images teach the body alone how things move; a domain needs one with images.
        out: folder of the run; the checkpoint goes to ``<out>/checkpoint``.
        names: names of the files' domains, one a file; files of the same name belong to one domain. By default the
            files' stems.
        task: key of the task that the data is of; "" for your own robot.
        object_turns: where the data has an object's pose, in how many positions of a full turn about its upright axis
            it looks alike: 4 for a cube, 1 for most things.
        kind: continuous tokens, or indices of a finite scalar quantiser.
        size: named size of the dynamics model.
        minutes: length of the whole training: 15 percent the tokenizer, 10 the judge, 12 the bodies, the rest the
            trunk.
        steps: length of every stage in steps, in place of minutes (then a resumed run is exact).
        judge: train a judge of success on the first file; ``auto`` does where its training episodes have rewards of
            both kinds. Without one, the world gives no reward.
        device: ``cpu`` or ``cuda``.
        seed: of everything random.
    """

    data: tuple[Path, ...]
    out: Path
    names: tuple[str, ...] = ()
    task: str = ""
    object_turns: int = 1
    kind: Literal["soft", "vq"] = "soft"
    size: Literal["toy", "lift", "small", "shallow"] = "lift"
    minutes: float = 120.0
    steps: int | None = None
    judge: Literal["auto", "yes", "no"] = "auto"
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.data:
            raise InvalidArgument("data must name one or more dataset files, got none.")
        if not self.minutes > 0:
            raise InvalidArgument(f"minutes must be positive, got {self.minutes}.")


def image_size(files: tuple[Path, ...]) -> tuple[int, int]:
    """Height and width of the images, which all files must share.

    Raises:
        DatasetError: they differ, or a file cannot be read.
    """
    sizes = {file: open_dataset(file)[0].images_THWC.shape[1:3] for file in files}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{file} {height} x {width}" for file, (height, width) in sizes.items())
        raise DatasetError(f"one tokenizer needs images of one size, got: {listed}; import the files at one size.")
    height, width = next(iter(sizes.values()))
    return int(height), int(width)


def files_with_images(files: tuple[Path, ...]) -> tuple[Path, ...]:
    """Those files that have images, in order; the others teach the dynamics' bodies alone.

    Raises:
        DatasetError: none has, or a file cannot be read.
    """
    shown = tuple(file for file in files if open_dataset(file).image_key is not None)
    if not shown:
        raise DatasetError(
            f"data must have one file with images, got {[str(file) for file in files]}; render them with: hma-gym data "
            "import FILE."
        )
    return shown


def has_both_outcomes(file: Path) -> bool:
    """Whether the training episodes of a file have rows with reward and rows without."""
    dataset = open_dataset(file)
    success_F = dataset.flat(dataset.split("train")).rewards_F > 0
    return bool(np.any(success_F) and not np.all(success_F))


def train_world(options: WorldOptions) -> Path:
    """Train all stages and return the checkpoint's folder.

    Raises:
        DatasetError: a file cannot be read, lacks a split, or the images differ in size.
        ResumeError: ``out`` holds a run with other options.
    """
    shown = files_with_images(options.data)
    size = image_size(shown)
    tokenizer, _, _ = train_tokenizer(
        RECIPES[options.kind](
            TokenizerOptions(
                data=shown[0],
                more_data=shown[1:],
                out=options.out / "tokenizer",
                kind=options.kind,
                minutes=TOKENIZER_SHARE * options.minutes,
                steps=options.steps,
                image_size=size,
                focus_red=options.task == "lift",
                device=options.device,
                seed=options.seed,
            )
        )
    )
    judge = None
    robots = set(options.names or (file.stem for file in options.data))
    if options.judge == "yes" or (options.judge == "auto" and has_both_outcomes(shown[0])):
        judge = train_judge(
            JudgeTrainConfig(
                data=shown[0],
                out=options.out / "judge",
                tokenizer=tokenizer,
                minutes=JUDGE_SHARE * options.minutes,
                steps=options.steps,
                decision_height=0.84 if options.task == "lift" else None,
                state=len(robots) == 1,  # one judge serves all domains, and frames are all that they share
                seed=options.seed,
            )
        ).folder
    left = 1.0 - TOKENIZER_SHARE - BODY_SHARE - (JUDGE_SHARE if judge is not None else 0.0)
    body_steps = max(1, min(BODY_STEPS, int(BODY_STEPS_A_MINUTE * options.minutes)))
    train_dynamics(
        DynamicsOptions(
            data=options.data,
            tokenizer=tokenizer,
            out=options.out,
            names=options.names,
            judge=judge,
            task=options.task,
            object_turns=options.object_turns,
            size=options.size,
            body_steps=body_steps if options.steps is None else options.steps,
            minutes=left * options.minutes,
            steps=options.steps,
            device=options.device,
            seed=options.seed,
        )
    )
    return options.out / "checkpoint"
