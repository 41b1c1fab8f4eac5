"""One episode driven by hand: the learned world, MuJoCo beside it if wanted, and what happened so far.

Nothing here knows of the web. Both worlds are driven by the same actions from the same start; each is called from one
thread only (OpenGL contexts belong to theirs), which is the caller's part.

Shape legend: T frames, H W image, A numbers of an action, P agent_pos dims, S numbers of a simulator state.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from hma_gym.data.episodes import EEF_POS, EEF_QUAT, GRIPPER, AttrValue, Episode
from hma_gym.data.robomimic_hdf5 import EpisodeWriter
from hma_gym.envs.ground_truth import GroundTruthEnv
from hma_gym.envs.single import HMAEnv
from hma_gym.envs.tasks import Task
from hma_gym.envs.world import LearnedWorld
from hma_gym.errors import EnvironmentState, InvalidImage
from hma_gym.judges.videos import enlarge, write_video

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_PIXELS = 40_000_000
MOST_STEPS = 2400
"""Of one episode: what is recorded stays in memory until it is saved or dropped (2 minutes at 20 steps a second)."""
_VIDEO_SIDE, _GAP = 256, 8


@dataclass(frozen=True)
class Look:
    """What one world shows now.

    Attributes:
        frame_HWC: uint8.
        agent_pos_P: float32; P = 0 where the world has none.
        success: the verdict.
        probability: of success; None without a judge.
    """

    frame_HWC: NDArray[np.uint8]
    agent_pos_P: NDArray[np.float32]
    success: bool
    probability: float | None


@dataclass
class Track:
    """What one world showed since the start of the episode.

    Attributes:
        looks: one more than actions.
        states: MuJoCo's flattened states (S,), one for each look; empty for the learned world.
    """

    looks: list[Look] = field(default_factory=list)
    states: list[NDArray[np.float64]] = field(default_factory=list)

    def episode(self, actions_TA: NDArray[np.float32], attrs: dict[str, AttrValue]) -> Episode:
        """Rows in the layout of recorded data: row t is what was seen before action t, so the last look has none."""
        rows = self.looks[:-1]
        agent_pos = np.stack([look.agent_pos_P for look in rows])
        seen = [look.success for look in rows]
        parts = {EEF_POS: slice(0, 3), EEF_QUAT: slice(3, 7), GRIPPER: slice(7, 9)}
        category = "held" if seen[-1] else "dropped" if any(seen) else "other"
        return Episode(
            images_THWC=np.stack([look.frame_HWC for look in rows]),
            agent_pos_TP=agent_pos,
            actions_TA=actions_TA,
            states_TS=np.stack(self.states[:-1]) if self.states else np.zeros((len(rows), 0)),
            rewards_T=np.array([look.success for look in self.looks[1:]], dtype=np.float32),
            dones_T=np.arange(len(rows)) == len(rows) - 1,
            obs={key: agent_pos[:, part] for key, part in parts.items()} if agent_pos.shape[1] == 9 else {},
            attrs={**attrs, "category": category, "success": seen[-1], "success_ever": any(seen)},
        )

    def frames(self) -> NDArray[np.uint8]:
        """(T, H, W, 3), the last one included."""
        return np.stack([look.frame_HWC for look in self.looks])


class LearnedDrive:
    """The learned world under a hand on the keys. All calls from one thread."""

    def __init__(self, world: LearnedWorld) -> None:
        self._env = HMAEnv(
            checkpoint=world, obs_type="pixels_agent_pos" if world.domain.state_dim else "pixels", render_mode=None
        )
        self.track = Track()

    def start(self, options: dict[str, Any], seed: int) -> Look:
        """Begin anew; ``options`` are those of the environment's ``reset``."""
        look = _look(*self._env.reset(seed=seed, options=options))
        self.track = Track([look])
        return look

    def step(self, action_A: NDArray[np.float32]) -> Look:
        """One action on; :class:`EnvironmentState` when the episode has :data:`MOST_STEPS` steps."""
        if len(self.track.looks) > MOST_STEPS:
            raise EnvironmentState(f"the episode has {MOST_STEPS} steps, which is the most; save it or restart.")
        observation, _, _, _, info = self._env.step(action_A)
        look = _look(observation, info)
        self.track.looks.append(look)
        return look

    def close(self) -> None:
        """Free the rollout's memory."""
        self._env.close()


class TrueDrive:
    """MuJoCo under the same actions. All calls, the constructor and :meth:`close` included, from one thread."""

    def __init__(self, task: Task, image_size: int) -> None:
        self._env = GroundTruthEnv(task.key, obs_type="pixels_agent_pos", image_size=image_size, render_mode=None)
        self.track = Track()

    @property
    def env_args(self) -> dict[str, Any]:
        """robomimic's description of the environment."""
        return self._env.simulation.env_args

    def start(self, state_S: NDArray[np.float64]) -> Look:
        """Begin at a flattened state: the situation that a start of the checkpoint's bank was taken from."""
        look = _look(*self._env.reset(options={"state": state_S}))
        self.track = Track([look], [self._env.simulation.flattened_state()])
        return look

    def step(self, action_A: NDArray[np.float32]) -> Look:
        """One action on."""
        observation, _, _, _, info = self._env.step(action_A)
        look = _look(observation, info)
        self.track.looks.append(look)
        self.track.states.append(self._env.simulation.flattened_state())
        return look

    def close(self) -> None:
        """Free the renderers."""
        self._env.close()


def _look(observation: Any, info: dict[str, Any]) -> Look:
    probability = info.get("success_probability")
    success = bool(info.get("is_success", False))
    if isinstance(observation, dict):
        return Look(observation["pixels"], np.asarray(observation["agent_pos"], np.float32), success, probability)
    return Look(observation, np.zeros(0, np.float32), success, probability)


def read_picture(content: bytes, image_size: tuple[int, int]) -> NDArray[np.uint8]:
    """An uploaded picture as a start: cut to the middle, scaled to (H, W, 3) uint8.

    Only PNG, JPEG and WebP are decoded, and nothing beyond 40 megapixels.

    Raises:
        InvalidImage: not such a picture, truncated, or too large.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise InvalidImage(
                    f"the picture must have at most {MOST_PIXELS // 1_000_000} megapixels, got {picture.width} x "
                    f"{picture.height}; make it smaller."
                )
            upright = ImageOps.exif_transpose(picture).convert("RGB")
            height, width = image_size
            fitted = ImageOps.fit(upright, (width, height), Image.Resampling.BOX)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, InvalidImage):
            raise
        raise InvalidImage(
            f"the picture cannot be read ({len(content)} bytes): {error}; send a whole PNG, JPEG or WebP file."
        ) from error
    return np.array(fitted)


def save_episode(
    folder: Path,
    name: str,
    learned: Track,
    truth: Track | None,
    actions_TA: NDArray[np.float32],
    *,
    attrs: dict[str, AttrValue],
    env_args: dict[str, Any],
    fps: float,
) -> list[Path]:
    """Write an episode as robomimic HDF5 and mp4; MuJoCo's side, if there, as an HDF5 of its own and beside in the mp4.

    Raises:
        EnvironmentState: nothing was driven yet.
        StorageError: the folder cannot be written.
    """
    if not len(actions_TA):
        raise EnvironmentState("there is nothing to save yet: drive some steps first.")
    files = [_write_hdf5(folder / f"{name}.hdf5", learned.episode(actions_TA, {**attrs, "world": "learned"}), env_args)]
    frames = enlarge(learned.frames(), _VIDEO_SIDE)
    if truth is not None:
        files.append(
            _write_hdf5(
                folder / f"{name}_truth.hdf5", truth.episode(actions_TA, {**attrs, "world": "mujoco"}), env_args
            )
        )
        other = enlarge(truth.frames(), _VIDEO_SIDE)
        gap = np.full((len(frames), frames.shape[1], _GAP, 3), 255, dtype=np.uint8)
        frames = np.concatenate([frames, gap, other], axis=2)
    return [*files, write_video(folder / f"{name}.mp4", frames, fps)]


def _write_hdf5(path: Path, episode: Episode, env_args: dict[str, Any]) -> Path:
    writer = EpisodeWriter(path, env_args=env_args, info={"collector": "hma-gym serve"})
    writer.append(episode)
    return writer.merge()


def plain_env_args(task: Task) -> dict[str, Any]:
    """robomimic's description of the task where MuJoCo is not running beside."""
    return {
        "env_name": task.robosuite_env,
        "type": 1,
        "env_kwargs": {"robots": task.robot, "control_freq": task.control_hz, "camera_names": [task.camera]},
    }


def same_start(world: LearnedWorld) -> bool:
    """Whether the checkpoint's starts know their MuJoCo states, so that both worlds can begin alike."""
    return world.bank.states_NS.shape[1] > 0
