"""N learned environments in one: a batched network call per step, Gymnasium's vector API to the letter.

>>> import gymnasium, hma_gym
>>> envs = gymnasium.make_vec("HMA-Lift-v0", num_envs=8)
>>> observations, infos = envs.reset(seed=0)
>>> observations, rewards, terminations, truncations, infos = envs.step(envs.action_space.sample())

Beyond that API: whole action chunks (:meth:`HMAVectorEnv.step_chunk`), saving and restoring
(:meth:`~HMAVectorEnv.save_state`, :meth:`~HMAVectorEnv.load_state`), copies for planning
(:meth:`~HMAVectorEnv.fork`), tensors on the device.

Shape legend: N environments, H steps of a chunk, A numbers of an action, H W also of an image, P agent_pos dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hma_gym.dynamics.checkpoint import Checkpoint
from hma_gym.dynamics.rollout import RolloutState
from hma_gym.envs.actions import read_actions
from hma_gym.envs.autoreset import Episodes, read_mode
from hma_gym.envs.outputs import Mask, Observations, make_output, on_device
from hma_gym.envs.spaces import ObsType, agent_pos_space, observation_space
from hma_gym.envs.starts import StartOptions, read_options
from hma_gym.envs.world import LearnedWorld, Rows, load_world
from hma_gym.errors import EnvironmentState, InvalidArgument
from hma_gym.judges.protocol import Judge, TokenJudge

Decode = Literal["last", "all", "none"]
_STATE_VERSION = 4
_SEED_LIMIT = 2**62


@dataclass(frozen=True)
class Chunk:
    """What :meth:`HMAVectorEnv.step_chunk` returns.

    Attributes:
        observations, terminations, truncations, infos: as ``step`` returns them, after the chunk; with
            ``decode="none"`` observations is None, and infos has something from judges of tokens only.
        rewards: (N,) sum over the frames that were judged (see ``decode``).
        steps: (N,) int64, how many of the chunk's steps each environment ran.
        path: with ``decode="all"`` the observations after each step, (N, H, ...), before any reset; else None.
    """

    observations: Any
    rewards: Any
    terminations: Any
    truncations: Any
    infos: dict[str, Any]
    steps: Any
    path: Any


class HMAVectorEnv(VectorEnv[Any, Any, Any]):
    """N environments in a learned world.

    Observations are uint8 images (N, H, W, 3), or a dict with these under ``pixels`` and with ``agent_pos`` (N, P)
    float32, which the model predicts. The first observation of an episode is a real frame. Rewards are 1.0 where the
    judge sees success in the current frame, else 0.0. Infos of reset and step have ``is_success`` (bool) and
    ``success_probability`` (float); a checkpoint without a judge gives neither, and no reward. A calibrated one also
    gives ``uncertainty``: the probability that the frame's error is large (see :mod:`hma_gym.dynamics.uncertainty`).

    Environment i of ``reset(seed=s)`` is seeded s + i and equals the single environment with that seed (to float
    rounding: batches of different size round differently); what its neighbours do does not change it in any bit.

    Args:
        num_envs: N.
        task: key of the task table; its checkpoint is the default one.
        checkpoint: a shipped name, folder, hub id, loaded :class:`Checkpoint`, or a :class:`LearnedWorld` to share.
        obs_type: ``pixels`` or ``pixels_agent_pos``.
        image_size: only to state what is expected: another size than the checkpoint's is refused.
        max_episode_steps: truncate episodes at this length (``make_vec`` passes the registered horizon).
        judge: a judge, or the name of a registered one; ``classifier`` (None means the same) and ``feature``, which
            reads tokens and needs no pixels, are the checkpoint's own.
        output: ``numpy``, or ``torch`` for tensors on the device (nothing but the action check and, with
            ``terminate_on_success``, the verdicts is then copied to the host).
        autoreset_mode: Gymnasium's ``AutoresetMode`` or its value.
        terminate_on_success: end an episode as soon as the judge sees success.
        temperature, decode_steps: sampling, in place of the checkpoint's own settings.
        domain: name of the domain, for checkpoints with several.
        device: where to load the weights; given ones stay where they are.
        render_mode: ``rgb_array`` or None.
        render_size: side of rendered images in pixels.
        max_uncertainty: truncate episodes at the first frame whose ``info["uncertainty"]`` is above it, in (0, 1);
            needs a calibrated checkpoint (``hma-gym calibrate``).

    Raises:
        InvalidArgument: an argument breaks its rule.
        UnknownName: no such task, domain or judge.
        CheckpointError: the checkpoint is missing, damaged, newer, or does not fit.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(
        self,
        num_envs: int = 1,
        task: str | None = None,
        checkpoint: str | Path | Checkpoint | LearnedWorld | None = None,
        obs_type: ObsType = "pixels",
        image_size: int | None = None,
        max_episode_steps: int | None = None,
        judge: Judge | TokenJudge | str | None = None,
        output: Literal["numpy", "torch"] = "numpy",
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        terminate_on_success: bool = False,
        temperature: float | None = None,
        decode_steps: int | None = None,
        domain: str | None = None,
        device: str | torch.device | None = None,
        render_mode: str | None = "rgb_array",
        render_size: int = 256,
        max_uncertainty: float | None = None,
    ) -> None:
        super().__init__()
        if num_envs < 1:
            raise InvalidArgument(f"num_envs must be at least 1, got {num_envs}.")
        if render_mode not in (None, "rgb_array"):
            raise InvalidArgument(f"render_mode must be 'rgb_array' or None, got {render_mode!r}.")
        if render_size < 1:
            raise InvalidArgument(f"render_size must be at least 1 pixel, got {render_size}.")
        self.world = world = load_world(task, checkpoint, domain, judge, temperature, decode_steps, device)
        if image_size is not None and world.image_size != (image_size, image_size):
            raise InvalidArgument(
                f"image_size must be that of checkpoint {world.checkpoint.name!r}, {world.image_size}, got "
                f"{image_size}; leave it out and resize the observations (gymnasium.wrappers.ResizeObservation)."
            )
        if terminate_on_success and world.judge is None:
            raise InvalidArgument(
                f"terminate_on_success needs a judge, and checkpoint {world.checkpoint.name!r} has none; pass judge=."
            )
        if obs_type == "pixels_agent_pos" and not world.domain.state_dim:
            raise InvalidArgument(
                f"obs_type 'pixels_agent_pos' needs a domain with agent_pos, and {world.domain.name!r} has none; use "
                "'pixels'."
            )
        if max_uncertainty is not None and not 0 < max_uncertainty < 1:
            raise InvalidArgument(f"max_uncertainty must lie in (0, 1) or be None, got {max_uncertainty}.")
        if max_uncertainty is not None and world.uncertainty is None:
            raise InvalidArgument(
                f"max_uncertainty needs a calibrated checkpoint, and {world.checkpoint.name!r} is not; run: hma-gym "
                "calibrate --checkpoint FOLDER --data FILE."
            )
        self.max_uncertainty = max_uncertainty
        self.num_envs = num_envs
        self.obs_type = obs_type
        self.terminate_on_success = terminate_on_success
        self.render_mode = render_mode
        self.render_size = render_size
        self.single_action_box = _action_space(world)
        self.single_action_space = self.single_action_box
        self.single_observation_space = observation_space(obs_type, world.image_size, _agent_pos_space(world))
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._episodes = Episodes(read_mode(autoreset_mode), num_envs, max_episode_steps)
        fps = world.domain.control_hz / world.domain.stride
        self.metadata = {**self.metadata, "render_fps": fps, "autoreset_mode": self._episodes.mode}
        self.output = output
        self._output = make_output(output, world.device)
        self._generators: list[np.random.Generator | None] = [None] * num_envs
        self._generator_seeds = [-1] * num_envs
        self._rows: Rows | None = None
        bounds = _agent_pos_space(world)
        self._agent_pos_low = torch.from_numpy(bounds.low).to(world.device)
        self._agent_pos_high = torch.from_numpy(bounds.high).to(world.device)

    # ------------------------------------------------------------------ Gymnasium's API

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The environments' generators, as ``SyncVectorEnv`` gives them."""
        return tuple(self._generator(i) for i in range(self.num_envs))

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seeds of these, -1 where unknown."""
        return tuple(self._generator_seeds)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin episodes.

        Args:
            seed: s for s, s + 1, ..., or one per environment; None continues their generators.
            options: ``reset_mask`` (N,) bool resets these only; ``start``: index into the checkpoint's bank, or (N,)
                of them; ``image``: your own frame (H, W, 3) uint8, or (N, H, W, 3), with ``agent_pos`` (P,), (N, P)
                or "nearest"; ``images`` (T, H, W, 3) with ``actions`` (T - 1, A) and ``agent_pos`` (T, P): context
                of several frames, each also with a leading N.

        Returns:
            Observations of all environments, and infos of those that were reset.

        Raises:
            InvalidArgument, InvalidImage: see :func:`hma_gym.envs.starts.read_options`.
            EnvironmentState: after close, or a mask before the first reset.
        """
        self._require_open()
        chosen = read_options(options, self.num_envs, self.world)
        if self._rows is None and not chosen.mask_N.all():
            raise EnvironmentState("options['reset_mask']: the first reset must be of all environments; leave it out.")
        self._seed(seed, chosen.mask_N)
        self._restart(chosen)
        self._episodes.restart(chosen.mask_N)
        values, _ = self._look(True)
        return self._output.observations(self._observed()), self._output.infos(values, chosen.mask_N)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One step of all environments.

        Args:
            actions: (N, A) floating, finite; values outside the action space are clipped to it. An array, or a tensor
                on any device.

        Returns:
            Observations, rewards (N,), terminations (N,), truncations (N,), infos.

        Raises:
            InvalidAction: wrong shape or dtype, or a value that is not finite.
            EnvironmentState: before reset, after close, or after an episode's end with autoreset disabled.
        """
        self._require_ready()
        chunk = self._advance(
            read_actions(actions, (self.num_envs,), self.single_action_box, self.world.device)[:, None], "last"
        )
        return chunk.observations, chunk.rewards, chunk.terminations, chunk.truncations, chunk.infos

    def render(self) -> tuple[NDArray[np.uint8], ...] | None:
        """The current frames, enlarged to (render_size, render_size, 3) uint8; None without a render mode."""
        if self.render_mode is None:
            return None
        frames_N3HW = self._seen().frame_NHWC.permute(0, 3, 1, 2).float()
        size = (self.render_size, self.render_size)
        large = F.interpolate(frames_N3HW, size, mode="bicubic", antialias=True).round().clamp(0, 255)
        return tuple(np.array(large.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()))

    def close_extras(self) -> None:
        """Free the rollouts' memory."""
        self._rows = None

    # ------------------------------------------------------------------ beyond it

    def step_chunk(self, actions: Any, decode: Decode = "last") -> Chunk:
        """Up to H steps of all environments with one call.

        An environment whose episode ends inside the chunk stands still at its end until the chunk is over; only then
        does autoreset act, as after a step. An environment that resets in place of a step (NEXT_STEP) does so in place
        of the whole chunk. The frames are the same as of H calls of :meth:`step`.

        Args:
            actions: (N, H, A), as for :meth:`step`.
            decode: which frames are decoded and judged. ``last``: each environment's last one (and what the judge's
                window needs before it); its reward is that frame's. ``all``: every frame; the reward is their sum.
                ``none``: no frame, for planning; :meth:`observe` decodes afterwards. The last frame is then judged,
                and rewarded, only by a judge that reads tokens. With ``terminate_on_success`` every frame is judged
                whatever is chosen.

        Raises:
            InvalidArgument: another ``decode``.
            InvalidAction, EnvironmentState: as for :meth:`step`.
        """
        self._require_ready()
        if decode not in ("last", "all", "none"):
            raise InvalidArgument(f"decode must be one of ['last', 'all', 'none'], got {decode!r}.")
        return self._advance(
            read_actions(actions, (self.num_envs, None), self.single_action_box, self.world.device), decode
        )

    def observe(self) -> Any:
        """The current observations again."""
        self._seen()
        return self._output.observations(self._observed())

    def save_state(self) -> dict[str, Any]:
        """Everything that the future depends on, as a picklable dict of tensors (on the device) and plain values."""
        rows = self._require_ready()
        with torch.inference_mode():
            copy = rows.select(np.arange(self.num_envs))
        rollout = {f"rollout.{name}": getattr(copy.rollout, name) for name in RolloutState.__dataclass_fields__}
        return {
            "version": _STATE_VERSION,
            "world": self._fingerprint(),
            "tensors": {
                **rollout,
                "tokens": copy.tokens_NK,
                "frames": copy.frames_NFHWC,
                "agent_pos": copy.agent_pos_NFP,
                "codes": copy.codes_NFD,
                "uncertainty": copy.uncertainty_N,
            },
            "hidden": copy.hidden_NF,
            "steps": copy.step_N,
            "elapsed": self._episodes.elapsed_N.copy(),
            "over": self._episodes.over_N.copy(),
            "generators": [deepcopy(self._generator(i).bit_generator.state) for i in range(self.num_envs)],
            "generator_seeds": list(self._generator_seeds),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Return to a saved state of this or an equal vector environment: the same frames will follow.

        Raises:
            EnvironmentState: the state is of another version, checkpoint, domain, judge or number of
                environments, or the environment is closed.
        """
        self._require_open()
        found = (state.get("version"), state.get("world"))
        if found != (_STATE_VERSION, self._fingerprint()):
            raise EnvironmentState(
                f"state must be one that save_state() of an equal environment returned (version {_STATE_VERSION}, "
                f"{self._fingerprint()}), got version {found[0]}, {found[1]}."
            )
        device = self.world.device
        tensors = {name: tensor.to(device) for name, tensor in state["tensors"].items()}
        rollout = RolloutState(**{n: tensors[f"rollout.{n}"] for n in RolloutState.__dataclass_fields__})
        rows = Rows(
            rollout,
            tensors["tokens"],
            tensors["frames"],
            tensors["agent_pos"],
            tensors["codes"],
            tensors["uncertainty"],
            state["hidden"],
            state["steps"],
        )
        with torch.inference_mode():
            self._rows = rows.select(np.arange(self.num_envs))
        self._episodes.elapsed_N = state["elapsed"].copy()
        self._episodes.over_N = state["over"].copy()
        for i, generator_state in enumerate(state["generators"]):
            self._generator(i).bit_generator.state = deepcopy(generator_state)
        self._generator_seeds = list(state["generator_seeds"])

    def fork(self, k: int, seed: int | None = None) -> HMAVectorEnv:
        """A new vector environment with k copies of each environment next to each other; the weights are shared.

        Nothing that is done to it changes this one.

        Args:
            k: copies; environment i becomes i k .. i k + k - 1.
            seed: None leaves the copies the random numbers of their original: equal actions give equal frames, also
                to those of the original. A seed gives each copy random numbers of its own.
        """
        rows = self._require_ready()
        if k < 1:
            raise InvalidArgument(f"k must be at least 1, got {k}.")
        index = np.repeat(np.arange(self.num_envs), k)
        twin = HMAVectorEnv(
            num_envs=len(index),
            checkpoint=self.world,
            obs_type=self.obs_type,
            max_episode_steps=self._episodes.max_episode_steps,
            output=self.output,
            autoreset_mode=self._episodes.mode,
            terminate_on_success=self.terminate_on_success,
            render_mode=self.render_mode,
            render_size=self.render_size,
            max_uncertainty=self.max_uncertainty,
        )
        with torch.inference_mode():
            twin._rows = rows.select(index)
            twin._episodes.elapsed_N = self._episodes.elapsed_N[index]
            twin._episodes.over_N = self._episodes.over_N[index]
            if seed is None:
                twin._generators = [deepcopy(self._generator(i)) for i in index]
                twin._generator_seeds = [self._generator_seeds[i] for i in index]
            else:
                twin._seed(seed, np.ones(len(index), dtype=bool))
                twin._rows = twin._rows.reseed(np.array([_draw_seed(g) for g in twin.np_random]))
        return twin

    def set_generator(self, i: int, generator: np.random.Generator) -> None:
        """Let environment i draw its starts and seeds from this generator (shared, not copied)."""
        self._generators[i], self._generator_seeds[i] = generator, -1

    # ------------------------------------------------------------------ parts of them

    def _advance(self, actions_NHA: Tensor, decode: Decode) -> Chunk:
        """H steps; see :meth:`step_chunk`."""
        episodes, world, output = self._episodes, self.world, self._output
        everyone_N = np.ones(self.num_envs, dtype=bool)
        reset_N, steps_N = episodes.begin(actions_NHA.shape[1])
        if reset_N.any():
            self._restart(StartOptions(reset_N, np.full(self.num_envs, -1), None))
        show, every = decode != "none", decode == "all" or self.terminate_on_success
        seen = False
        values: dict[str, Tensor] = {}
        path: list[Observations] = []
        terminated_N, lost_N = np.zeros((2, self.num_envs), dtype=bool)
        rewards_N = torch.zeros(self.num_envs, device=world.device)
        for h in range(actions_NHA.shape[1]):
            active_N = steps_N > h
            if active_N.any():
                with torch.inference_mode():
                    self._rows = world.step(self._require_ready(), actions_NHA[:, h], active_N)
                if every:
                    values, success_N = self._look(decode == "all")
                    seen, rewards_N = True, rewards_N + (success_N & self._tensor(active_N))
                    if self.terminate_on_success:
                        ended_N = success_N.cpu().numpy() & active_N
                        terminated_N |= ended_N
                        steps_N[ended_N] = h + 1
                if self.max_uncertainty is not None:
                    unsure_N = (self._require_ready().uncertainty_N > self.max_uncertainty).cpu().numpy()
                    lost_N |= unsure_N & active_N
                    steps_N[unsure_N & active_N] = h + 1
            if decode == "all":
                path.append(_copied(self._observed()))
        truncated_N, again_N = episodes.end(steps_N, terminated_N, lost_N)
        judged = show or not world.frames_for_judge  # what needs no pixels is judged whether they are shown or not
        pixels = show or bool(again_N.any())
        if not seen and (judged or pixels):
            values, success_N = self._look(pixels)
            if judged:
                rewards_N = rewards_N + (success_N & self._tensor(steps_N > 0))
        elif pixels:
            self._seen()
        infos = output.final_infos(self._observed(), values, again_N) if again_N.any() else {}
        if again_N.any():
            self._restart(StartOptions(again_N, np.full(self.num_envs, -1), None))
            if judged:
                values, _ = self._look(show)
        return Chunk(
            observations=output.observations(self._observed()) if show else None,
            rewards=output.rewards(rewards_N),
            terminations=output.mask(terminated_N),
            truncations=output.mask(truncated_N),
            infos={**infos, **output.infos(values, everyone_N)} if judged else infos,
            steps=output.counts(steps_N),
            path=output.observations(_stack(path)) if path else None,
        )

    def _restart(self, chosen: StartOptions) -> None:
        """Begin the episodes in the mask; each environment draws a start and a seed, whether they are used or not."""
        index_R = np.flatnonzero(chosen.mask_N)
        generators = [self._generator(i) for i in index_R]
        drawn_R = np.array([generator.integers(len(self.world.bank)) for generator in generators])
        seed_R = np.array([_draw_seed(generator) for generator in generators])
        with torch.inference_mode():
            if chosen.context is None:
                start_R = chosen.start_N[index_R]
                rows = self.world.begin(np.where(start_R < 0, drawn_R, start_R), seed_R)
            else:
                rows = self.world.begin_from(chosen.context.select(index_R), seed_R)
            if self._rows is None or len(index_R) == self.num_envs:
                self._rows = rows
            else:
                self._rows.put(index_R, rows)

    def _look(self, show: bool) -> tuple[dict[str, Tensor], Tensor]:
        """Decode what the judge needs to see, and the current frames if ``show``: its infos, (N,) each, and its verdict
        (N,) bool."""
        world = self.world
        with torch.inference_mode():
            self._rows = world.see(self._require_ready(), max(world.frames_for_judge, int(show)))
            return world.judged(self._rows)

    def _observed(self) -> Observations:
        """Current observations of decoded frames, on the device; to be copied before the rows change."""
        rows = self._require_ready()
        pixels = rows.frame_NHWC
        if self.obs_type == "pixels":
            return pixels
        agent_pos = torch.clamp(self.world.agent_pos(rows), self._agent_pos_low, self._agent_pos_high)
        return {"pixels": pixels, "agent_pos": agent_pos}

    def _seen(self) -> Rows:
        """The rows, with the current frames decoded."""
        with torch.inference_mode():
            self._rows = self.world.see(self._require_ready(), 1)
        return self._rows

    def _tensor(self, mask_N: Mask) -> Tensor:
        return on_device(mask_N, self.world.device)

    def _generator(self, i: int) -> np.random.Generator:
        generator = self._generators[i]
        if generator is None:
            generator, self._generator_seeds[i] = seeding.np_random()
            self._generators[i] = generator
        return generator

    def _seed(self, seed: int | Sequence[int | None] | None, mask_N: Mask) -> None:
        if seed is None:
            return
        seeds = [int(seed) + i for i in range(self.num_envs)] if isinstance(seed, (int, np.integer)) else list(seed)
        if len(seeds) != self.num_envs:
            raise InvalidArgument(f"seed: a list must have num_envs = {self.num_envs} entries, got {len(seeds)}.")
        for i in np.flatnonzero(mask_N):
            value = seeds[i]
            if value is not None:
                self._generators[i], self._generator_seeds[i] = seeding.np_random(value)

    def _fingerprint(self) -> tuple[str, str, str, str, int, int]:
        world, checkpoint = self.world, self.world.checkpoint
        judge = "" if world.judge is None else world.judge.name
        return checkpoint.name, checkpoint.digest, world.domain.name, judge, world.window, self.num_envs

    def _require_open(self) -> None:
        if self.closed:
            raise EnvironmentState("this environment is closed; make a new one with gymnasium.make_vec.")

    def _require_ready(self) -> Rows:
        self._require_open()
        if self._rows is None:
            raise EnvironmentState("call reset() before using the environment.")
        return self._rows


def _action_space(world: LearnedWorld) -> spaces.Box:
    """The domain's bounds, once for each of the ``stride`` actions that a step takes."""
    domain = world.domain
    low, high = (np.tile(np.array(b, np.float32), domain.stride) for b in (domain.action_low, domain.action_high))
    return spaces.Box(low, high, dtype=np.float32)


def _agent_pos_space(world: LearnedWorld) -> spaces.Box:
    """The tasks' own space; 20 standard deviations about the mean for a user's robot."""
    domain = world.domain
    if world.checkpoint.task:
        return agent_pos_space(domain.state_dim)
    mean, reach = np.array(domain.state_mean), 20.0 * np.array(domain.state_std)
    return agent_pos_space(domain.state_dim, (mean - reach).astype(np.float32), (mean + reach).astype(np.float32))


def _draw_seed(generator: np.random.Generator) -> int:
    return int(generator.integers(_SEED_LIMIT))


def _copied(observations: Observations) -> Observations:
    return {k: v.clone() for k, v in observations.items()} if isinstance(observations, dict) else observations.clone()


def _stack(path: list[Observations]) -> Observations:
    """(N, H, ...) of H observations (N, ...)."""
    if isinstance(path[0], dict):
        return {key: torch.stack([step[key] for step in path if isinstance(step, dict)], dim=1) for key in path[0]}
    return torch.stack([step for step in path if isinstance(step, Tensor)], dim=1)
