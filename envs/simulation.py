"""One robosuite task as a deterministic simulation: reset by seed, step, observe, save and restore.

:class:`~hma_gym.envs.ground_truth.GroundTruthEnv` wraps it for Gymnasium; the collector and the
competence sweep use it directly, with or without images.

Shape legend: A action dims, P agent_pos dims, S flattened simulation state (time, qpos, qvel).
"""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hma_gym.envs.rendering import CameraRenderer, import_mujoco
from hma_gym.envs.tasks import Task
from hma_gym.errors import EnvironmentState, InvalidAction
from hma_gym.extras import require

_MODEL_SEED = 0  # the model (cube size, textures) is built once from this seed, so every process has the same one
# What the arm controller remembers from one step to the next; all else it computes anew from the physics.
_CONTROLLER_MEMORY = ("goal_pos", "goal_ori", "initial_joint", "initial_ref_pos", "initial_ref_ori_mat")
_STATE_VERSION = 1


def check_action(action: object, action_dim: int) -> NDArray[np.float64]:
    """``action`` as float64 in [-1, 1] (values outside are clipped).

    Raises:
        InvalidAction: the shape is not (action_dim,), the dtype is not floating, or a value is not finite.
    """
    try:
        array = np.asarray(action)
    except ValueError as error:
        raise InvalidAction(f"action must have shape ({action_dim},), got {type(action).__name__}: {error}.") from error
    if array.dtype.kind != "f":
        raise InvalidAction(
            f"action must be of a floating dtype, got {array.dtype}; convert it with astype(np.float32)."
        )
    if array.shape != (action_dim,):
        raise InvalidAction(
            f"action must have shape ({action_dim},) with values in [-1, 1], got shape {array.shape}; "
            "a batch of actions needs a vector env (gymnasium.make_vec)."
        )
    if not np.isfinite(array).all():
        raise InvalidAction(
            f"action must be finite, got {array.tolist()}; check the policy's output (a NaN often comes from "
            "un-normalised inputs or a diverged network)."
        )
    return np.clip(array.astype(np.float64), -1.0, 1.0)


class Simulation:
    """A robosuite task without robosuite's image path.

    The model is built once; ``reset`` draws a start from a seed and gives the same one whatever was
    simulated before. Observations are computed from the exact current state (robosuite's own lag one
    physics substep of 2 ms behind it).

    Args:
        task: row of the task table.

    Raises:
        MissingExtra: mujoco or robosuite is not installed.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self._mujoco = import_mujoco()
        logging.getLogger("robosuite_logs").addFilter(_drop_below_error)
        with warnings.catch_warnings():  # robosuite's imports warn of deprecations that are not the user's
            warnings.simplefilter("ignore")
            robosuite = require("robosuite", extra="sim", purpose="the ground-truth environments")
            controllers = require("robosuite.controllers", extra="sim", purpose="the ground-truth environments")
        self._env: Any = robosuite.make(
            task.robosuite_env,
            robots=task.robot,
            controller_configs=controllers.load_composite_controller_config(controller=None, robot=task.robot),
            has_renderer=False,
            has_offscreen_renderer=False,
            use_camera_obs=False,
            use_object_obs=True,
            control_freq=task.control_hz,
            ignore_done=True,
            hard_reset=False,
            renderer="mujoco",
            seed=_MODEL_SEED,
        )
        # Saved at once, for MuJoCo can save only the model that it loaded last; robosuite's get_xml leaks a file.
        with tempfile.TemporaryDirectory() as folder:
            xml = Path(folder, "model.xml")
            self._mujoco.mj_saveLastXML(str(xml), self.model)
            self._model_xml = xml.read_text()
        self._set_observables(False)
        self._renderers: dict[int, CameraRenderer] = {}
        self._ready = False
        self._closed = False
        self._body_id = self._env.sim.model.body_name2id(task.object_body)

    @property
    def model(self) -> Any:
        """``mujoco.MjModel``."""
        return self._env.sim.model._model

    @property
    def data(self) -> Any:
        """``mujoco.MjData``."""
        return self._env.sim.data._data

    @property
    def model_xml(self) -> str:
        """The MuJoCo XML, as robomimic stores it in ``model_file``."""
        return self._model_xml

    @property
    def env_args(self) -> dict[str, Any]:
        """robomimic's ``env_args``, what builds this environment again; beside them ``camera_projection``."""
        config = self._env.robots[0].composite_controller_config
        return {
            "env_name": self.task.robosuite_env,
            "type": 1,
            "camera_projection": self.camera_projection(),
            "env_version": require("robosuite", extra="sim", purpose="the ground-truth environments").__version__,
            "env_kwargs": {
                "robots": self.task.robot,
                "controller_configs": json.loads(json.dumps(config, default=_jsonable)),
                "control_freq": self.task.control_hz,
                "has_renderer": False,
                "has_offscreen_renderer": True,
                "ignore_done": True,
                "use_object_obs": True,
                "use_camera_obs": True,
                "reward_shaping": False,
                "camera_names": [self.task.camera],
            },
        }

    def camera_projection(self) -> list[float]:
        """How the task camera, which stands still, sees the room: see :class:`hma_gym.domains.Domain`."""
        camera = self.model.camera(self.task.camera).id
        self._mujoco.mj_kinematics(self.model, self.data)
        self._mujoco.mj_camlight(self.model, self.data)
        turned = np.array(self.data.cam_xmat[camera]).reshape(3, 3).T  # columns: right, up, backwards
        place = turned @ np.array(self.data.cam_xpos[camera])
        right, up, back = np.concatenate((turned, -place[:, None]), axis=1)
        zoom = 1.0 / np.tan(np.deg2rad(float(self.model.cam_fovy[camera])) / 2.0)
        return [float(x) for x in np.concatenate((zoom * right, -zoom * up, -back))]

    def reset(self, seed: int) -> None:
        """Start an episode: the robot's joints and the object's pose are drawn from ``seed`` alone."""
        self._require_open()
        self._env.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
        self._env.reset()
        self._set_observables(False)
        # robosuite leaves the mass matrix of the pose before the draw in the controller until the first substep.
        self._arm_controller.update(force=True)
        self._ready = True

    def reset_to(self, state_S: NDArray[np.float64]) -> None:
        """Start an episode at a flattened state (time, qpos, qvel), as a dataset stores it.

        For a state that begins an episode the actions recorded after it give the recorded states
        again, bit for bit. A state from within an episode lacks the solver's warm start, and the
        replay is equal only to solver tolerance; use :meth:`get_state` for an exact copy.
        """
        self.reset(seed=0)
        self._set_flattened(state_S)
        controller = self._arm_controller
        controller.update(force=True)
        controller.update_initial_joints(np.array(self.data.qpos[controller.qpos_index]))

    def show(self, state_S: NDArray[np.float64]) -> None:
        """Set a flattened state (time, qpos, qvel) to be looked at: observed, rendered, judged. The controller is not
        told, so call :meth:`reset` or :meth:`reset_to` before the next step."""
        if not self._ready:
            self.reset(seed=0)
        self._set_flattened(state_S)

    def _set_flattened(self, state_S: NDArray[np.float64]) -> None:
        state_S = np.asarray(state_S, dtype=np.float64)
        size = 1 + self.model.nq + self.model.nv
        if state_S.shape != (size,) or not np.isfinite(state_S).all():
            raise EnvironmentState(
                f"a flattened state of {self.task.robosuite_env} must be {size} finite numbers (time, qpos, qvel), got "
                f"shape {state_S.shape}; the state may come from another task or robosuite version."
            )
        self._mujoco.mj_resetData(self.model, self.data)
        self._env.sim.set_state_from_flattened(state_S)
        self._mujoco.mj_forward(self.model, self.data)

    @property
    def object_joint(self) -> str:
        """Name of the free joint by which the object moves."""
        return str(self.model.joint(self.model.body_jntadr[self._body_id]).name)

    def object_contacts(self) -> NDArray[np.float64]:
        """(K,) m: the distances of the object's contacts; negative where it is in something."""
        self._require_ready()
        bodies = self.model.geom_bodyid
        touching = [c.dist for c in self.data.contact if self._body_id in (bodies[c.geom1], bodies[c.geom2])]
        return np.array(touching, dtype=np.float64)

    def step(self, action_A: NDArray[np.float64]) -> None:
        """Apply one checked action (see :func:`check_action`) for 1 / control_hz seconds."""
        self._require_ready()
        self._env.step(action_A)
        # The last physics substep moved qpos; bring body and camera poses up to it.
        self._mujoco.mj_kinematics(self.model, self.data)
        self._mujoco.mj_comPos(self.model, self.data)
        self._mujoco.mj_camlight(self.model, self.data)

    def is_success(self) -> bool:
        """robosuite's own success predicate on the current state."""
        self._require_ready()
        return bool(self._env._check_success())

    def observe(self) -> dict[str, NDArray[np.float64]]:
        """robosuite's low-dim observations under robomimic's names (``object`` for ``object-state``)."""
        self._require_ready()
        self._set_observables(True)
        raw = self._env._get_observations(force_update=True)
        self._set_observables(False)
        keep = {k: np.array(v, dtype=np.float64) for k, v in raw.items() if k.startswith("robot0_")}
        keep.pop("robot0_proprio-state")
        keep["object"] = np.array(raw["object-state"], dtype=np.float64)
        return keep

    def privileged(self) -> dict[str, NDArray[np.float64]]:
        """The true state that scripted policies read.

        ``object_pos`` (3) m, ``object_quat`` (4) xyzw, ``eef_pos`` (3) m, ``eef_quat`` (4) xyzw of the hand
        body, ``gripper_qpos`` (2) m, ``finger_axis`` (3) unit vector along which the fingers close.
        For a task whose object is a cube, ``cube_pos`` and ``cube_quat`` are the same arrays.
        """
        self._require_ready()
        data, robot = self._env.sim.data, self._env.robots[0]
        quat = np.roll(np.array(data.body_xquat[self._body_id]), -1)
        pos = np.array(data.body_xpos[self._body_id])
        site = robot.eef_site_id["right"]
        hand = self._env.sim.model.body_name2id(robot.robot_model.eef_name["right"])
        fingers = [robot.gripper["right"].important_geoms[k][0] for k in ("left_fingerpad", "right_fingerpad")]
        ends = [np.array(data.geom_xpos[self._env.sim.model.geom_name2id(name)]) for name in fingers]
        axis = ends[1] - ends[0]
        return {
            "cube_pos": pos,
            "cube_quat": quat,
            "object_pos": pos,
            "object_quat": quat,
            "eef_pos": np.array(data.site_xpos[site]),
            "eef_quat": np.roll(np.array(data.body_xquat[hand]), -1),
            "gripper_qpos": np.array(data.qpos[robot._ref_gripper_joint_pos_indexes["right"]]),
            "finger_axis": axis / max(float(np.linalg.norm(axis)), 1e-9),
        }

    def flattened_state(self) -> NDArray[np.float64]:
        """(S,) time, qpos, qvel, as robomimic stores it."""
        self._require_ready()
        return np.array(self._env.sim.get_state().flatten(), dtype=np.float64)

    def render(self, size: int) -> NDArray[np.uint8]:
        """The task camera's image: a fresh (size, size, 3) uint8 array, upright."""
        self._require_ready()
        if size not in self._renderers:
            self._renderers[size] = CameraRenderer(self.model, self.task.camera, size)
        return self._renderers[size].render(self.data)

    def get_state(self) -> dict[str, Any]:
        """Everything that the future depends on: a dict of plain values and numpy arrays (picklable)."""
        self._require_ready()
        spec = self._mujoco.mjtState.mjSTATE_INTEGRATION
        physics = np.empty(self._mujoco.mj_stateSize(self.model, spec))
        self._mujoco.mj_getState(self.model, self.data, physics, spec)
        controller = self._arm_controller
        return {
            "version": _STATE_VERSION,
            "task": self.task.key,
            "physics": physics,
            "controller": {name: np.array(getattr(controller, name)) for name in _CONTROLLER_MEMORY},
            "gripper_action": np.array(self._gripper.current_action),
            "timestep": int(self._env.timestep),
            "cur_time": float(self._env.cur_time),
            "rng": self._env.rng.bit_generator.state,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`get_state` gave, in this or any other simulation of the same task.

        Raises:
            EnvironmentState: the state comes from another task or version.
        """
        self._require_open()
        spec = self._mujoco.mjtState.mjSTATE_INTEGRATION
        size = self._mujoco.mj_stateSize(self.model, spec)
        found = (state.get("version"), state.get("task"), np.shape(state.get("physics", ())))
        if found != (_STATE_VERSION, self.task.key, (size,)):
            raise EnvironmentState(
                f"the saved state must be one that get_state() of task {self.task.key!r} returned (version "
                f"{_STATE_VERSION}, {size} numbers), got version {found[0]}, task {found[1]!r}, shape {found[2]}."
            )
        if not self._ready:
            self.reset(seed=0)
        self._mujoco.mj_setState(self.model, self.data, state["physics"], spec)
        # mj_forward solves for qacc and would overwrite the warm start: restore it afterwards.
        self._mujoco.mj_forward(self.model, self.data)
        self._mujoco.mj_setState(self.model, self.data, state["physics"], spec)
        controller = self._arm_controller
        controller.update(force=True)
        for name in _CONTROLLER_MEMORY:
            setattr(controller, name, np.array(state["controller"][name]))
        self._gripper.current_action = np.array(state["gripper_action"])
        self._env.timestep = state["timestep"]
        self._env.cur_time = state["cur_time"]
        self._env.rng.bit_generator.state = state["rng"]

    def close(self) -> None:
        """Free the OpenGL contexts. Calling it twice is harmless; any other call afterwards is an error."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers = {}
        self._ready = False
        self._closed = True

    @property
    def _arm_controller(self) -> Any:
        return self._env.robots[0].composite_controller.part_controllers["right"]

    @property
    def _gripper(self) -> Any:
        return self._env.robots[0].gripper["right"]

    def _set_observables(self, enabled: bool) -> None:
        # robosuite updates every sensor at each of the 25 physics substeps; we read them once a step.
        for observable in self._env._observables.values():
            observable.set_enabled(enabled)

    def _require_open(self) -> None:
        if self._closed:
            raise EnvironmentState("this environment is closed; make a new one with gymnasium.make.")

    def _require_ready(self) -> None:
        self._require_open()
        if not self._ready:
            raise EnvironmentState("call reset() before using the environment.")


def _drop_below_error(record: logging.LogRecord) -> bool:
    """robosuite logs set-up advice about features that are not used here; keep its errors."""
    return record.levelno >= logging.ERROR


def _jsonable(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else str(value)
