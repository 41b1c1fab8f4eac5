"""Train the feature judge on the tokens of ground-truth frames whose outcome MuJoCo knows.

    hma-gym train feature-judge --data DATA.hdf5 --tokenizer runs/soft/tokenizer --out runs/judge

3000 steps take 2 minutes on one core, once the tokens are there; ``--tokens`` takes those that training the dynamics
model left (``<out>/<domain>.tokens.h5``). ``out`` then holds ``feature_judge.safetensors``, ``feature_judge.json`` (its
config, calibrated) and ``feature_report.json``.

As for the classifier, half of each batch shows the object near the height that decides. So that generated tokens are
not foreign, tokens get noise, some are shown after a round trip through decoder and encoder, and in some the object has
faded from the picture that was encoded: where it cannot be seen there is no success.

Shape legend: B windows, K window, F rows, V rows of which there are variants, S tokens of a frame, C channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hma_gym.data.cache import TokenCache, build_token_cache, demo_of, load_token_cache
from hma_gym.data.robomimic_hdf5 import Dataset, open_dataset
from hma_gym.errors import DatasetError, InvalidArgument
from hma_gym.judges.augment import fade_red
from hma_gym.judges.feature import FeatureConfig, FeatureJudge, save_feature_judge
from hma_gym.judges.rows import TokenRows, bounds_of, success_after
from hma_gym.metrics.calibration import binary_report
from hma_gym.metrics.video import background_image
from hma_gym.tokenizers.files import load_tokenizer
from hma_gym.tokenizers.protocol import Tokenizer
from hma_gym.training import Every, OptimizerConfig, ParameterGroup, TrainConfig, default_parameter_groups, train
from hma_gym.training.judge import Measured, as_stored, calibrate, judge_loss, measure, summary, write_report
from hma_gym.training.recipes.dynamics import tokenizer_digest

_SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class FeatureTrainConfig:
    """One training run of a feature judge.

    Attributes:
        data: robomimic file or ``.parts`` folder with rewards and images.
        tokenizer: folder of the trained tokenizer whose tokens the judge shall read.
        out: the run's folder.
        tokens: token cache of ``data``; None encodes the frames, once, into ``<out>/tokens.h5``.
        test_data: another dataset, all of whose episodes are the test; None for the test split of ``data``.
        steps: length in optimiser steps.
        batch_size: windows per step.
        lr: peak learning rate of AdamW.
        window: K, last frames the judge reads.
        hidden, width: of the layers that make a frame's code.
        token_noise: most noise added to soft tokens (standard deviation, in units of the tokens' own); a fifth of it is
            the largest share of vq tokens that are replaced.
        varied_episodes: training episodes also shown after a round trip, and with a faded object.
        decision_height: height of the object (m) that separates success from failure; rows near it are shown more
            often. None shows success and failure alike.
        fade_red: the object is red, and fades in the varied episodes.
        position_weight: weight of the position loss beside the verdict's.
        threads: torch threads.
        seed: of everything random.
        progress: show a progress bar.
    """

    data: Path
    tokenizer: Path
    out: Path
    tokens: Path | None = None
    test_data: Path | None = None
    steps: int = 3000
    batch_size: int = 128
    lr: float = 2e-3
    window: int = 4
    hidden: int = 256
    width: int = 128
    token_noise: float = 0.5
    varied_episodes: int = 150
    decision_height: float | None = 0.84
    fade_red: bool = True
    position_weight: float = 0.5
    threads: int = 1
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lr", "varied_episodes", "threads"):
            if not getattr(self, name) > 0:
                raise InvalidArgument(f"{name} must be positive, got {getattr(self, name)}.")


@dataclass(frozen=True)
class FeatureTrainResult:
    """What came out.

    Attributes:
        judge: calibrated, in eval mode.
        folder: where its files are.
        measured: on the test episodes' ground-truth frames.
    """

    judge: FeatureJudge
    folder: Path
    measured: Measured


@dataclass(frozen=True)
class Variants:
    """Other tokens of the first V rows.

    Attributes:
        coded_V: after noise and a round trip through decoder and encoder.
        faded_V: with the object faded from the encoded frames.
        gone_V: bool, where it is so faint there that it cannot be seen.
    """

    coded_V: NDArray[Any]
    faded_V: NDArray[Any]
    gone_V: NDArray[np.bool_]


class FeatureTraining(nn.Module):
    """The judge with its loss, for :func:`hma_gym.training.loop.train`."""

    def __init__(self, judge: FeatureJudge, config: FeatureTrainConfig) -> None:
        super().__init__()
        self.judge = judge
        self.config = config

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """:func:`~hma_gym.training.judge.judge_loss` on noisy tokens, some of them of a paused video."""
        tokens_BK, noise = batch["tokens_BK"], self.config.token_noise
        B, device = len(tokens_BK), tokens_BK.device
        row = (B, *(1,) * (tokens_BK.ndim - 1))
        paused_B = torch.rand(row, generator=generator, device=device) < 0.15
        tokens_BK = torch.where(paused_B, tokens_BK[:, -1:], tokens_BK)
        level_B = noise * torch.rand(row, generator=generator, device=device)
        level_B = level_B * (torch.rand(row, generator=generator, device=device) < 0.6)
        if tokens_BK.is_floating_point():
            tokens_BK = tokens_BK + level_B * torch.randn(tokens_BK.shape, generator=generator, device=device)
        else:
            other_BK = tokens_BK.flatten()[torch.randperm(tokens_BK.numel(), generator=generator, device=device)]
            swapped = torch.rand(tokens_BK.shape, generator=generator, device=device) < level_B / 5
            tokens_BK = torch.where(swapped, other_BK.view_as(tokens_BK), tokens_BK)
        said = self.judge(self.judge.numbers(tokens_BK))
        success_B, place_B3 = batch["success_B"].float(), batch["position_B3"]
        return judge_loss(self.judge, said, success_B, place_B3, self.config.position_weight)

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """Every weight, the usual way."""
        return default_parameter_groups(self)


class FeatureBatches:
    """Windows drawn from rows: half of them from rows that have variants, and half of either near the deciding height.

    A pure function of the step.
    """

    def __init__(self, rows: TokenRows, variants: Variants, config: FeatureTrainConfig) -> None:
        self.rows, self.variants, self.config = rows, variants, config
        everywhere, near = np.arange(len(rows), dtype=np.int64), rows.near(config.decision_height)
        varied = len(variants.gone_V)
        pools = (everywhere, near, everywhere[:varied], near[near < varied])
        self.pools = [pool for pool in pools if len(pool)]

    def batch(self, step: int) -> Mapping[str, Tensor]:
        """``tokens_BK``, ``success_B`` bool, ``position_B3`` float32 (m)."""
        generator = np.random.default_rng((self.config.seed, step))
        size, rows, variants = self.config.batch_size, self.rows, self.variants
        pool_B = np.arange(size) * len(self.pools) // size
        chosen_B = np.array([generator.choice(self.pools[pool]) for pool in pool_B])
        index_BK = rows.windows(chosen_B, self.config.window)
        tokens_BK = rows.tokens_F[index_BK]
        success_B, position_B3 = rows.success_F[chosen_B], rows.position_F3[chosen_B]
        draw_B, varied_B = generator.random(size), chosen_B < len(variants.gone_V)
        coded_B, faded_B = varied_B & (draw_B < 0.4), varied_B & (draw_B > 0.6)
        tokens_BK[coded_B] = variants.coded_V[index_BK[coded_B]]
        tokens_BK[faded_B] = variants.faded_V[index_BK[faded_B]]
        gone_B = faded_B.copy()
        gone_B[faded_B] = variants.gone_V[chosen_B[faded_B]]
        return {
            "tokens_BK": _tensor(tokens_BK),
            "success_B": torch.from_numpy(success_B & ~gone_B),
            "position_B3": torch.from_numpy(np.where(gone_B[:, None], np.float32("nan"), position_B3)),
        }


def _tensor(tokens: NDArray[Any]) -> Tensor:
    """Stored tokens as a tokenizer gives them: float32 or int64."""
    return torch.from_numpy(tokens.astype(np.float32 if tokens.dtype.kind == "f" else np.int64))


def score_tokens(
    judge: FeatureJudge, rows: TokenRows, rows_B: NDArray[np.int64], batch: int = 512
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Probability (B,) and predicted position (B, 3) at the given rows."""
    probabilities, positions = [], []
    for start in range(0, len(rows_B), batch):
        tokens_BK = _tensor(rows.tokens_F[rows.windows(rows_B[start : start + batch], judge.window)])
        probabilities.append(judge.probability_of_tokens(tokens_BK).double().numpy())
        positions.append(judge.position_of_tokens(tokens_BK).double().numpy())
    return np.concatenate(probabilities), np.concatenate(positions)


@torch.inference_mode()
def make_variants(
    tokenizer: Tokenizer, frames_FHWC: NDArray[np.uint8], rows: TokenRows, config: FeatureTrainConfig
) -> Variants:
    """The variants of an episode after the other, as far as there are frames."""
    generator = torch.Generator().manual_seed(config.seed)
    frames = torch.from_numpy(frames_FHWC)
    spread = torch.linspace(0, len(frames) - 1, min(1000, len(frames))).long()
    scene_CHW = background_image(frames[spread]).permute(2, 0, 1).float() * (2 / 255) - 1
    coded, faded, gone = [], [], []
    begin = 0
    for last in rows.last_N[rows.last_N < len(frames)]:
        episode_TCHW = frames[begin : last + 1].permute(0, 3, 1, 2).float() * (2 / 255) - 1
        tokens_T = _tensor(rows.tokens_F[begin : last + 1])
        if tokens_T.is_floating_point():
            level = config.token_noise * torch.rand((), generator=generator)
            tokens_T = tokens_T + level * torch.randn(tokens_T.shape, generator=generator)
        coded.append(tokenizer.encode(tokenizer.decode(tokens_T)).numpy())
        share = 1.0 if config.fade_red else 0.0
        faded_1TCHW, gone_1 = fade_red(episode_TCHW[None], scene_CHW, generator, share)
        pixels = ((faded_1TCHW[0] + 1) * (255 / 2)).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        faded.append(tokenizer.encode(pixels).numpy())
        gone.append(np.full(len(pixels), bool(gone_1)))
        begin = int(last) + 1
    kind = rows.tokens_F.dtype
    return Variants(np.concatenate(coded).astype(kind), np.concatenate(faded).astype(kind), np.concatenate(gone))


def token_rows(dataset: Dataset, cache: TokenCache, splits: Sequence[str]) -> TokenRows:
    """The episodes of some splits that a cache has, with what the dataset knows of them; decodes no image.

    Raises:
        DatasetError: there are none, or the cache has episodes that the dataset does not have.
    """
    places = {demo.name: position for position, demo in enumerate(dataset.demos)}
    chosen = np.concatenate([cache.episodes(split) for split in splits])
    demos = list(dict.fromkeys(demo_of(cache.name_N[n]) for n in chosen))
    unknown = [name for name in demos if name not in places]
    if not len(chosen) or unknown:
        raise DatasetError(
            f"the token cache must be of {str(dataset.path)!r} and have episodes of {list(splits)}, got {len(chosen)}, "
            f"of which the dataset lacks {unknown[:3]}; leave tokens out to encode the frames."
        )
    flat = dataset.flat([places[name] for name in demos])
    rewards = zip(demos, np.split(flat.rewards_F, flat.starts_N1[1:-1]), strict=True)
    success = [success_after(rewards_T, dataset.demos[places[name]].still) for name, rewards_T in rewards]
    parts = [cache.rows(int(n)) for n in chosen]
    targets_F3 = np.concatenate([cache.targets_FX[part, :3] for part in parts])
    if targets_F3.shape[1] < 3:
        targets_F3 = np.full((len(targets_F3), 3), np.nan)
    first_F, last_N = bounds_of(np.diff(cache.starts_N1)[chosen])
    return TokenRows(
        success_F=np.concatenate(success),
        position_F3=targets_F3.astype(np.float32),
        first_F=first_F,
        last_N=last_N,
        tokens_F=np.concatenate([cache.tokens[part] for part in parts]),
    )


def _tokens(path: Path, dataset: Dataset, tokenizer: Tokenizer, progress: bool) -> TokenCache:
    """The token cache at a path, made if needed."""
    digest = tokenizer_digest(tokenizer)
    if path.exists():
        cache = load_token_cache(path)
        if cache.tokenizer != digest:
            raise DatasetError(
                f"token cache {str(path)!r} was made with tokenizer {cache.tokenizer!r}, this one is {digest!r}; "
                "choose the tokenizer that it was made with, or another folder."
            )
        return cache
    cache = build_token_cache(dataset, tokenizer.encode, tokenizer=digest, progress=progress)
    cache.save(path)
    return cache


class _Accuracy:
    """Accuracy on a fixed draw of validation rows."""

    def __init__(self, rows: TokenRows, seed: int, most: int = 4000) -> None:
        self.rows = rows
        self.chosen_B = np.random.default_rng(seed).permutation(len(rows))[:most].astype(np.int64)

    def __call__(self, model: nn.Module, step: int) -> Mapping[str, float]:
        assert isinstance(model, FeatureTraining)
        probability, _ = score_tokens(model.judge, self.rows, self.chosen_B)
        report = binary_report(probability, self.rows.success_F[self.chosen_B])
        return {"accuracy": report.accuracy, "brier": report.brier}


def _fresh(tokenizer: Tokenizer, rows: TokenRows, config: FeatureTrainConfig) -> FeatureJudge:
    """Random weights, in the shape of the tokens, with the statistics of the object's position."""
    shape = FeatureConfig(
        window=config.window,
        tokens=tokenizer.tokens_per_frame,
        channels=tokenizer.channels,
        vocabulary=tokenizer.vocabulary,
        hidden=config.hidden,
        width=config.width,
    )
    known = rows.position_F3[np.isfinite(rows.position_F3).all(axis=1)].astype(np.float64)
    if len(known):
        (x, y, z), (dx, dy, dz) = known.mean(axis=0).tolist(), np.maximum(known.std(axis=0), 1e-3).tolist()
        shape = dataclasses.replace(shape, position_mean=(x, y, z), position_std=(dx, dy, dz))
    return FeatureJudge(shape)


def train_feature_judge(config: FeatureTrainConfig) -> FeatureTrainResult:
    """Train, calibrate on the valid split, measure on the test split, and write the judge to ``config.out``.

    Raises:
        DatasetError: the data has no rewards to learn from (all rows alike), an empty split, or tokens of others.
        CheckpointError: the tokenizer's folder cannot be read.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)  # the fresh weights
    dataset = open_dataset(config.data)
    cache = _tokens(config.tokens or config.out / "tokens.h5", dataset, tokenizer, config.progress)
    train_rows, valid_rows = (token_rows(dataset, cache, (split,)) for split in ("train", "valid"))
    if config.test_data is None:
        test_rows = token_rows(dataset, cache, ("test",))
    else:
        other = open_dataset(config.test_data)
        test_rows = token_rows(
            other, _tokens(config.out / "test_tokens.h5", other, tokenizer, config.progress), _SPLITS
        )
    if train_rows.success_F.all() or not train_rows.success_F.any():
        raise DatasetError(
            f"{str(config.data)!r}: all {len(train_rows)} training rows have one outcome; a judge needs episodes with "
            "success and with failure."
        )
    names = dict.fromkeys(demo_of(cache.name_N[n]) for n in cache.episodes("train")[: config.varied_episodes])
    places = {demo.name: position for position, demo in enumerate(dataset.demos)}
    frames_FHWC = np.concatenate([dataset[places[name]].images_THWC for name in names])
    variants = make_variants(tokenizer, frames_FHWC, train_rows, config)
    model = FeatureTraining(_fresh(tokenizer, train_rows, config), config)
    loop = TrainConfig(
        out=config.out,
        steps=config.steps,
        optimizer=OptimizerConfig(lr=config.lr, weight_decay=0.05),
        warmup_steps=min(100, config.steps // 2),
        decay_fraction=0.8,
        ema_decay=0.995,
        checkpoint=Every(minutes=2),
        evaluation=Every(minutes=2),
        seed=config.seed,
        progress=config.progress,
        recipe={key: str(value) if isinstance(value, Path) else value for key, value in vars(config).items()},
    )
    batches = FeatureBatches(train_rows, variants, config)
    result = train(model, batches, loop, _Accuracy(valid_rows, config.seed))
    with result.ema.applied_to(model):
        raw = as_stored(model.judge)
    valid_B = np.arange(len(valid_rows), dtype=np.int64)
    judge = calibrate(raw, score_tokens(raw, valid_rows, valid_B)[0], valid_rows.success_F)
    test_B = np.arange(len(test_rows), dtype=np.int64)
    measured = measure(judge, *score_tokens(judge, test_rows, test_B), test_rows)
    folder = save_feature_judge(judge, config.out)
    write_report(judge, measured, folder, "feature_report.json")
    if config.progress:
        print(summary(measured, folder))
    return FeatureTrainResult(judge, folder, measured)
