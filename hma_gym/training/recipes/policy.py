"""Train a diffusion policy on demonstrations: ``hma-gym train policy``.

    hma-gym train policy --data demos.hdf5 --out runs/policy --steps 5000 --read-object

``out/step-0001000`` and so on are checkpoints of the averaged weights, kept along the way, each a policy that
``hma-gym evaluate`` takes; ``out/metrics.jsonl`` is the log. Killed at any moment, the same line goes on.

Shape legend: E episodes, T rows, B batch, O observations, H predicted actions, A action dims, P agent_pos dims,
X auxiliary targets (object position 3 m; cosine and sine of four times its yaw).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hma_gym.data.episodes import Episode
from hma_gym.data.robomimic_hdf5 import Dataset, open_dataset
from hma_gym.errors import DatasetError, InvalidArgument
from hma_gym.policies.diffusion import DiffusionConfig, DiffusionModel, Normalisation, save_diffusion
from hma_gym.policies.sighted import OBJECT_SIZE, object_targets
from hma_gym.training import Every, OptimizerConfig, TrainConfig, saved_weights, train
from hma_gym.training.saved import read_state, saved_files

_VALIDATION_DRAWS = 4
_LEAST_STD = 1e-4


@dataclass(frozen=True)
class PolicyOptions:
    """Options of ``hma-gym train policy``.

    Attributes:
        data: robomimic HDF5 file (or its ``.parts`` folder) of demonstrations with images.
        out: folder of the run.
        steps: length in optimiser steps.
        keep_every: steps between the checkpoints that are kept.
        demonstrations: how many to learn from, the first so many that are not of the validation split; None for all.
        network: ``unet`` or ``transformer``.
        unet_channels: widths of the U-Net's levels.
        read_object: also teach a head to read off the image where the object is, from ``obs/object`` of the
            demonstrations, and act on what it reads. It pays where there are few demonstrations or little time.
        batch_size: samples a step.
        lr: peak learning rate of AdamW.
        minutes: stop this session, saved, after so many minutes; the same line goes on.
        device: ``cpu`` or ``cuda``.
        threads: torch threads on the CPU.
        seed: of everything random.
        progress: show a progress bar.
    """

    data: Path
    out: Path
    steps: int = 5000
    keep_every: int = 500
    demonstrations: int | None = None
    network: Literal["unet", "transformer"] = "unet"
    unet_channels: tuple[int, ...] = (64, 128)
    read_object: bool = False
    batch_size: int = 32
    lr: float = 1e-3
    minutes: float | None = None
    device: str = "cpu"
    threads: int = 1
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "keep_every", "batch_size", "lr", "threads"):
            if not getattr(self, name) > 0:
                raise InvalidArgument(f"{name} must be positive, got {getattr(self, name)}.")
        if self.demonstrations is not None and self.demonstrations < 1:
            raise InvalidArgument(f"demonstrations must be at least 1, got {self.demonstrations}.")


def policy_recipe(options: PolicyOptions, config: DiffusionConfig) -> TrainConfig:
    """The loop's configuration.

    A step of 32 samples takes one CPU core (AVX-512 bf16) 0.13 s with the default sizes.
    """
    return TrainConfig(
        out=options.out,
        steps=options.steps,
        optimizer=OptimizerConfig(lr=options.lr, weight_decay=1e-4, betas=(0.9, 0.98)),
        warmup_steps=100,
        decay="wsd",  # for the last policy; in the earlier ones the average of the weights stands in for a decay
        decay_fraction=0.3,
        ema_decay=0.995,
        precision="bf16",
        device=options.device,
        seed=options.seed,
        checkpoint=Every(steps=options.keep_every, minutes=5),
        evaluation=Every(steps=options.keep_every),
        max_minutes=options.minutes,
        log_every=20,
        progress=options.progress,
        recipe={
            "policy": config.to_json(),
            "demonstrations": options.demonstrations,
            "batch_size": options.batch_size,
        },
    )


@dataclass(frozen=True)
class PolicyBatches:
    """Random moments of the demonstrations; a pure function of (seed, step).

    Attributes:
        episodes: the demonstrations.
        auxiliary_ETX: targets of each row of each, (T, X); X may be 0.
        config: of the policy: the horizons.
        batch_size: B.
        seed: of the draw.
    """

    episodes: Sequence[Episode]
    auxiliary_ETX: Sequence[NDArray[np.float32]]
    config: DiffusionConfig
    batch_size: int
    seed: int = 0

    def batch(self, step: int) -> dict[str, Tensor]:
        """``images_BOHWC`` uint8, ``agent_pos_BOP``, ``actions_BHA``, ``auxiliary_BOX``.

        Before an episode's first row that row repeats, after its last one the last action does.
        """
        rng = np.random.default_rng((self.seed, step))
        seen_count, acted_count = self.config.observation_horizon, self.config.prediction_horizon
        rows: dict[str, list[NDArray[Any]]] = {
            key: [] for key in ("images_BOHWC", "agent_pos_BOP", "actions_BHA", "auxiliary_BOX")
        }
        for episode_index in rng.integers(len(self.episodes), size=self.batch_size):
            episode = self.episodes[episode_index]
            now = int(rng.integers(max(1, len(episode) - self.config.action_horizon)))
            seen = np.maximum(np.arange(now - seen_count + 1, now + 1), 0)
            acted = np.clip(now - seen_count + 1 + np.arange(acted_count), 0, len(episode) - 1)
            rows["images_BOHWC"].append(episode.images_THWC[seen])
            rows["agent_pos_BOP"].append(episode.agent_pos_TP[seen][:, : self.config.agent_pos_dim])
            rows["actions_BHA"].append(episode.actions_TA[acted])
            rows["auxiliary_BOX"].append(self.auxiliary_ETX[episode_index][seen])
        return {key: torch.from_numpy(np.stack(values)) for key, values in rows.items()}


def read_demonstrations(
    dataset: Dataset, count: int | None, *, read_object: bool
) -> tuple[list[Episode], list[Episode], list[NDArray[np.float32]], list[NDArray[np.float32]]]:
    """Training and validation episodes, and the auxiliary targets of each.

    Raises:
        DatasetError: too few demonstrations, or no object in them where one is asked for.
    """
    valid = dataset.moving(dataset.split("valid"))
    learned_from = [position for position in dataset.moving() if position not in set(valid)]
    if len(learned_from) < (count or 1) or not valid:
        raise DatasetError(
            f"{str(dataset.path)!r} has {len(learned_from)} demonstrations to learn from and {len(valid)} for "
            f"validation; {count or 1} and 1 are needed: record more."
        )
    training = [dataset[position] for position in learned_from[:count]]
    validation = [dataset[position] for position in valid]

    def targets(episodes: Sequence[Episode]) -> list[NDArray[np.float32]]:
        if not read_object:
            return [np.zeros((len(episode), 0), np.float32) for episode in episodes]
        return [object_targets(episode.obs, str(dataset.path)) for episode in episodes]

    return training, validation, targets(training), targets(validation)


def measure_normalisation(
    episodes: Sequence[Episode], auxiliary_ETX: Sequence[NDArray[np.float32]], config: DiffusionConfig
) -> Normalisation:
    """Statistics over all rows of the demonstrations."""
    pose = np.concatenate([episode.agent_pos_TP for episode in episodes])[:, : config.agent_pos_dim]
    actions = np.concatenate([episode.actions_TA for episode in episodes])
    auxiliary = np.concatenate(auxiliary_ETX)

    def plain(values: NDArray[np.floating[Any]]) -> tuple[float, ...]:
        return tuple(float(value) for value in values)

    return Normalisation(
        agent_pos_mean=plain(pose.mean(axis=0)),
        agent_pos_std=plain(np.maximum(pose.std(axis=0), _LEAST_STD)),
        action_low=plain(actions.min(axis=0)),
        action_high=plain(actions.max(axis=0)),
        auxiliary_mean=plain(auxiliary.mean(axis=0)),
        auxiliary_std=plain(np.maximum(auxiliary.std(axis=0), _LEAST_STD)),
    )


def train_policy(options: PolicyOptions) -> Path:
    """``hma-gym train policy``: returns the folder of the newest checkpoint.

    Raises:
        DatasetError: the demonstrations are missing, too few, or lack what is asked for.
        MissingExtra: diffusers is not installed.
        ResumeError: ``out`` holds a run with other options.
    """
    torch.set_num_threads(options.threads)
    dataset = open_dataset(options.data)
    training, validation, training_ETX, validation_ETX = read_demonstrations(
        dataset, options.demonstrations, read_object=options.read_object
    )
    first = training[0]
    config = DiffusionConfig(
        image_size=(first.images_THWC.shape[1], first.images_THWC.shape[2]),
        agent_pos_dim=first.agent_pos_TP.shape[1],
        action_dim=first.actions_TA.shape[1],
        network=options.network,
        unet_channels=options.unet_channels,
        auxiliary_dim=OBJECT_SIZE if options.read_object else 0,
    )
    torch.manual_seed(options.seed)
    model = DiffusionModel(config, measure_normalisation(training, training_ETX, config))
    provenance = {
        "data": options.data.name,
        "demonstrations": len(training),
        "seed": options.seed,
        "batch_size": options.batch_size,
    }
    held_out = PolicyBatches(validation, validation_ETX, config, options.batch_size, seed=options.seed + 1)

    def keep(step: int, weights: Mapping[str, Tensor]) -> Path:
        folder = options.out / f"step-{step:07d}"
        return save_diffusion(folder, config, weights, {**provenance, "step": step})

    def evaluate(model: nn.Module, step: int) -> Mapping[str, float]:
        assert isinstance(model, DiffusionModel)
        keep(step, model.state_dict())
        return measure_policy(model, held_out)

    train_config = policy_recipe(options, config)
    # A kill between the saving of a state and the keeping of its policy.
    for state in saved_files(options.out):
        step = read_state(state).step
        if step % options.keep_every == 0 and not (options.out / f"step-{step:07d}" / "config.json").exists():
            keep(step, saved_weights(state))
    batches = PolicyBatches(training, training_ETX, config, options.batch_size, options.seed)
    result = train(model, batches, train_config, evaluate)
    return keep(result.step, result.ema.state_dict(model))


def measure_policy(model: DiffusionModel, held_out: PolicyBatches) -> dict[str, float]:
    """Error of sampled actions against the demonstrated ones on held-out moments, and of the object's place.

    Returns:
        ``action_error``: mean absolute difference over the carried-out actions (env units); ``object_error_cm``: median
        distance, with an auxiliary head.
    """
    first = model.config.observation_horizon - 1
    last = first + model.config.action_horizon
    device = model.action_low.device
    generator = torch.Generator().manual_seed(0)
    errors, distances = [], []
    for draw in range(_VALIDATION_DRAWS):
        batch = held_out.batch(draw)
        noise_BHA = torch.randn(batch["actions_BHA"].shape, generator=generator)
        sampled = model.sample(
            batch["images_BOHWC"].to(device), batch["agent_pos_BOP"].to(device), noise_BHA.to(device)
        ).cpu()
        errors.append((sampled - batch["actions_BHA"][:, first:last]).abs().mean())
        if model.auxiliary is not None:
            read = model.read_auxiliary(batch["images_BOHWC"][:, -1].to(device)).cpu()
            distances.append((read - batch["auxiliary_BOX"][:, -1])[:, :3].norm(dim=-1))
    figures = {"action_error": float(torch.stack(errors).mean())}
    if distances:
        figures["object_error_cm"] = 100 * float(torch.cat(distances).median())
    return figures
