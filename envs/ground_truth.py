"""Ground truth: a robosuite task in MuJoCo as a Gymnasium environment, ``GroundTruth-<Task>-v0``.

It has the spaces, rate, horizon and info keys of the learned ``HMA-<Task>-v0``, so a policy runs in both
unchanged::

    import gymnasium, hma_gym
    env = gymnasium.make("GroundTruth-Lift-v0", obs_type="pixels_agent_pos")
    observation, info = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(env.action_space.sample())

Many at once run in processes, each with one core: ``gymnasium.make_vec("GroundTruth-Lift-v0", num_envs=4,
vectorization_mode="async")``.

Shape legend: A = 7 action dims, P = 9 agent_pos dims, S flattened simulation state (time, qpos, qvel).
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from hma_gym.data.episodes import agent_pos_from_obs
from hma_gym.envs.simulation import Simulation, check_action
from hma_gym.envs.spaces import ObsType, agent_pos_space, check_obs_type, observation_space
from hma_gym.envs.tasks import get_task
from hma_gym.errors import EnvironmentState, InvalidArgument

Observation = NDArray[np.uint8] | dict[str, Any]

RESET_OPTIONS = ("start", "state")
_MIN_SIZE, _MAX_SIZE = 8, 1024


class GroundTruthEnv(gymnasium.Env[Observation, NDArray[np.float32]]):
    """One task in MuJoCo.

    Args:
        task: key of the task table, e.g. ``"lift"``.
        obs_type: ``"pixels"`` (uint8 (H, W, 3)) or ``"pixels_agent_pos"`` (dict of ``pixels`` and ``agent_pos``:
            float32 (9,), eef position 3 m, quaternion 4 xyzw, gripper fingers 2 m).
        image_size: height and width of the observation in pixels; 64, 84, 128 and 256 are tested.
        render_mode: ``"rgb_array"`` or ``None``.
        render_size: height and width of what :meth:`render` returns.
        terminate_on_success: end the episode (``terminated``) at the first success.
        privileged_info: put :meth:`privileged` into ``info["privileged"]`` at each step, for scripted policies.
        starts: checkpoint (name, folder or hub id) whose start bank ``reset(options={"start": i})`` indexes;
            by default the task's own. It is loaded when first needed.

    Actions are (7,) in [-1, 1] (values outside are clipped): hand translation 3 (1 asks for 5 cm), rotation
    about the base axes 3 (1 asks for .5 rad), gripper (-1 opens, +1 closes). The reward is 1.0 while the task's
    own success predicate holds, else 0.0; ``info["is_success"]`` says the same, and ``info["success_probability"]``
    (the learned judge's in a learned environment) is 1.0 or 0.0 here.

    Raises:
        MissingExtra: mujoco or robosuite is not installed.
        RenderingUnavailable: no OpenGL context can be made (at the first ``reset``).
        UnknownName, InvalidArgument: an argument breaks its rule.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(
        self,
        task: str = "lift",
        obs_type: ObsType = "pixels",
        image_size: int = 64,
        render_mode: str | None = "rgb_array",
        render_size: int = 256,
        terminate_on_success: bool = False,
        privileged_info: bool = False,
        starts: str | None = None,
    ) -> None:
        row = get_task(task)
        check_obs_type(obs_type)
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise InvalidArgument(
                f"render_mode must be None or one of {self.metadata['render_modes']}, got {render_mode!r}."
            )
        for name, size in (("image_size", image_size), ("render_size", render_size)):
            if isinstance(size, bool) or not isinstance(size, int) or not _MIN_SIZE <= size <= _MAX_SIZE:
                raise InvalidArgument(f"{name} must be a whole number from {_MIN_SIZE} to {_MAX_SIZE}, got {size!r}.")
        self.task = row
        self.metadata = {**type(self).metadata, "render_fps": row.control_hz}
        self.render_mode = render_mode
        self.obs_type = obs_type
        self.image_size = image_size
        self.render_size = render_size
        self.terminate_on_success = terminate_on_success
        self.privileged_info = privileged_info
        self.observation_space: spaces.Space[Any] = observation_space(
            obs_type, (image_size, image_size), agent_pos_space(row.agent_pos_dim)
        )
        self.action_space: spaces.Space[Any] = spaces.Box(-1.0, 1.0, (row.action_dim,), np.float32)
        self.simulation = Simulation(row)
        self._starts_source = row.checkpoint if starts is None else starts
        self._starts_NS: NDArray[np.float64] | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: decides the start, alone. Without it the start comes from the generator of the last seed.
            options: ``{"start": i}`` begins at the i-th start of the start bank; ``{"state": saved}`` begins at what
                :meth:`get_state` returned (exactly), or at a flattened state (S,) of a dataset's ``states``.

        Raises:
            InvalidArgument: unknown options, or a start that the bank does not have.
            EnvironmentState: the environment is closed, or the state is of another task.
        """
        super().reset(seed=seed)
        options = options or {}
        unknown = sorted(set(options) - set(RESET_OPTIONS))
        if unknown or len(options) > 1:
            raise InvalidArgument(
                f"options must be one of {list(RESET_OPTIONS)}, and only one of them, got {sorted(options)}."
            )
        if "state" in options:
            self._reset_to_state(options["state"])
        elif "start" in options:
            self.simulation.reset_to(self._start_state(options["start"]))
        else:
            self.simulation.reset(int(self.np_random.integers(2**31)) if seed is None else seed)
        return self._observation(), self._info()

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Apply one action for 1 / control_hz seconds.

        Raises:
            InvalidAction: the action has the wrong shape or a value that is not finite.
            EnvironmentState: before ``reset`` or after ``close``.
        """
        self.simulation.step(check_action(action, self.task.action_dim))
        info = self._info()
        success = info["is_success"]
        return self._observation(), float(success), self.terminate_on_success and success, False, info

    def render(self) -> NDArray[np.uint8] | None:
        """The camera's image (render_size, render_size, 3) uint8, or ``None`` with ``render_mode=None``."""
        return None if self.render_mode is None else self.simulation.render(self.render_size)

    def get_state(self) -> dict[str, Any]:
        """The whole state of the episode. Restored with :meth:`set_state`, here or in another environment of the
        same task, the same actions give the same images and states, bit for bit."""
        return {**self.simulation.get_state(), "np_random": self.np_random.bit_generator.state}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`get_state` returned.

        Raises:
            EnvironmentState: the state is of another task or version.
        """
        self.simulation.set_state(state)
        self.np_random.bit_generator.state = state["np_random"]

    def privileged(self) -> dict[str, NDArray[np.float64]]:
        """The true state that scripted policies read; see :meth:`Simulation.privileged`."""
        return self.simulation.privileged()

    def close(self) -> None:
        """Free the renderers. The environment cannot be used afterwards."""
        self.simulation.close()

    def _observation(self) -> Observation:
        pixels = self.simulation.render(self.image_size)
        if self.obs_type == "pixels":
            return pixels
        return {"pixels": pixels, "agent_pos": agent_pos_from_obs(self.simulation.observe())}

    def _info(self) -> dict[str, Any]:
        success = self.simulation.is_success()
        info: dict[str, Any] = {"is_success": success, "success_probability": float(success)}
        if self.privileged_info:
            info["privileged"] = self.simulation.privileged()
        return info

    def _reset_to_state(self, state: object) -> None:
        if isinstance(state, dict):
            self.set_state(state)
        elif isinstance(state, np.ndarray):
            self.simulation.reset_to(state)
        else:
            raise EnvironmentState(
                "options['state'] must be what get_state() returned or a flattened state (time, qpos, qvel) as a "
                f"NumPy array, got {type(state).__name__}."
            )

    def _start_state(self, index: object) -> NDArray[np.float64]:
        if self._starts_NS is None:
            if self._starts_source is None:
                raise InvalidArgument(
                    f"options['start'] needs the start bank of a checkpoint and task {self.task.key!r} has none yet; "
                    "make the environment with starts=FOLDER of one, or reset with a seed."
                )
            from hma_gym.dynamics.checkpoint import load_checkpoint  # imports torch, which nothing else here needs

            self._starts_NS = load_checkpoint(self._starts_source).starts.states_NS
        count = len(self._starts_NS)
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)) or not 0 <= index < count:
            raise InvalidArgument(f"options['start'] must be a whole number from 0 to {count - 1}, got {index!r}.")
        return np.asarray(self._starts_NS[int(index)], dtype=np.float64)
