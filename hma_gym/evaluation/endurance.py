"""Long rollouts: does the learned world stay plausible far beyond what it was trained on?

Hundreds of steps under three kinds of actions: random ones; a script's, which acts on what the model predicts and
begins another task whenever one is over; and recorded ones, looped, which after their first round fit nothing that is
there and drive the arm out of what was recorded. There is no truth to compare with, so what can be checked without one
is: the static background stays what it is, and there is one cube wherever the arm is away.

Shape legend: B rollouts, T steps, R recorded rows, H W C image, A action dims, N checked steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from hma_gym.data.episodes import agent_pos_from_obs
from hma_gym.dynamics.checkpoint import Checkpoint
from hma_gym.envs.simulation import Simulation, check_action
from hma_gym.envs.tasks import get_task
from hma_gym.errors import InvalidArgument
from hma_gym.evaluation.fidelity import random_actions, rollout_seeds
from hma_gym.evaluation.held_out import HeldOut
from hma_gym.evaluation.open_loop import Generated, generate, generate_closed_loop
from hma_gym.metrics.video import PEAK, PSNR_CAP, foreground_mask
from hma_gym.policies.scripted import LiftScript, ScriptedConfig
from hma_gym.policies.sighted import believed_state

REFERENCE_STEP = 20
"""Drift is measured from here: the first frames are nearer to the real start than any long rollout can be."""

#: PSNR of an error of one grey level.
ONE_LEVEL_DB = 20.0 * math.log10(PEAK)

#: So near to what is drawn over it, the background is not bare: edges are soft.
MARGIN = 2

Kind = Literal["random", "scripted", "recorded"]
KINDS: tuple[Kind, ...] = ("random", "scripted", "recorded")

SCRIPTED_MODES = ("expert", "near_miss", "drop", "push")


@dataclass(frozen=True)
class BlobSettings:
    """How the cube is found: connected pixels that are red.

    Attributes:
        redness: red must exceed green and blue by so much (of 255).
        min_pixels: smaller groups are noise.
        arm_clear_m: only frames whose end effector is at least so far (horizontally) from the cube count as "the arm
            is away"; nearer, the hand may hide it.
    """

    redness: int = 40
    min_pixels: int = 6
    arm_clear_m: float = 0.12
    stays_m: float = 0.005


@dataclass(frozen=True)
class LongRollouts:
    """Generated long videos and the actions that led there (float32, env units). ``names`` tells what kind these are of
    each: "random", "scripted" or "recorded NAME"."""

    names: tuple[str, ...]
    start_frames_BHWC: Tensor
    generated: Generated
    actions_BTA: Tensor

    def of_kind(self, kind: str) -> LongRollouts:
        """Those whose name begins so."""
        chosen = [n for n, name in enumerate(self.names) if name.startswith(kind)]
        generated = Generated(*(getattr(self.generated, f.name)[chosen] for f in dataclasses.fields(Generated)))
        names = tuple(self.names[n] for n in chosen)
        return LongRollouts(names, self.start_frames_BHWC[chosen], generated, self.actions_BTA[chosen])


@dataclass(frozen=True)
class EnduranceReport:
    """Plausibility of long rollouts.

    Attributes:
        rollouts, steps: how many, how long.
        static_pixels: how many pixels count as background.
        background_psnr_curve: dB at each step over the static pixels, mean over rollouts.
        background_drift_db: the last 20 steps' mean minus the value around step 20, mean over rollouts; below 0 is
            worse.
        worst_background_drift_db: of the worst rollout.
        bare_drift_db, worst_bare_drift_db: the same over those static pixels that nothing is drawn over, which an arm
            that goes elsewhere than in truth may be: :data:`MARGIN` pixels and more from any that is not background
            (:func:`hma_gym.metrics.video.foreground_mask`). An error of less than one of the 255 grey levels (root mean
            square) counts as one, for 8-bit video shows no less.
        clear_frames: checked frames in which the arm is away from the cube's place.
        cube_counts: number of those frames by number of red blobs (0, 1, 2 or more).
        hidden: how many of those without one show something else than background where the cube was last seen: the
            forearm, which need not be where the hand is, lies over it. The others, and those whose cube has moved
            since, vanished.
        cube_area_start, cube_area_end: red pixels, mean over rollouts, at the start and over the last 20 steps.
    """

    rollouts: int
    steps: int
    static_pixels: int
    background_psnr_curve: tuple[float, ...]
    background_drift_db: float
    worst_background_drift_db: float
    bare_drift_db: float
    worst_bare_drift_db: float
    clear_frames: int
    cube_counts: tuple[int, int, int]
    hidden: int
    cube_area_start: float
    cube_area_end: float


def loop_actions(actions_RA: NDArray[np.float32], steps: int) -> NDArray[np.float32]:
    """The recorded actions again and again, ``steps`` in all: (T, A)."""
    if not len(actions_RA):
        raise InvalidArgument("actions_RA must have at least one row, got 0.")
    repeats = -(-steps // len(actions_RA))
    return np.tile(actions_RA, (repeats, 1))[:steps]


class ScriptedActor:
    """The scripts of Lift on what the model itself predicts: agent_pos and the cube's place.

    Args:
        object_start_BX: where the cube is at the start (m).
        seed: of the scripts.
        cycle: steps until a script gives way to the next.

    Attributes:
        taken: the actions (B, A) of each step so far.
    """

    def __init__(self, object_start_BX: NDArray[np.float32], seed: int, cycle: int = 64) -> None:
        self.object_start_BX, self.seed, self.cycle = object_start_BX, seed, cycle
        self.scripts: list[LiftScript] = []
        self.taken: list[Tensor] = []

    def __call__(self, step: int, agent_pos_BP: Tensor, targets_BX: Tensor) -> Tensor:
        """See :data:`hma_gym.evaluation.open_loop.Actor`."""
        count = len(agent_pos_BP)
        if step % self.cycle == 0:
            self.scripts = [self._script(row, step // self.cycle) for row in range(count)]
        seen_BX = targets_BX.numpy() if step else self.object_start_BX
        actions = []
        for script, place, pose in zip(self.scripts, seen_BX, agent_pos_BP.numpy(), strict=True):
            turn = 4 * np.arctan2(place[4], place[3]) if len(place) > 4 else 0.0  # where the yaw is among the targets
            belief = np.concatenate([place[:3], [np.cos(turn), np.sin(turn)]]).astype(np.float64)
            actions.append(script.act(believed_state(belief, pose.astype(np.float64))))
        self.taken.append(torch.from_numpy(np.stack(actions)))
        return self.taken[-1]

    def _script(self, row: int, turn: int) -> LiftScript:
        rng = np.random.default_rng([self.seed, row, turn])
        mode = SCRIPTED_MODES[int(rng.integers(len(SCRIPTED_MODES)))]
        return LiftScript(ScriptedConfig(mode=mode, competence=float(rng.uniform(0.5, 1.0))), rng)


def shares(held_out: HeldOut, kinds: Sequence[Kind]) -> dict[Kind, NDArray[np.int64]]:
    """Which held-out starts are rolled out under each kind of actions: equal shares, in order, but for empty ones."""
    parts = np.array_split(np.arange(len(held_out)), len(kinds))
    return {kind: rows for kind, rows in zip(kinds, parts, strict=True) if len(rows)}


def given_actions(
    kind: Literal["random", "recorded"],
    checkpoint: Checkpoint,
    held_out: HeldOut,
    rows: NDArray[np.int64],
    steps: int,
    seed: int,
) -> NDArray[np.float32]:
    """Actions that do not depend on what is seen, for these starts: (R, T, A)."""
    if kind == "random":
        return random_actions(checkpoint, (len(rows), steps), seed)
    return np.stack([loop_actions(held_out.actions_BTA[row][:-1], steps) for row in rows])


def long_rollouts(
    checkpoint: Checkpoint,
    held_out: HeldOut,
    *,
    kinds: Sequence[Kind] = KINDS,
    steps: int = 500,
    batch: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> LongRollouts:
    """Roll each held-out start out: an equal share of them, in order, under each kind of actions."""
    parts, names, taken = [], [], []
    label = "long rollouts" if progress else None
    seeds = rollout_seeds(len(held_out), seed)
    for kind, rows in shares(held_out, kinds).items():
        start = torch.from_numpy(held_out.frames_BTHWC[rows, 0])
        agent_pos = torch.from_numpy(held_out.agent_pos_BTP[rows, 0])
        if kind == "scripted":
            actor = ScriptedActor(held_out.object_BT3[rows, 0], seed)
            made = generate_closed_loop(checkpoint, start, agent_pos, actor, steps, seeds[rows], progress=label)
            chosen = torch.stack(actor.taken, dim=1)
        else:
            chosen = torch.from_numpy(given_actions(kind, checkpoint, held_out, rows, steps, seed))
            made = generate(checkpoint, start, agent_pos, chosen, seeds[rows], batch=batch, progress=label)
        parts.append(made)
        taken.append(chosen)
        names += [f"recorded {held_out.names[row]}" if kind == "recorded" else kind for row in rows]
    generated = Generated(
        *(torch.cat([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(Generated))
    )
    start_BHWC = torch.from_numpy(held_out.frames_BTHWC[:, 0])
    return LongRollouts(tuple(names), start_BHWC, generated, torch.cat(taken))


def true_rollouts(
    task: str,
    states_BS: NDArray[np.float64],
    actions_BTA: NDArray[np.float32],
    image_size: int,
    *,
    progress: bool = True,
) -> Generated:
    """What ground truth shows under the same actions: also there a cube may be hidden, or be pushed off the table.

    Args:
        task: key of the task table.
        states_BS: flattened simulator state of each start.
        actions_BTA: env units.
        image_size: height and width of the frames, pixels.
        progress: show a progress bar.

    Raises:
        MissingExtra, RenderingUnavailable: the simulation cannot run here.
    """
    count, steps = actions_BTA.shape[:2]
    frames = np.zeros((count, steps, image_size, image_size, 3), np.uint8)
    poses: list[NDArray[np.float32]] = []
    places = np.zeros((count, steps, 3), np.float32)
    simulation = Simulation(get_task(task))
    with tqdm(total=count * steps, desc="ground truth", unit="frame", disable=not progress, leave=False) as bar:
        for b, state_S in enumerate(states_BS):
            simulation.reset_to(state_S)
            for t, action_A in enumerate(actions_BTA[b]):
                simulation.step(check_action(action_A, actions_BTA.shape[2]))
                frames[b, t] = simulation.render(image_size)
                observed = simulation.observe()
                poses.append(agent_pos_from_obs(observed))
                places[b, t] = observed["object"][:3]
                bar.update()
    simulation.close()
    agent_pos = np.stack(poses).reshape(count, steps, -1).astype(np.float32)
    return Generated(torch.from_numpy(frames), torch.from_numpy(agent_pos), torch.from_numpy(places))


def _drift(psnr_BT: NDArray[np.float32]) -> NDArray[np.float32]:
    """The last steps' mean minus that around the step from which drift is measured, dB: (B,)."""
    around_B = psnr_BT[:, REFERENCE_STEP - 5 : REFERENCE_STEP + 5].mean(axis=1)
    return np.asarray(psnr_BT[:, -REFERENCE_STEP:].mean(axis=1) - around_B)


def static_pixels(frames_NHWC: Tensor, background_HWC: Tensor, threshold: int = 24) -> Tensor:
    """Pixels in which no real frame differs from the background by more than ``threshold``: (H, W) bool."""
    return ~foreground_mask(frames_NHWC, background_HWC, threshold).any(dim=0)


def _capped_psnr(squared: Tensor) -> Tensor:
    """PSNR of mean squared errors of grey levels, at most the cap, dB."""
    return 10 * torch.log10(PEAK**2 / squared.clamp_min(PEAK**2 / 10 ** (PSNR_CAP / 10)))


def background_psnr(frames: Tensor, background_HWC: Tensor, static_HW: Tensor) -> Tensor:
    """PSNR over the static pixels only, dB: (...)."""
    squared = (frames[..., static_HW, :].float() - background_HWC[static_HW].float()).square().mean(dim=(-2, -1))
    return _capped_psnr(squared)


def _bare_psnr(frames_THWC: Tensor, background_HWC: Tensor, static_HW: Tensor) -> Tensor:
    """PSNR over the static pixels that nothing is drawn over, dB: (T,); the cap where there are none."""
    drawn_THW = foreground_mask(frames_THWC, background_HWC).float()
    near_THW = F.max_pool2d(drawn_THW[:, None], 2 * MARGIN + 1, stride=1, padding=MARGIN)[:, 0] > 0
    bare_THW = (static_HW & ~near_THW).float()
    squared_THW = (frames_THWC.float() - background_HWC.float()).square().mean(dim=-1)
    squared_T = (squared_THW * bare_THW).sum(dim=(1, 2)) / bare_THW.sum(dim=(1, 2)).clamp(min=1)
    return _capped_psnr(squared_T)


def red_mask(frame_HWC: NDArray[np.uint8], redness: int) -> NDArray[np.bool_]:
    """Pixels whose red exceeds green and blue by more than ``redness``."""
    wide = frame_HWC.astype(np.int16)
    return np.asarray(wide[..., 0] - np.maximum(wide[..., 1], wide[..., 2]) > redness)


def blobs_of(mask_HW: NDArray[np.bool_], min_pixels: int = 1) -> list[NDArray[np.int64]]:
    """The 8-connected groups of True pixels, (rows and columns, largest first), without those below ``min_pixels``."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask_HW)}
    groups = []
    while left:
        front = [left.pop()]
        group = [*front]
        while front:
            y, x = front.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            front.extend(near)
            group.extend(near)
        groups.append(np.array(group))
    return sorted((group for group in groups if len(group) >= min_pixels), key=len, reverse=True)


def arm_away(generated: Generated, object_start_B3: NDArray[np.float32], clear_m: float) -> NDArray[np.bool_]:
    """Steps at which the hand is at least ``clear_m`` (horizontally) from the cube: (B, T) bool.

    Where the cube is at each step is what the model itself predicts (its privileged targets). A model without them is
    only trusted until its hand first comes near the cube's place at the start.
    """
    hand_BT2 = generated.agent_pos_BTP[..., :2].numpy()
    if generated.targets_BTX.shape[-1] >= 3:
        return np.asarray(np.linalg.norm(hand_BT2 - generated.targets_BTX[..., :2].numpy(), axis=-1) >= clear_m)
    distance_BT = np.linalg.norm(hand_BT2 - object_start_B3[:, None, :2], axis=-1)
    return np.asarray(np.minimum.accumulate(distance_BT, axis=1) >= clear_m)


def measure_endurance(
    rollouts: LongRollouts,
    *,
    background_HWC: Tensor,
    static_HW: Tensor,
    object_start_B3: NDArray[np.float32],
    blobs: BlobSettings | None = None,
    check_every: int = 5,
) -> EnduranceReport:
    """Measure background drift and cube counts.

    Args:
        rollouts: what :func:`long_rollouts` made, of more than 40 steps.
        background_HWC: the scene without moving things.
        static_HW: pixels that never move (:func:`static_pixels`).
        object_start_B3: where the cube is at the start (m), see :func:`arm_away`.
        blobs: how the cube is found.
        check_every: steps between frames whose cubes are counted.
    """
    blobs = blobs or BlobSettings()
    frames_BTHWC = rollouts.generated.frames_BTHWC
    count, steps = frames_BTHWC.shape[:2]
    if steps <= 2 * REFERENCE_STEP:
        raise InvalidArgument(f"endurance needs more than {2 * REFERENCE_STEP} steps, got {steps}.")
    psnr_BT = torch.stack([background_psnr(frames, background_HWC, static_HW) for frames in frames_BTHWC]).numpy()
    bare_BT = np.stack([_bare_psnr(frames, background_HWC, static_HW).numpy() for frames in frames_BTHWC])
    drift_B, bare_B = _drift(psnr_BT), _drift(np.minimum(bare_BT, ONE_LEVEL_DB))
    clear_BT = arm_away(rollouts.generated, object_start_B3, blobs.arm_clear_m)
    counts, hidden = [0, 0, 0], 0
    end_areas = []
    for b in range(count):
        last: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None  # the cube's pixels, and its place (m)
        places_TX = rollouts.generated.targets_BTX[b, :, :3].numpy()
        for t in range(check_every - 1, steps, check_every):
            frame_HWC = frames_BTHWC[b, t]
            found = blobs_of(red_mask(frame_HWC.numpy(), blobs.redness), blobs.min_pixels)
            if found:
                last = found[0], places_TX[t]
            if clear_BT[b, t]:
                counts[min(len(found), 2)] += 1
                if not found and last is not None and np.linalg.norm(places_TX[t] - last[1]) < blobs.stays_m:
                    drawn_HW = foreground_mask(frame_HWC, background_HWC).numpy()
                    hidden += bool(drawn_HW[last[0][:, 0], last[0][:, 1]].mean() > 0.5)
            if t >= steps - REFERENCE_STEP:
                end_areas.append(sum(map(len, found)))
    start_areas = [int(red_mask(frame.numpy(), blobs.redness).sum()) for frame in rollouts.start_frames_BHWC]
    return EnduranceReport(
        rollouts=count,
        steps=steps,
        static_pixels=int(static_HW.sum()),
        background_psnr_curve=tuple(float(value) for value in psnr_BT.mean(axis=0)),
        background_drift_db=float(drift_B.mean()),
        worst_background_drift_db=float(drift_B.min()),
        bare_drift_db=float(bare_B.mean()),
        worst_bare_drift_db=float(bare_B.min()),
        clear_frames=sum(counts),
        cube_counts=(counts[0], counts[1], counts[2]),
        hidden=hidden,
        cube_area_start=float(np.mean(start_areas)),
        cube_area_end=float(np.mean(end_areas)),
    )
