"""Calibrate a checkpoint's uncertainty on validation episodes: ``hma-gym calibrate``.

    hma-gym calibrate --checkpoint runs/mine/checkpoint --data mine.hdf5

Rolls the model out along recorded actions, compares its frames with the recorded ones, and puts the fitted score into
the checkpoint. 96 episodes of 60 steps take about half a minute of one CPU core with lift-64.

Shape legend: E episodes, T steps, F features.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hma_gym.data.robomimic_hdf5 import open_dataset
from hma_gym.dynamics.checkpoint import Checkpoint, checkpoint_folder, load_checkpoint, save_checkpoint
from hma_gym.dynamics.refresh import refreshed
from hma_gym.dynamics.uncertainty import Uncertainty, auroc, fit_uncertainty, token_error
from hma_gym.errors import InvalidArgument, StorageError
from hma_gym.evaluation.held_out import HeldOut, load_held_out


@dataclass(frozen=True)
class CalibrateOptions:
    """Options of ``hma-gym calibrate``.

    Attributes:
        checkpoint: folder or shipped name of the checkpoint of one domain; it is changed in place, its weights stay as
            they are.
        data: robomimic HDF5 file with images (or its ``.parts`` folder).
        split: of the data, not trained on.
        episodes, steps: how many rollouts, and how long.
        out: write the checkpoint here instead.
        batch: rollouts at once.
        seed: of the choice of episodes.
        progress: show a progress bar.
    """

    checkpoint: str
    data: Path
    split: str = "valid"
    episodes: int = 96
    steps: int = 60
    out: Path | None = None
    batch: int = 32
    seed: int = 0
    progress: bool = True


@dataclass(frozen=True)
class Rollouts:
    """Rollouts along recorded actions: features (E, T, F), dreamt steps (E, T) and true errors (E, T)."""

    features_ETF: Tensor
    dreamt_ET: Tensor
    error_ET: Tensor


@torch.inference_mode()
def roll_out(checkpoint: Checkpoint, truth: HeldOut, *, batch: int = 32, progress: bool = True) -> Rollouts:
    """Roll the model out from each episode's first frame and compare every frame's tokens with the recorded ones'."""
    model, tokenizer = checkpoint.dynamics, checkpoint.tokenizer
    device = model.position_embedding.device
    steps = truth.rows - 1
    features, errors = [], []
    bar = tqdm(total=len(truth) * steps, desc="rolling out", unit="frame", disable=not progress)
    with bar:
        for first in range(0, len(truth), batch):
            rows = slice(first, first + batch)
            frames = torch.from_numpy(truth.frames_BTHWC[rows])
            actions = torch.from_numpy(truth.actions_BTA[rows]).to(device)
            poses = torch.from_numpy(truth.agent_pos_BTP[rows, 0]).to(device)
            seeds = torch.arange(first, first + len(frames))
            state = model.start(tokenizer.encode(frames[:, 0].to(device)), poses, seeds, checkpoint.domain.name)
            seen, wrong = [], []
            for t in range(steps):
                state, out = model.step(state, actions[:, t], in_place=True)
                seen.append(out.features_BD.cpu())
                wrong.append(token_error(out.tokens, tokenizer.encode(frames[:, t + 1].to(device))).cpu())
                state = refreshed(state, tokenizer, model.config.refresh)
                bar.update(len(frames))
            features.append(torch.stack(seen, dim=1))
            errors.append(torch.stack(wrong, dim=1))
    error_ET = torch.cat(errors)
    return Rollouts(torch.cat(features), torch.arange(1, steps + 1).expand_as(error_ET), error_ET)


def measured_auroc(score: Uncertainty, rollouts: Rollouts) -> float:
    """How well a score tells frames of large error (its own bound) from others, on any rollouts."""
    value = score(rollouts.features_ETF.flatten(0, 1), rollouts.dreamt_ET.flatten())
    return auroc(value, rollouts.error_ET.flatten() > score.config.large)


def calibrate(options: CalibrateOptions) -> Path:
    """Fit the score and write it into the checkpoint; returns the checkpoint's folder.

    Raises:
        InvalidArgument: the checkpoint has several domains, or the episodes are too few.
        DatasetError: the data cannot be read, or has no episodes that long in the split.
        CheckpointError: the checkpoint cannot be read.
    """
    folder = checkpoint_folder(options.checkpoint)
    checkpoint = load_checkpoint(folder)
    if len(checkpoint.dynamics.domains) > 1:
        raise InvalidArgument(
            f"checkpoint {checkpoint.name!r} must have one domain to be calibrated, got "
            f"{[domain.name for domain in checkpoint.dynamics.domains]}."
        )
    truth = load_held_out(
        open_dataset(options.data),
        split=options.split,
        episodes=options.episodes,
        rows=options.steps + 1,
        seed=options.seed,
    )
    rollouts = roll_out(checkpoint, truth, batch=options.batch, progress=options.progress)
    score = fit_uncertainty(rollouts.features_ETF, rollouts.dreamt_ET, rollouts.error_ET)
    print(
        f"error of large frames {score.config.large:.3f} and above; AUROC {score.config.auroc:.3f} on {len(truth)} "
        "validation episodes, each scored by a fit without it"
    )
    try:
        card = (folder / "README.md").read_text()
    except OSError as error:
        raise StorageError(f"checkpoint {str(folder)!r} must have a readable README.md: {error}.") from error
    return save_checkpoint(dataclasses.replace(checkpoint, uncertainty=score), options.out or folder, card=card)
