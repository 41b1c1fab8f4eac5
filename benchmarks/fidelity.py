"""Fidelity of a checkpoint on held-out episodes: video, control, state and, above all, outcomes.

    hma-gym bench fidelity --checkpoint lift-64 --data data/lift64.hdf5 --episodes 200

On 2 CPU cores 200 episodes take about 10 minutes, most of it for delta-PSNR (5 random rollouts per episode); on a GPU
under one. Writes ``<out>/fidelity_<name>.json``, ``.md`` and ``_strips/``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from hma_gym.data.robomimic_hdf5 import Dataset, open_dataset
from hma_gym.dynamics.checkpoint import load_checkpoint
from hma_gym.evaluation.fidelity import FidelitySettings, Measured, measure_fidelity
from hma_gym.evaluation.fidelity_report import to_markdown, write_report
from hma_gym.evaluation.held_out import load_held_out
from hma_gym.evaluation.open_loop import device_of
from hma_gym.evaluation.provenance import provenance
from hma_gym.judges.classifier import load_judge
from hma_gym.judges.protocol import Judge
from hma_gym.judges.registry import get_judge
from hma_gym.metrics.video import background_image


@dataclass(frozen=True)
class FidelityConfig:
    """One run of the benchmark.

    Attributes:
        data: robomimic file or ``.parts`` folder.
        checkpoint: name, folder or hub id.
        episodes: how many episodes of the split, drawn at random with the seed.
        rows: rows of each episode; outcomes are read at the last.
        steps: video measures are over steps 1 to ``steps``.
        split: held-out split; None where the whole dataset was kept from training.
        judge: a registered judge's name or a folder that ``hma-gym train judge`` wrote; None for the checkpoint's own.
        random_sequences: random action sequences per episode for delta-PSNR; 0 leaves it out.
        control_episodes: delta-PSNR is measured on so many of the episodes (it costs the most); None for all.
        batch: episodes per network call.
        device: where the model runs.
        threads: torch threads; None leaves torch's choice.
        seed: of the draw of episodes, the rollouts, the random actions and the bootstrap.
        out: folder of the results.
        name: of the result files: ``fidelity_<name>``.
        progress: show progress bars.
    """

    data: Path
    checkpoint: str = "lift-64"
    episodes: int = 200
    rows: int = 64
    steps: int = 60
    split: str | None = "test"
    judge: str | None = None
    random_sequences: int = 5
    control_episodes: int | None = None
    batch: int = 32
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    out: Path = Path("benchmarks/results")
    name: str = "lift-64"
    progress: bool = True


def scene_frames(dataset: Dataset, episodes: int = 120, rows_each: int = 8) -> torch.Tensor:
    """Real frames spread over the training episodes (any, in a dataset without them): (N, H, W, 3) uint8."""
    chosen = dataset.split("train")[:episodes] or list(range(min(episodes, len(dataset))))
    frames = [dataset[position].images_THWC for position in chosen]
    spread = [images[np.linspace(0, len(images) - 1, rows_each).astype(int)] for images in frames]
    return torch.from_numpy(np.concatenate(spread))


def choose_judge(name: str | None, own: Judge | None) -> Judge | None:
    """The judge of a folder or of a name, else the checkpoint's own."""
    if name is None:
        return own
    return load_judge(name) if Path(name).is_dir() else get_judge(name)


def fidelity(config: FidelityConfig) -> Measured:
    """Run the benchmark, write its files, print its table."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    checkpoint = load_checkpoint(config.checkpoint, device=config.device)
    dataset = open_dataset(config.data)
    held_out = load_held_out(dataset, split=config.split, episodes=config.episodes, rows=config.rows, seed=config.seed)
    settings = FidelitySettings(
        steps=config.steps,
        last_steps=min(10, config.steps),
        random_sequences=config.random_sequences,
        control_episodes=config.control_episodes,
        batch=config.batch,
        seed=config.seed,
        progress=config.progress,
    )
    measured = measure_fidelity(
        checkpoint,
        held_out,
        settings,
        background_HWC=background_image(scene_frames(dataset)),
        judge=choose_judge(config.judge, checkpoint.judge),
    )
    facts = provenance(device_of(checkpoint))
    # The data's place on this machine is nobody's business; its name is; so with the checkpoint's.
    plain = {**asdict(config), "data": config.data.name, "out": config.out.name, "checkpoint": checkpoint.name}
    page = write_report(measured, held_out, config.out, name=f"fidelity_{config.name}", provenance=facts, config=plain)
    print(to_markdown(measured.report, facts, plain))
    print(f"written: {page}")
    return measured
