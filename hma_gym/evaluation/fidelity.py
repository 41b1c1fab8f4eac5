"""Fidelity: how near the learned world stays to MuJoCo, open loop from one real frame under the true actions.

    report = measure_fidelity(checkpoint, held_out, FidelitySettings())

The figure that matters is the outcome: does the judge, looking at the last frame of the generated video, see what
MuJoCo says at that row? It is told category by category, for an overall figure hides optimism. Beside every figure
stands what bounds it: the tokenizer's ceiling, the floor of a video that copies its first frame, and the judge's own
accuracy on the real video.

Shape legend: B episodes, T steps (entry t follows action t, and is compared with row t + 1), R random action
sequences, H W C image, P agent_pos dims, X targets.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hma_gym.dynamics.checkpoint import Checkpoint
from hma_gym.dynamics.heads import Scene
from hma_gym.dynamics.maskgit import MaskGITHead
from hma_gym.errors import InvalidArgument
from hma_gym.evaluation.held_out import HeldOut
from hma_gym.evaluation.open_loop import Generated, device_of, generate, reconstruct
from hma_gym.judges.protocol import Judge, Locator, episode_positions, episode_probabilities, verdict
from hma_gym.metrics import video
from hma_gym.metrics.statistics import Interval, bootstrap_interval, wilson_interval

POSITION_DIMS = 3
"""The first values of agent_pos are the end effector's position in metres."""

Curve = tuple[float, ...]
"""A mean over episodes for each step 1, 2, ... T."""


@dataclass(frozen=True)
class FidelitySettings:
    """What is measured.

    Attributes:
        steps: video measures are over steps 1 to ``steps``; outcomes are at the last row of the episodes.
        last_steps: length of the tail that is also reported by itself.
        random_sequences: R, random action sequences per episode for delta-PSNR (0 leaves it out).
        control_episodes: delta-PSNR is measured on the first so many episodes; None for all.
        foreground_threshold: how far (of 255) a pixel differs from the background to count as foreground.
        batch: episodes per network call.
        seed: of the model's rollouts, the random actions and the bootstrap.
        progress: show progress bars.
    """

    steps: int = 60
    last_steps: int = 10
    random_sequences: int = 5
    control_episodes: int | None = None
    foreground_threshold: int = 24
    batch: int = 32
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.control_episodes is not None and self.control_episodes < 1:
            raise InvalidArgument(f"control_episodes must be 1 or more, or None for all, got {self.control_episodes}.")
        if not 1 <= self.last_steps <= self.steps or self.random_sequences < 0 or self.batch < 1:
            raise InvalidArgument(
                "need 1 <= last_steps <= steps, random_sequences >= 0 and batch >= 1, got "
                f"steps={self.steps}, last_steps={self.last_steps}, random_sequences={self.random_sequences}, "
                f"batch={self.batch}."
            )


@dataclass(frozen=True)
class VideoQuality:
    """One video source against the truth, steps 1 to ``steps``; in dB, SSIM in [-1, 1]; intervals over episodes."""

    psnr: Interval
    psnr_last: Interval
    foreground_psnr: Interval
    foreground_psnr_last: Interval
    ssim: Interval
    psnr_curve: Curve
    foreground_psnr_curve: Curve


@dataclass(frozen=True)
class OutcomeCounts:
    """Verdicts on generated videos against MuJoCo, for one category or all."""

    episodes: int
    agree: int
    agreement: Interval
    false_positives: int
    false_negatives: int
    true_successes: int
    seen_successes: int


@dataclass(frozen=True)
class Outcomes:
    """Outcome agreement.

    Attributes:
        overall, by_category: the counts.
        true_rate, seen_rate: success rates of MuJoCo and of the generated videos.
        rate_gap: seen minus true; positive is optimism.
    """

    overall: OutcomeCounts
    by_category: dict[str, OutcomeCounts]
    true_rate: float
    seen_rate: float
    rate_gap: Interval


@dataclass(frozen=True)
class FidelityReport:
    """All measures; None where the data or the model does not offer them.

    Attributes:
        episodes, rows, categories: what was measured on.
        generated, ceiling, floor: the model's video, the tokenizer's round trip, the copied first frame.
        delta_psnr: at the last step, dB.
        agent_pos_error_m: end-effector distance at step ``steps``; curve over all steps.
        cube_error_judge_m: object position that the judge reads off generated frames, against the truth, at step
            ``steps``; ``_floor`` is the same reading of real frames; ``_curve`` over the steps.
        cube_error_targets_m: the dynamics' own privileged prediction, at step ``steps``.
        outcomes: the judge on the generated video.
        outcomes_of_truth: the judge on the real video: how far it can be trusted.
        perplexity: of a discrete model's tokens, teacher-forced (:func:`measure_perplexity`); None for soft tokens.
        misses: indices of the episodes whose outcome was seen wrongly.
    """

    episodes: int
    rows: int
    steps: int
    categories: dict[str, int]
    generated: VideoQuality
    ceiling: VideoQuality
    floor: VideoQuality
    delta_psnr: Interval | None
    agent_pos_error_m: Interval | None
    agent_pos_error_curve_m: Curve
    cube_error_judge_m: Interval | None
    cube_error_judge_floor_m: Interval | None
    cube_error_judge_curve_m: Curve
    cube_error_targets_m: Interval | None
    outcomes: Outcomes | None
    outcomes_of_truth: Outcomes | None
    perplexity: Interval | None
    misses: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN becomes None."""
        return {key: _plain(value) for key, value in dataclasses.asdict(self).items()}


@dataclass(frozen=True)
class Measured:
    """The report and what it was measured on, for strips."""

    report: FidelityReport
    generated: Generated
    seen_B: NDArray[np.bool_] | None
    probability_B: NDArray[np.float64] | None


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _mean_interval(values_B: NDArray[np.floating[Any]], seed: int) -> Interval:
    finite = values_B[np.isfinite(values_B)]
    return bootstrap_interval(finite, seed=seed)


def _curve(values_BT: NDArray[np.floating[Any]]) -> Curve:
    """Mean over episodes at each step, NaN entries left out; NaN where there is none."""
    count = np.isfinite(values_BT).sum(axis=0)
    total = np.nan_to_num(values_BT).sum(axis=0)
    return tuple(float(t / c) if c else math.nan for t, c in zip(total, count, strict=True))


def _episode_mean(values_BT: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Mean over each episode's steps that have a value; NaN for an episode without any."""
    count = np.isfinite(values_BT).sum(axis=1)
    total = np.nan_to_num(values_BT.astype(np.float64)).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def measure_video(
    truth_BTHWC: Tensor, test_BTHWC: Tensor, background_HWC: Tensor, settings: FidelitySettings
) -> VideoQuality:
    """Measure one video source; both tensors hold steps 1 to ``steps``."""
    psnr_BT, foreground_BT, ssim_BT = [], [], []
    for truth, test in zip(truth_BTHWC, test_BTHWC, strict=True):  # episode by episode, to bound the memory
        psnr_BT.append(video.psnr(truth, test).numpy())
        foreground_BT.append(video.foreground_psnr(truth, test, background_HWC, settings.foreground_threshold).numpy())
        ssim_BT.append(video.ssim(truth, test).numpy())
    psnr, foreground, ssim = np.stack(psnr_BT), np.stack(foreground_BT), np.stack(ssim_BT)
    tail, seed = slice(-settings.last_steps, None), settings.seed
    return VideoQuality(
        psnr=_mean_interval(_episode_mean(psnr), seed),
        psnr_last=_mean_interval(_episode_mean(psnr[:, tail]), seed),
        foreground_psnr=_mean_interval(_episode_mean(foreground), seed),
        foreground_psnr_last=_mean_interval(_episode_mean(foreground[:, tail]), seed),
        ssim=_mean_interval(_episode_mean(ssim), seed),
        psnr_curve=_curve(psnr),
        foreground_psnr_curve=_curve(foreground),
    )


def compare_outcomes(
    true_B: NDArray[np.bool_], seen_B: NDArray[np.bool_], categories: Sequence[str], seed: int = 0
) -> Outcomes:
    """Agreement of verdicts with the truth, overall and by category."""

    def count(rows: NDArray[np.bool_]) -> OutcomeCounts:
        true, seen = true_B[rows], seen_B[rows]
        agree = int((true == seen).sum())
        return OutcomeCounts(
            episodes=len(true),
            agree=agree,
            agreement=wilson_interval(agree, len(true)),
            false_positives=int((seen & ~true).sum()),
            false_negatives=int((~seen & true).sum()),
            true_successes=int(true.sum()),
            seen_successes=int(seen.sum()),
        )

    names = np.array(categories)
    gap = seen_B.astype(np.float64) - true_B.astype(np.float64)
    return Outcomes(
        overall=count(np.ones(len(true_B), dtype=np.bool_)),
        by_category={name: count(names == name) for name in sorted(set(categories))},
        true_rate=float(true_B.mean()),
        seen_rate=float(seen_B.mean()),
        rate_gap=bootstrap_interval(gap, seed=seed),
    )


def random_actions(checkpoint: Checkpoint, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Independent uniform actions inside the domain's bounds: ``shape`` + (A,)."""
    domain = checkpoint.domain
    low, high = np.array(domain.action_low), np.array(domain.action_high)
    return np.random.default_rng(seed).uniform(low, high, (*shape, domain.action_dim)).astype(np.float32)


def measure_delta_psnr(
    checkpoint: Checkpoint, held_out: HeldOut, generated: Generated, settings: FidelitySettings
) -> Interval:
    """Delta-PSNR at step ``steps`` against ``random_sequences`` sequences of uniform random actions per episode."""
    repeat, steps = settings.random_sequences, settings.steps
    count = min(len(held_out), settings.control_episodes or len(held_out))
    actions = torch.from_numpy(random_actions(checkpoint, (count * repeat, steps), settings.seed))
    start = torch.arange(count).repeat_interleave(repeat)
    wandering = generate(
        checkpoint,
        torch.from_numpy(held_out.frames_BTHWC[:, 0])[start],
        torch.from_numpy(held_out.agent_pos_BTP[:, 0])[start],
        actions,
        rollout_seeds(len(held_out), settings.seed)[start],
        batch=settings.batch,
        last_only=True,
        progress="random actions" if settings.progress else None,
    )
    under_random = wandering.frames_BTHWC[:, 0].unflatten(0, (count, repeat))
    truth = torch.from_numpy(held_out.frames_BTHWC[:count, steps])
    delta = video.delta_psnr(truth, generated.frames_BTHWC[:count, steps - 1], under_random)
    return _mean_interval(delta.numpy(), settings.seed)


def rollout_seeds(count: int, seed: int) -> Tensor:
    """One seed per episode: (B,) int64, nothing shared between runs of different seeds."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 2**62, count))


def measure_fidelity(
    checkpoint: Checkpoint,
    held_out: HeldOut,
    settings: FidelitySettings,
    *,
    background_HWC: Tensor,
    judge: Judge | None,
) -> Measured:
    """Roll out, compare, count.

    Args:
        checkpoint: the model.
        held_out: the truth; needs at least ``steps + 1`` rows.
        settings: what to measure.
        background_HWC: the scene without moving things (:func:`hma_gym.metrics.video.background_image`).
        judge: reads the outcomes; None leaves them out.
    """
    steps = settings.steps
    if held_out.rows <= steps:
        raise InvalidArgument(
            f"measuring {steps} steps needs episodes of at least {steps + 1} rows, got {held_out.rows}; "
            "measure fewer steps."
        )
    frames_BTHWC = torch.from_numpy(held_out.frames_BTHWC)
    generated = generate(
        checkpoint,
        frames_BTHWC[:, 0],
        torch.from_numpy(held_out.agent_pos_BTP[:, 0]),
        torch.from_numpy(held_out.actions_BTA[:, :-1]),
        rollout_seeds(len(held_out), settings.seed),
        batch=settings.batch,
        progress="true actions" if settings.progress else None,
    )
    truth = frames_BTHWC[:, 1 : steps + 1]
    quality = [
        measure_video(truth, test, background_HWC, settings)
        for test in (
            generated.frames_BTHWC[:, :steps],
            reconstruct(checkpoint, truth),
            frames_BTHWC[:, :1].expand_as(truth),
        )
    ]
    agent_error_BT = np.linalg.norm(
        generated.agent_pos_BTP[..., :POSITION_DIMS].numpy() - held_out.agent_pos_BTP[:, 1:, :POSITION_DIMS], axis=-1
    )
    has_agent_pos = agent_error_BT.size > 0 and held_out.agent_pos_BTP.shape[-1] >= POSITION_DIMS
    has_targets = checkpoint.domain.target_dim >= 3
    targets_error_B = np.linalg.norm(
        generated.targets_BTX[:, steps - 1, :3].numpy() - held_out.object_BT3[:, steps], axis=-1
    )
    cube: _CubeErrors | None = None
    seen_B = probability_B = outcomes = outcomes_of_truth = None
    true_B = held_out.success_BT[:, -1]
    if judge is not None:
        real, made = _watched(held_out, generated)
        if isinstance(judge, Locator):
            cube = _cube_errors(judge, real, made, held_out, settings)
        probability_B, seen_B = _last_verdict(judge, made)
        outcomes = compare_outcomes(true_B, seen_B, held_out.categories, settings.seed)
        _, seen_in_truth_B = _last_verdict(judge, real)
        outcomes_of_truth = compare_outcomes(true_B, seen_in_truth_B, held_out.categories, settings.seed)
    report = FidelityReport(
        episodes=len(held_out),
        rows=held_out.rows,
        steps=steps,
        categories={name: held_out.categories.count(name) for name in sorted(set(held_out.categories))},
        generated=quality[0],
        ceiling=quality[1],
        floor=quality[2],
        delta_psnr=(
            measure_delta_psnr(checkpoint, held_out, generated, settings) if settings.random_sequences else None
        ),
        agent_pos_error_m=_mean_interval(agent_error_BT[:, steps - 1], settings.seed) if has_agent_pos else None,
        agent_pos_error_curve_m=_curve(agent_error_BT) if has_agent_pos else (),
        cube_error_judge_m=cube.generated if cube else None,
        cube_error_judge_floor_m=cube.real if cube else None,
        cube_error_judge_curve_m=cube.curve if cube else (),
        cube_error_targets_m=_mean_interval(targets_error_B, settings.seed) if has_targets else None,
        outcomes=outcomes,
        outcomes_of_truth=outcomes_of_truth,
        perplexity=measure_perplexity(checkpoint, held_out, settings),
        misses=tuple(np.flatnonzero(seen_B != true_B).tolist()) if seen_B is not None else (),
    )
    return Measured(report, generated, seen_B, probability_B)


@torch.inference_mode()
def measure_perplexity(checkpoint: Checkpoint, held_out: HeldOut, settings: FidelitySettings) -> Interval | None:
    """exp of the mean cross-entropy per token in nats: every token of the next frame, given all real frames before.

    All tokens of a frame are predicted at once, so this is an upper bound of what several unmasking steps reach. None
    for soft tokens, which have no probabilities, and for the "in_place" layout, whose past and present share columns.
    """
    dynamics, device = checkpoint.dynamics, device_of(checkpoint)
    if not isinstance(dynamics.head, MaskGITHead) or dynamics.config.conditioning != "shifted":
        return None
    generator = torch.Generator(device=device).manual_seed(settings.seed)
    entropies = []
    for index in range(len(held_out)):
        frames = torch.from_numpy(held_out.frames_BTHWC[index, : settings.steps + 1]).to(device)
        tokens = checkpoint.tokenizer.encode(frames)[None]
        actions = torch.from_numpy(held_out.actions_BTA[index, : settings.steps]).to(device)[None]
        agent_pos = torch.from_numpy(held_out.agent_pos_BTP[index, : settings.steps]).to(device)[None]
        domain_B = torch.tensor([dynamics.domain_index(checkpoint.domain.name)], device=device)
        masked = torch.ones(1, settings.steps, dynamics.head.positions, dtype=torch.bool, device=device)
        columns = dynamics.clip_features(
            tokens[:, 1:],
            tokens[:, :-1],
            masked,
            dynamics.normalise_actions(actions, domain_B),
            masked[..., 0],
            agent_pos,
            torch.zeros(1, settings.steps, 0, device=device),
            domain_B,
        )
        scene = Scene(tokens[:, :-1], columns.drawn)
        _, measures = dynamics.head.loss(columns.tokens_BTND, tokens[:, 1:], scene, masked, generator)
        entropies.append(float(measures["cross_entropy"]))
    return bootstrap_interval(np.array(entropies), lambda rows: float(np.exp(rows.mean())), seed=settings.seed)


@dataclass(frozen=True)
class _Watched:
    """What a judge is shown and told of whole episodes."""

    frames_BTHWC: Tensor
    agent_pos_BTP: Tensor


@dataclass(frozen=True)
class _CubeErrors:
    generated: Interval
    real: Interval
    curve: Curve


def _cube_errors(
    judge: Locator, real: _Watched, made: _Watched, held_out: HeldOut, settings: FidelitySettings
) -> _CubeErrors:
    """The judge's reading of the object's position against the truth, on generated and on real frames."""
    rows = torch.arange(1, settings.steps + 1)
    truth_BT3 = held_out.object_BT3[:, 1 : settings.steps + 1]
    seen_BT3 = episode_positions(judge, made.frames_BTHWC, rows, agent_pos_BTP=made.agent_pos_BTP).cpu().numpy()
    error_BT = np.linalg.norm(seen_BT3 - truth_BT3, axis=-1)
    last_B13 = episode_positions(judge, real.frames_BTHWC, rows[-1:], agent_pos_BTP=real.agent_pos_BTP).cpu().numpy()
    real_BT = np.linalg.norm(last_B13 - truth_BT3[:, -1:], axis=-1)
    return _CubeErrors(
        _mean_interval(error_BT[:, -1], settings.seed), _mean_interval(real_BT[:, 0], settings.seed), _curve(error_BT)
    )


def _watched(held_out: HeldOut, generated: Generated) -> tuple[_Watched, _Watched]:
    """The real episodes, and the generated ones, whose first row is real."""
    real = _Watched(torch.from_numpy(held_out.frames_BTHWC), torch.from_numpy(held_out.agent_pos_BTP))
    made = (
        torch.cat([real.frames_BTHWC[:, :1], generated.frames_BTHWC], dim=1),
        torch.cat([real.agent_pos_BTP[:, :1], generated.agent_pos_BTP], dim=1),
    )
    return real, _Watched(*made)


def _last_verdict(judge: Judge, watched: _Watched) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The judge's probability and verdict at the last row of each episode."""
    frames_BTHWC, agent_pos_BTP = watched.frames_BTHWC, watched.agent_pos_BTP
    last = torch.tensor([frames_BTHWC.shape[1] - 1])
    probability = episode_probabilities(judge, frames_BTHWC, last, agent_pos_BTP=agent_pos_BTP)[:, 0].cpu()
    return probability.double().numpy(), verdict(judge, probability).numpy()
