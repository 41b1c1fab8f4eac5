"""The first stage of training a dynamics model: each domain's body, from its token cache (see hma_gym.dynamics.body).

It is part of ``hma-gym train dynamics`` and runs before the trunk is trained. ``look`` and ``sight`` are trained on
single frames all the time, ``coast`` on very short windows from everywhere first, many at a time, which is where it
learns how things move; then on its own rollouts, longer and longer, where it learns not to drift. Long rollouts alone
cost as much time for a tenth as many transitions, and learn the training episodes by heart.

Lift, 3200 episodes, one CPU core: 6000 steps in 12 minutes; the scores to expect are in docs/experiments.md.

Shape legend: B windows, T transitions of a window, M single frames, P agent_pos dims, X dims of the object's pose, A
action dims x stride, S tokens of a frame, C channels.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hma_gym.data.cache import TokenCache
from hma_gym.dynamics.body import Body
from hma_gym.dynamics.model import Dynamics
from hma_gym.dynamics.pose import Pose, first_pose
from hma_gym.errors import DatasetError
from hma_gym.training import Every, OptimizerConfig, TrainConfig, TrainResult, train

#: Windows of the last stage of the curriculum are at most so long; in the data they may be shorter.
LONGEST = 60

#: Transitions of a window in the first stage, how many times as many windows it has, and its share of the steps.
SHORT, MANY, SHORT_SHARE = 3, 8, 0.6

#: Share of the single frames that are the first of an episode that goes on: a rollout begins with what is read off such
#: a one.
AT_START = 0.15

#: Quantile of the object's height in the training data at which it lies.
LYING = 0.1

#: Share of the short windows that begin with the hand at the object, nearer than so many metres, where there is one:
#: what is hard to foretell happens there.
AT_OBJECT, NEARNESS = 0.5, 0.06

#: Share of the longer windows that begin where their episode does, at rest, as every rollout does.
AT_REST = 0.8


class BodyBatches:
    """Windows for ``coast``, many short ones and then longer and longer ones, and single frames for ``look``.

    Args:
        motions: of the domain; windows are taken from it.
        cache: of the domain; frames with their tokens are taken from it.
        body: whose domain's statistics and stride are used.
        windows, frames: B (of the second stage) and M.
        steps: length of the training, which sets the pace of the curriculum.
        seed: of the draw.
        split: which episodes.

    Raises:
        DatasetError: no episode is longer than a stride.
    """

    def __init__(
        self,
        motions: TokenCache,
        cache: TokenCache,
        body: Body,
        windows: int,
        frames: int,
        steps: int,
        seed: int,
        split: str = "train",
    ) -> None:
        self.motions, self.cache, self.body = motions, cache, body
        self.windows, self.frames, self.steps, self.seed = windows, frames, steps, seed
        stride = body.domain.stride
        episodes = motions.episodes(split)
        rows = [motions.rows(int(n)) for n in episodes]
        self.room = np.array([(r.stop - r.start - 1) // stride for r in rows], dtype=np.int64)
        self.starts = np.array([r.start for r in rows], dtype=np.int64)
        if not len(rows) or self.room.max() < 1:
            raise DatasetError(
                f"no {split} episode of domain {body.domain.name!r} is longer than its stride of {stride} steps; "
                "record longer episodes."
            )
        self.frames_F = cache.frames(split)
        self.first_frames = cache.starts_N1[cache.moving(split)]
        self.busy_K2 = self._busy(episodes) if body.target_dim else np.zeros((0, 2), np.int64)
        self.longest = int(min(LONGEST, np.quantile(self.room[self.room > 0], 0.2)))

    def _busy(self, episodes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where short windows may begin with the hand at the object: (position among the episodes, offset)."""
        found = []
        for position, n in enumerate(episodes):
            rows = self.motions.rows(int(n))
            hand, thing = self.motions.agent_pos_FP[rows, :3], self.motions.targets_FX[rows, :3]
            near = np.linalg.norm(hand - thing, axis=-1)[:: self.body.domain.stride] < NEARNESS
            warm = self.body.config.history
            offsets = np.flatnonzero(near[warm : max(len(near) - SHORT, warm)])
            found.append(np.stack((np.full(len(offsets), position), offsets), axis=1))
        return np.concatenate(found)

    def transitions(self, step: int) -> int:
        """T at a step: short ones (and what went before them) first, then from 4 to the longest, which the last third
        of the stage has."""
        share = step / max(self.steps, 1)
        if share < SHORT_SHARE:
            return min(self.body.config.history + SHORT, self.longest)
        grown = min(1.0, 1.5 * (share - SHORT_SHARE) / (1.0 - SHORT_SHARE))
        return min(self.longest, 4 + int(grown * (self.longest - 4)) if self.longest > 4 else self.longest)

    def batch(self, step: int) -> dict[str, Tensor]:
        """See :meth:`hma_gym.dynamics.body.Body.loss`."""
        rng = np.random.default_rng((self.seed, step))
        T, stride, domain = self.transitions(step), self.body.domain.stride, self.body.domain
        short = step < SHORT_SHARE * self.steps
        windows, at_rest = (MANY * self.windows, 0.0) if short else (self.windows, AT_REST)
        places = np.maximum(self.room - T + 1, 0)  # where a window may begin
        chosen = rng.choice(len(places), size=windows, p=places / places.sum())
        offset = rng.integers(self.room[chosen] - T + 1) * (rng.random(windows) >= at_rest)
        if short and len(self.busy_K2) and T == self.body.config.history + SHORT:
            busy = self.busy_K2[rng.integers(len(self.busy_K2), size=windows)]
            here = rng.random(windows) < AT_OBJECT
            chosen, offset = np.where(here, busy[:, 0], chosen), np.where(here, busy[:, 1], offset)
        first_B = self.starts[chosen] + offset * stride
        states = first_B[:, None] + stride * np.arange(T + 1)
        moves = first_B[:, None, None] + stride * np.arange(T)[:, None] + np.arange(stride)
        actions_BTA = self.motions.actions_FA[moves].reshape(windows, T, -1)
        mean, std = (
            np.tile(np.asarray(value, np.float32), stride) for value in (domain.action_mean, domain.action_std)
        )
        batch = {
            "agent_pos": torch.from_numpy(self.motions.agent_pos_FP[states]),
            "targets": torch.from_numpy(self.motions.targets_FX[states][..., : self.body.target_dim]),
            "actions": torch.from_numpy((actions_BTA - mean) / std),
            "at_rest": torch.from_numpy(offset == 0),
            "warm": torch.tensor(max(T - SHORT, 0) if short else 0),
        }
        if self.body.look is not None:
            frames = rng.choice(self.frames_F, size=self.frames)
            first = int(AT_START * self.frames)
            frames[:first] = rng.choice(self.first_frames, size=first)
            batch["poses"] = torch.from_numpy(self.cache.agent_pos_FP[frames])
            batch["places"] = torch.from_numpy(self.cache.targets_FX[frames][..., : self.body.target_dim])
            batch["tokens"] = torch.from_numpy(self.cache.tokens[frames].astype(np.float32))
        return batch


@dataclasses.dataclass(frozen=True)
class BodyValidation:
    """How far ``coast`` strays on held-out windows that begin at rest, and what ``look`` leaves unexplained.

    ``valid_coast`` is the mean absolute error at the last of the steps, in units of one step's standard change (mean
    over dims); ``valid_hand`` and ``valid_object`` the distance of the first three dims of agent_pos and of the
    object's pose, own units; ``valid_look`` the mean square error of the drawn tokens over their variance;
    ``valid_sight`` the distance of the object's place read off single frames without a belief.
    """

    batches: BodyBatches

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(model, Body)
        device = next(model.parameters()).device
        batch = {name: value.to(device) for name, value in self.batches.batch(self.batches.steps).items()}
        rows = batch["at_rest"].nonzero()[:, 0]
        agent_pos, targets, actions = batch["agent_pos"][rows], batch["targets"][rows], batch["actions"][rows]
        pose = coasted_to_the_end(model, agent_pos[:, 0], targets[:, 0], actions)
        error = pose.agent_pos - agent_pos[:, -1]
        scores = {"valid_coast": float((error / model.get_buffer("delta_std")).abs().mean())}
        if model.domain.state_dim >= 3:
            scores["valid_hand"] = float(error[:, :3].norm(dim=-1).mean())
        if model.target_dim:
            scores["valid_object"] = float((pose.targets - targets[:, -1])[:, :3].norm(dim=-1).mean())
            seen = model.sighted(batch["tokens"], batch["poses"], None)
            scores["valid_sight"] = float((seen - batch["places"])[:, :3].norm(dim=-1).mean())
        drawn = model.drawn(batch["poses"], batch["places"]) if "poses" in batch else None
        if drawn is not None:
            wrong = (drawn - batch["tokens"]).square().mean()
            scores["valid_look"] = float(wrong / model.get_buffer("token_std").square().mean())
        return scores


def coasted_to_the_end(body: Body, agent_pos_BP: Tensor, targets_BX: Tensor, actions_BTA: Tensor) -> Pose:
    """Where a body that starts at rest believes everything to be after T normalised actions."""
    given_B = torch.ones(len(agent_pos_BP), dtype=torch.bool, device=agent_pos_BP.device)
    pose = first_pose(agent_pos_BP, targets_BX, body.config.history, actions_BTA.shape[-1], given_B)
    for t in range(actions_BTA.shape[1]):
        pose = pose.after(*body.coasted(pose, actions_BTA[:, t], given_B), actions_BTA[:, t], given_B)
    return pose


def train_bodies(
    model: Dynamics,
    caches: list[TokenCache],
    out: Path,
    steps: int,
    *,
    motions: list[TokenCache] | None = None,
    windows: int = 64,
    frames: int = 640,
    max_minutes: float | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> list[TrainResult]:
    """Train the body of each domain that has a state, in place, in ``<out>/body/<domain>``; resumes where it stopped.

    Args:
        model: its domains are those of the caches.
        caches: frames and tokens of each domain.
        out: folder of the run.
        steps: length.
        motions: of each domain, with or without tokens, for ``coast``; by default the caches.
        windows, frames: see :class:`BodyBatches`.
        max_minutes: stop, saved, before so many minutes are over.
        device, seed: of the training.

    Returns:
        How each ended; the last one is unfinished where the session was interrupted.
    """
    results: list[TrainResult] = []
    for index, (cache, moved) in enumerate(zip(caches, motions or caches, strict=True)):
        body = model.adapter(index).body
        if body.coast is None:
            continue
        if body.look is not None:
            sample = torch.from_numpy(cache.tokens[:: max(len(cache.tokens) // 20_000, 1)].astype(np.float32))
            body.set_token_statistics(sample.mean(dim=0), sample.std(dim=0).clamp(min=0.02))
        seen_F = moved.frames("train")
        seen_FP = moved.agent_pos_FP[seen_F]
        body.set_pose_bounds(torch.from_numpy(seen_FP.min(axis=0)), torch.from_numpy(seen_FP.max(axis=0)))
        if body.target_dim:
            body.set_floor(float(np.quantile(moved.targets_FX[seen_F, 2], LYING)))
        config = TrainConfig(
            out=out / "body" / body.domain.name,
            steps=steps,
            max_minutes=max_minutes,
            optimizer=OptimizerConfig(lr=2e-3, weight_decay=1e-3, betas=(0.9, 0.98)),
            warmup_steps=min(200, max(steps // 5, 1)),
            decay="linear",
            ema_decay=0.995,
            precision="bf16",
            device=device,
            seed=seed,
            evaluation=Every(minutes=2.0),
            recipe={"body": dataclasses.asdict(body.config), "windows": windows, "frames": frames},
        )
        batches = BodyBatches(moved, cache, body, windows, frames, steps, seed)
        split = "valid" if len(cache.moving("valid")) and len(moved.moving("valid")) else "train"
        held_out = BodyBatches(moved, cache, body, 4 * windows, 4 * frames, steps, seed + 1, split)
        result = train(body, batches, config, evaluate=BodyValidation(held_out))
        body.load_state_dict({**body.state_dict(), **result.ema.state_dict(body)})
        results.append(result)
        if not result.finished:
            break
    return results
