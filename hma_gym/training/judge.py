"""Train the classifier judge on ground-truth frames whose outcome MuJoCo knows.

    hma-gym train judge --data DATA.hdf5 --out runs/judge --minutes 6 --tokenizer runs/soft/tokenizer

On one core, 6 minutes see about 100 thousand windows. ``out`` then holds ``judge.safetensors``, ``judge.json`` (its
config, calibrated) and ``report.json`` (accuracy, precision, recall, Brier score and reliability on the test split).

Half of each batch shows the object within 3 cm of the height that decides, where the errors are; half is drawn evenly.
Some windows are shown as the tokenizer gives them back, with noise in the tokens, and all are damaged
(:mod:`hma_gym.judges.augment`), so that generated frames are not foreign. In some the object fades into the scene:
where it cannot be seen there is no success. A judge of a world that is trained already can be taught how that world
draws (``--world``): what it draws pale or blurred is then read for what it is.

Beside the frames the judge is told agent_pos, where the data has it (``--state``): with a little noise, for a world
foretells it with errors, and in some windows not at all, so that it still judges from the picture alone. A judge of
frames alone goes on as one that is told (``--init``): at first it says what it said before.

Shape legend: B windows, K window, F rows, N episodes, H W C image, P agent_pos dims.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from hma_gym.data.cache import targets_of
from hma_gym.data.episodes import Episode, apart
from hma_gym.data.object_pose import turned_alike
from hma_gym.data.robomimic_hdf5 import open_dataset
from hma_gym.dynamics.checkpoint import Checkpoint, load_checkpoint
from hma_gym.errors import DatasetError, InvalidArgument
from hma_gym.judges.augment import augment, fade_red
from hma_gym.judges.classifier import ClassifierConfig, ClassifierJudge, load_judge, save_judge
from hma_gym.judges.protocol import ask
from hma_gym.judges.rows import LabelledRows, RowLabels, label_rows
from hma_gym.judges.trained import JudgeT, TrainedJudge
from hma_gym.metrics.calibration import BinaryReport, binary_report
from hma_gym.metrics.video import background_image
from hma_gym.tokenizers.files import load_tokenizer
from hma_gym.tokenizers.protocol import Tokenizer
from hma_gym.training import (
    Every,
    OptimizerConfig,
    ParameterGroup,
    TrainConfig,
    default_parameter_groups,
    train,
)
from hma_gym.training.judge_upper import coded_rows, train_upper


@dataclass(frozen=True)
class JudgeTrainConfig:
    """One training run of a classifier judge.

    Attributes:
        data: robomimic file or ``.parts`` folder with rewards and images.
        more_data: further ones of the same task.
        out: the run's folder.
        tokenizer: folder of a trained tokenizer, whose round trips the judge shall know; None for real frames only.
        world: a checkpoint whose body draws robot and object (of one domain): instead of round trips, windows are shown
            as it draws the recorded poses, and the judge is calibrated on real and drawn frames alike.
        test_data: another dataset, all of whose episodes are the test; None for the test split of ``data``.
        init: folder of a trained judge to start from, instead of random weights; its shape is kept, and a judge of
            frames alone may learn to be told agent_pos.
        minutes: wall-clock time of training.
        steps: length in optimiser steps instead of minutes (exactly resumable).
        upper_steps: of the second stage (:mod:`hma_gym.training.judge_upper`); 0 for none.
        batch_size: windows per step.
        lr: peak learning rate of AdamW.
        window: K, last frames the judge sees.
        channels: widths of the encoder's stages.
        width: size of a frame's code.
        max_episodes: training episodes of each file held in memory (the first so many of the train split; 0.8 MB each).
        max_held_out: episodes of the valid and of the test split of each file that are used.
        roundtrip_episodes: training episodes also shown as the tokenizer reconstructs them (0 for none).
        token_noise: standard deviation added to soft tokens in those (in units of the tokens' own).
        decision_height: height of the object (m) that separates success from failure; rows near it are shown more
            often. None shows all rows evenly.
        fade_red: let the object, which is red, fade in some of the windows.
        position_weight: weight of the position loss beside the verdict's.
        state: tell the judge agent_pos, where the data has it.
        state_hidden: share of the windows in which it is hidden.
        state_noise: standard deviation of the noise added to it, one draw a window, own units.
        threads: torch threads.
        seed: of everything random.
        progress: show a progress bar.
    """

    data: Path
    out: Path
    more_data: tuple[Path, ...] = ()
    tokenizer: Path | None = None
    world: str | None = None
    test_data: Path | None = None
    init: Path | None = None
    minutes: float = 6.0
    steps: int | None = None
    upper_steps: int = 4000
    batch_size: int = 64
    lr: float = 2e-3
    window: int = 4
    channels: tuple[int, int, int] = (48, 64, 64)
    width: int = 128
    max_episodes: int = 1500
    max_held_out: int = 400
    roundtrip_episodes: int = 150
    token_noise: float = 0.2
    decision_height: float | None = 0.84
    fade_red: bool = True
    position_weight: float = 0.5
    state: bool = True
    state_hidden: float = 0.15
    state_noise: float = 0.002
    threads: int = 1
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("minutes", "batch_size", "lr", "max_episodes", "max_held_out", "threads"):
            if not getattr(self, name) > 0:
                raise InvalidArgument(f"{name} must be positive, got {getattr(self, name)}.")
        if self.upper_steps < 0:
            raise InvalidArgument(f"upper_steps must be 0 or more, got {self.upper_steps}.")
        if not 0 <= self.state_hidden <= 1 or self.state_noise < 0:
            raise InvalidArgument(
                "state_hidden must be a share in [0, 1] and state_noise at least 0, got "
                f"state_hidden={self.state_hidden}, state_noise={self.state_noise}."
            )
        if self.world is not None and self.tokenizer is not None:
            raise InvalidArgument(
                "a judge learns how a world draws, or its tokenizer's round trips: name world or tokenizer, got "
                f"world={self.world!r} and tokenizer={str(self.tokenizer)!r}."
            )


@dataclass(frozen=True)
class Measured:
    """What a calibrated judge says of labelled rows.

    Attributes:
        frames: the report over all rows.
        outcomes: the report over the episodes' last rows.
        position_error_m: median distance of the predicted from the true object position over those rows, metres.
        position_error_p95_m: its 95th percentile.
    """

    frames: BinaryReport
    outcomes: BinaryReport
    position_error_m: float
    position_error_p95_m: float


@dataclass(frozen=True)
class JudgeTrainResult:
    """What came out.

    Attributes:
        judge: calibrated, in eval mode.
        folder: where its files are.
        measured: on the test split.
    """

    judge: ClassifierJudge
    folder: Path
    measured: Measured


def judge_loss(
    judge: TrainedJudge, said: tuple[Tensor, Tensor], success_B: Tensor, place_B3: Tensor, position_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the verdict plus the Huber loss of the standardised position where it is known.

    Args:
        judge: whose statistics standardise the position.
        said: its logit (B,) and standardised position (B, 3).
        success_B: 1.0 or 0.0.
        place_B3: metres, NaN where unknown.
        position_weight: of the second loss.
    """
    logit_B, position_B3 = said[0].float(), said[1].float()
    verdict_loss = F.binary_cross_entropy_with_logits(logit_B, success_B)
    target_B3 = (place_B3 - judge.position_mean) / judge.position_std
    known_B3 = torch.isfinite(target_B3)
    distance_B3 = F.smooth_l1_loss(position_B3, target_B3.nan_to_num(), beta=0.1, reduction="none")
    position_loss = (distance_B3 * known_B3).sum() / known_B3.sum().clamp_min(1)
    accuracy = ((logit_B > 0) == (success_B > 0.5)).float().mean()
    metrics = {"verdict": verdict_loss.detach(), "position": position_loss.detach(), "accuracy": accuracy}
    return verdict_loss + position_weight * position_loss, metrics


class JudgeTraining(nn.Module):
    """The classifier with its loss, for :func:`hma_gym.training.loop.train`.

    Args:
        judge: what is trained.
        config: how.
        background_CHW: the empty scene in [-1, 1], into which a red object fades at times; None for no fading.
    """

    def __init__(self, judge: ClassifierJudge, config: JudgeTrainConfig, background_CHW: Tensor | None) -> None:
        super().__init__()
        self.judge = judge
        self.config = config
        self.register_buffer("background_CHW", background_CHW, persistent=False)
        self.background_CHW: Tensor | None

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """:func:`judge_loss` on damaged frames and noisy agent_pos."""
        frames_BKCHW = batch["frames_BKHWC"].permute(0, 1, 4, 2, 3).float() * (2 / 255) - 1
        success_B, place_B3 = batch["success_B"].float(), batch["position_B3"]
        with torch.autocast(frames_BKCHW.device.type, enabled=False):
            if self.background_CHW is not None:
                frames_BKCHW, gone_B = fade_red(frames_BKCHW, self.background_CHW, generator)
                success_B = success_B.masked_fill(gone_B, 0.0)
                place_B3 = place_B3.masked_fill(gone_B[:, None], float("nan"))
            damaged_BKCHW = augment(frames_BKCHW, generator)
            told_BKS = self.told(batch["agent_pos_BKP"], generator)
        said = self.judge(damaged_BKCHW, told_BKS)
        return self.loss_of(said, success_B, place_B3)

    def loss_of(
        self, said: tuple[Tensor, Tensor], success_B: Tensor, place_B3: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """:func:`judge_loss` of what the judge says."""
        return judge_loss(self.judge, said, success_B, place_B3, self.config.position_weight)

    def told(self, agent_pos_BKP: Tensor, generator: torch.Generator) -> Tensor:
        """What the judge is told of agent_pos, (B, K, S): with noise, and in some windows nothing; S = 0 where it is
        told none."""
        if not self.judge.state_dim:
            return self.judge.told(None, agent_pos_BKP.shape[:2])
        B, K, P = agent_pos_BKP.shape
        noise_B1P = torch.randn(B, 1, P, generator=generator, device=agent_pos_BKP.device)
        shown_B = torch.rand(B, 1, 1, generator=generator, device=agent_pos_BKP.device) >= self.config.state_hidden
        noisy_BKP = agent_pos_BKP + self.config.state_noise * noise_B1P
        return self.judge.told(noisy_BKP, noisy_BKP.shape[:2]) * shown_B

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """Every weight, the usual way."""
        return default_parameter_groups(self)


class JudgeBatches:
    """Windows drawn from labelled rows: half near the deciding height, half evenly; a pure function of the step."""

    def __init__(
        self, rows: LabelledRows, config: JudgeTrainConfig, roundtrip_FHWC: NDArray[np.uint8] | None = None
    ) -> None:
        self.rows, self.config, self.roundtrip_FHWC = rows, config, roundtrip_FHWC
        self.near_rows = rows.near(config.decision_height)

    def batch(self, step: int) -> Mapping[str, Tensor]:
        """``frames_BKHWC`` uint8, ``agent_pos_BKP`` float32, ``success_B`` bool, ``position_B3`` float32 (m)."""
        generator = np.random.default_rng((self.config.seed, step))
        size = self.config.batch_size
        chosen_B = self.rows.draw(self.near_rows, size, generator)
        index_BK = self.rows.windows(chosen_B, self.config.window)
        frames_BKHWC = self.rows.frames_FHWC[index_BK]
        if self.roundtrip_FHWC is not None:
            coded_B = (chosen_B < len(self.roundtrip_FHWC)) & (generator.random(size) < 0.7)
            frames_BKHWC[coded_B] = self.roundtrip_FHWC[index_BK[coded_B]]
        return {
            "frames_BKHWC": torch.from_numpy(frames_BKHWC),
            "agent_pos_BKP": torch.from_numpy(self.rows.agent_pos_FP[index_BK]),
            "success_B": torch.from_numpy(self.rows.success_F[chosen_B]),
            "position_B3": torch.from_numpy(self.rows.position_F3[chosen_B]),
        }


@torch.inference_mode()
def round_trip(
    tokenizer: Tokenizer, frames_FHWC: NDArray[np.uint8], noise: float, seed: int, batch: int = 64
) -> NDArray[np.uint8]:
    """Frames as the tokenizer gives them back; soft tokens get noise of 0 to ``noise``, a level per batch."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, len(frames_FHWC), batch):
        tokens = tokenizer.encode(torch.from_numpy(frames_FHWC[start : start + batch]))
        if tokens.is_floating_point():
            level = noise * torch.rand((), generator=generator)
            tokens = tokens + level * torch.randn(tokens.shape, generator=generator).to(tokens)
        parts.append(tokenizer.decode(tokens).numpy())
    return np.concatenate(parts)


def score_rows(
    judge: ClassifierJudge, rows: LabelledRows, rows_B: NDArray[np.int64], batch: int = 128
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Probability (B,) and predicted position (B, 3) at the given rows, told agent_pos where it is known."""
    probabilities, positions = [], []
    for start in range(0, len(rows_B), batch):
        index_BK = rows.windows(rows_B[start : start + batch], judge.window)
        frames = torch.from_numpy(rows.frames_FHWC[index_BK])
        agent_pos = torch.from_numpy(rows.agent_pos_FP[index_BK]) if rows.agent_pos_FP.shape[1] else None
        probabilities.append(ask(judge, judge.probability, frames, agent_pos).double().numpy())
        positions.append(ask(judge, judge.position, frames, agent_pos).double().numpy())
    return np.concatenate(probabilities), np.concatenate(positions)


def fit_temperature(logit_N: NDArray[np.float64], success_N: NDArray[np.bool_]) -> float:
    """The temperature in [0.25, 8] with the least cross-entropy (Guo et al. 2017, Section 4.2), to 2 percent."""
    grid = np.exp(np.arange(np.log(0.25), np.log(8.0), 0.02))
    signed_N = np.where(success_N, logit_N, -logit_N)
    losses = [np.logaddexp(0.0, -signed_N / temperature).mean() for temperature in grid]
    return float(grid[int(np.argmin(losses))])


def fit_threshold(probability_N: NDArray[np.float64], success_N: NDArray[np.bool_]) -> float:
    """The threshold in [0.05, 0.95] whose verdicts succeed as often as the truth does; the nearest to 0.5 of the best.

    An unbiased rate is what an evaluation rests on: a judge that errs must err both ways alike.
    """
    grid = np.round(np.arange(0.05, 0.951, 0.01), 2)
    bias = np.array([abs(float((probability_N >= t).mean() - success_N.mean())) for t in grid])
    best = grid[bias <= bias.min() + 1e-12]
    return float(best[np.argmin(np.abs(best - 0.5))])


@torch.inference_mode()
def drawn_frames(world: Checkpoint, episodes: Sequence[Episode], batch: int = 64) -> NDArray[np.uint8]:
    """The rows of episodes, end to end, as a world's body draws their recorded poses: (F, H, W, 3).

    Raises:
        InvalidArgument: a world that draws nothing.
        DatasetError: episodes whose agent_pos or object's pose the world's domain has not.
    """
    domain, body, tokenizer = world.domain, world.dynamics.adapter(0).body, world.tokenizer
    if body.look is None:
        raise InvalidArgument(
            f"world {world.name!r} must have a body that draws: soft tokens and agent_pos, got {tokenizer.kind!r} "
            f"tokens and {domain.state_dim} dims of agent_pos; name its tokenizer in its place."
        )
    parts = []
    for episode in apart(episodes):
        if episode.images_THWC.shape[1:3] != tokenizer.image_size:
            raise DatasetError(
                f"world {world.name!r} draws frames of {tokenizer.image_size} pixels, the data has "
                f"{episode.images_THWC.shape[1:3]}; record it at the world's size."
            )
        targets_TX = targets_of(episode)[:, : domain.target_dim]
        if (targets_TX.shape[1], episode.agent_pos_TP.shape[1]) != (domain.target_dim, domain.state_dim):
            raise DatasetError(
                f"world {world.name!r} has {domain.state_dim} dims of agent_pos and {domain.target_dim} of the "
                f"object, the data {episode.agent_pos_TP.shape[1]} and {targets_TX.shape[1]}; give data of its domain."
            )
        if body.target_dim:
            targets_TX = turned_alike(targets_TX, domain.object_turns)
        poses, things = (torch.from_numpy(np.asarray(x, np.float32)) for x in (episode.agent_pos_TP, targets_TX))
        for start in range(0, len(poses), batch):
            rows = slice(start, start + batch)
            tokens = body.drawn(poses[rows], things[rows, : body.target_dim])
            assert tokens is not None
            parts.append(tokenizer.decode(tokens).numpy())
    return np.concatenate(parts)


def _rows(
    paths: Sequence[Path], split: str | None, most: int, world: Checkpoint | None
) -> tuple[LabelledRows, NDArray[np.uint8] | None]:
    """Up to ``most`` episodes of a split of each dataset, or of the whole of it; and these as a world draws them."""
    episodes = []
    for path in paths:
        dataset = open_dataset(path)
        positions = list(range(len(dataset))) if split is None else dataset.split(split)
        if not positions:
            raise DatasetError(f"{str(path)!r} has no episode in split {split!r}; record at least a dozen episodes.")
        episodes += [dataset[position] for position in positions[:most]]
    return label_rows(episodes), None if world is None else drawn_frames(world, episodes)


class _Accuracy:
    """Accuracy on a fixed draw of validation rows."""

    def __init__(self, rows: LabelledRows, seed: int, most: int = 2000) -> None:
        total = len(rows.success_F)
        self.rows = rows
        self.chosen_B = np.random.default_rng(seed).permutation(total)[:most].astype(np.int64)

    def __call__(self, model: nn.Module, step: int) -> Mapping[str, float]:
        assert isinstance(model, JudgeTraining)
        probability, _ = score_rows(model.judge, self.rows, self.chosen_B)
        report = binary_report(probability, self.rows.success_F[self.chosen_B])
        return {"accuracy": report.accuracy, "brier": report.brier}


def train_judge(config: JudgeTrainConfig) -> JudgeTrainResult:
    """Train, calibrate on the valid split, measure on the test split, and write the judge to ``config.out``.

    Raises:
        DatasetError: the data has no rewards to learn from (all rows alike), or an empty split.
        CheckpointError: the tokenizer's folder cannot be read.
    """
    tokenizer = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
    world = None if config.world is None else load_checkpoint(config.world)
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)  # the fresh weights
    files = (config.data, *config.more_data)
    train_rows, coded = _rows(files, "train", config.max_episodes, world)
    valid_rows, valid_drawn = _rows(files, "valid", config.max_held_out, world)
    if config.test_data is None:
        test_rows, _ = _rows(files, "test", config.max_held_out, None)
    else:
        test_rows, _ = _rows((config.test_data,), None, config.max_held_out, None)
    if train_rows.success_F.all() or not train_rows.success_F.any():
        raise DatasetError(
            f"{str(config.data)!r}: all {len(train_rows.success_F)} training rows have one outcome; a judge needs "
            "episodes with success and with failure."
        )
    model = JudgeTraining(_fresh_judge(config, train_rows), config, _scene(config, train_rows))
    if tokenizer is not None and config.roundtrip_episodes > 0:
        rows = int(train_rows.last_N[: config.roundtrip_episodes][-1]) + 1
        coded = round_trip(tokenizer, train_rows.frames_FHWC[:rows], config.token_noise, config.seed)
    recipe = json.loads(json.dumps(vars(config), default=str))
    loop = TrainConfig(
        out=config.out,
        steps=config.steps,
        schedule_minutes=None if config.steps is not None else config.minutes,
        optimizer=OptimizerConfig(lr=config.lr, weight_decay=0.02),
        warmup_steps=50,
        decay_fraction=0.4,
        ema_decay=0.995,
        precision="bf16",
        checkpoint=Every(minutes=2),
        evaluation=Every(minutes=2),
        seed=config.seed,
        progress=config.progress,
        recipe=recipe,
    )
    result = train(model, JudgeBatches(train_rows, config, coded), loop, _Accuracy(valid_rows, config.seed))
    with result.ema.applied_to(model):
        raw = as_stored(model.judge)
    if config.upper_steps and result.finished:
        raw = _upper(config, model, raw, train_rows, coded)
    valid_B = np.arange(len(valid_rows), dtype=np.int64)
    seen = [valid_rows]
    if valid_drawn is not None:
        seen.append(dataclasses.replace(valid_rows, frames_FHWC=valid_drawn))
    said_F = np.concatenate([score_rows(raw, rows, valid_B)[0] for rows in seen])
    judge = calibrate(raw, said_F, np.concatenate([rows.success_F for rows in seen]))
    test_B = np.arange(len(test_rows), dtype=np.int64)
    measured = measure(judge, *score_rows(judge, test_rows, test_B), test_rows)
    untold = None
    if judge.state_dim:
        hidden = dataclasses.replace(test_rows, agent_pos_FP=test_rows.agent_pos_FP[:, :0])
        untold = measure(judge, *score_rows(judge, hidden, test_B), hidden)
    folder = save_judge(judge, config.out)
    write_report(judge, measured, folder, "report.json", untold)
    if config.progress:
        print(summary(measured, folder))
    return JudgeTrainResult(judge, folder, measured)


def _upper(
    config: JudgeTrainConfig,
    model: JudgeTraining,
    judge: ClassifierJudge,
    rows: LabelledRows,
    coded_FHWC: NDArray[np.uint8] | None,
) -> ClassifierJudge:
    """The judge after the second stage, on the frames as they are and, of the first so many, as they were coded."""
    parts = [coded_rows(judge, rows, rows.frames_FHWC)]
    if coded_FHWC is not None:
        parts.append(coded_rows(judge, rows.first(len(coded_FHWC)), coded_FHWC))
    judge = judge.train().requires_grad_(True)
    train_upper(
        judge,
        parts,
        model.told,
        model.loss_of,
        config.out,
        steps=config.upper_steps,
        decision_height=config.decision_height,
        seed=config.seed,
        progress=config.progress,
    )
    return as_stored(judge.eval())


def as_stored(judge: JudgeT) -> JudgeT:
    """Uncalibrated, and rounded to what is stored, so that reports are the shipped judge's."""
    raw = judge.calibrated(1.0, 0.5)
    raw.load_state_dict({key: value.half().float() for key, value in raw.state_dict().items()}, assign=True)
    return raw


def calibrate(raw: JudgeT, probability_F: NDArray[np.float64], success_F: NDArray[np.bool_]) -> JudgeT:
    """The judge with the temperature and the threshold that suit what it said uncalibrated, and the truth."""
    clipped = np.clip(probability_F, 1e-7, 1 - 1e-7)
    logit = np.log(clipped) - np.log1p(-clipped)
    temperature = fit_temperature(logit, success_F)
    return raw.calibrated(temperature, fit_threshold(1 / (1 + np.exp(-logit / temperature)), success_F))


def _fresh_judge(config: JudgeTrainConfig, rows: LabelledRows) -> ClassifierJudge:
    """Random weights, or those of ``config.init`` without its calibration, ready to be trained.

    Raises:
        InvalidArgument: a judge to start from that is told another agent_pos than this one would be.
    """
    if config.init is None:
        return ClassifierJudge(_shape(config, rows))
    judge, state = load_judge(config.init).calibrated(1.0, 0.5), _state(config, rows)
    if judge.state_dim == 0 and state["state_dim"]:
        frames_alone, judge = judge.state_dict(), ClassifierJudge(dataclasses.replace(judge.config, **state))
        judge.load_state_dict({**judge.state_dict(), **frames_alone})
    if judge.state_dim != state["state_dim"]:
        raise InvalidArgument(
            f"init must be a judge of frames alone, or one that is told {state['state_dim']} dims of agent_pos as here "
            f"(state={config.state}, data of {rows.agent_pos_FP.shape[1]} dims), got one that is told "
            f"{judge.state_dim}; give data of its robot, or another judge."
        )
    return judge.train().requires_grad_(True)


def _state(config: JudgeTrainConfig, rows: LabelledRows) -> dict[str, Any]:
    """The part of a classifier's config that says what it is told of agent_pos."""
    told_FP = rows.agent_pos_FP.astype(np.float64) if config.state else rows.agent_pos_FP[:, :0]
    return {
        "state_dim": told_FP.shape[1],
        "state_mean": tuple(told_FP.mean(axis=0).tolist()),
        "state_std": tuple(np.maximum(told_FP.std(axis=0), 1e-3).tolist()),
    }


def _scene(config: JudgeTrainConfig, rows: LabelledRows, most: int = 1000) -> Tensor | None:
    """The empty scene (C, H, W) in [-1, 1], from frames spread over all rows; None where nothing fades."""
    if not config.fade_red:
        return None
    spread = np.linspace(0, len(rows.frames_FHWC) - 1, min(most, len(rows.frames_FHWC))).astype(np.int64)
    background_HWC = background_image(torch.from_numpy(rows.frames_FHWC[spread]))
    return background_HWC.permute(2, 0, 1).float() * (2 / 255) - 1


def _shape(config: JudgeTrainConfig, rows: LabelledRows) -> ClassifierConfig:
    """The classifier's config for this data: its image size, and the statistics of agent_pos and of the object's
    position."""
    height, width = rows.frames_FHWC.shape[1:3]
    shape = ClassifierConfig(
        window=config.window,
        image_size=(height, width),
        channels=config.channels,
        width=config.width,
        **_state(config, rows),
    )
    known = rows.position_F3[np.isfinite(rows.position_F3).all(axis=1)].astype(np.float64)
    if not len(known):
        return shape
    (x, y, z), (dx, dy, dz) = known.mean(axis=0).tolist(), np.maximum(known.std(axis=0), 1e-3).tolist()
    return dataclasses.replace(shape, position_mean=(x, y, z), position_std=(dx, dy, dz))


def measure(
    judge: TrainedJudge, probability_F: NDArray[np.float64], position_F3: NDArray[np.float64], rows: RowLabels
) -> Measured:
    """Compare what a judge said of all rows with the truth."""
    outcome_N = probability_F[rows.last_N]
    distance_F = np.linalg.norm(position_F3 - rows.position_F3, axis=1)
    known = distance_F[np.isfinite(distance_F)]
    return Measured(
        binary_report(probability_F, rows.success_F, judge.threshold),
        binary_report(outcome_N, rows.success_F[rows.last_N], judge.threshold),
        float(np.median(known)) if len(known) else float("nan"),
        float(np.quantile(known, 0.95)) if len(known) else float("nan"),
    )


def write_report(
    judge: TrainedJudge, measured: Measured, folder: Path, name: str, untold: Measured | None = None
) -> None:
    """``<folder>/<name>``: the calibration and all that was measured, as JSON; ``untold`` is of a judge that is told
    agent_pos, without it."""
    error = (measured.position_error_m, measured.position_error_p95_m)
    report = {
        "episodes": measured.outcomes.count,
        "temperature": judge.calibration.temperature,
        "threshold": judge.threshold,
        "frames": dataclasses.asdict(measured.frames),
        "outcomes": dataclasses.asdict(measured.outcomes),
        "position_error_m": {
            key: value if np.isfinite(value) else None for key, value in zip(("median", "p95"), error, strict=True)
        },
    }
    if untold is not None:
        parts = {"frames": untold.frames, "outcomes": untold.outcomes}
        report["without_agent_pos"] = {key: dataclasses.asdict(part) for key, part in parts.items()}
    (folder / name).write_text(json.dumps(report, indent=2) + "\n")


def summary(measured: Measured, folder: Path) -> str:
    """One line for a person."""
    return (
        f"judge: {measured.outcomes.accuracy:.1%} of {measured.outcomes.count} held-out outcomes right, Brier "
        f"{measured.frames.brier:.4f} over frames, object within {measured.position_error_m * 100:.1f} cm "
        f"(median); written to {folder}"
    )
