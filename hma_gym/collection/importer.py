"""Import of robomimic files into our layout: ``hma-gym data import FILE``.

robomimic ships low-dim and image files, recorded under several versions of robosuite. What all of them keep is
the simulator's state at every row. So the frames, ``agent_pos`` and the other observations are computed again
from the states, in the ground-truth simulation of the same task: then every dataset looks the same to a learned
simulator, whatever made it.

Older robosuite versions order or name the joints otherwise. Each demo keeps its MuJoCo model, and states are
carried over joint by joint, by name. What cannot be carried over (another robot, controller or control rate, a
joint that is missing, a robot that stands elsewhere) is an error that says so.

Shape legend: T rows, S state dims (time, qpos, qvel).
"""

from __future__ import annotations

import dataclasses
import functools
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hma_gym.data.episodes import EEF_POS, AttrValue, Episode, agent_pos_from_obs
from hma_gym.data.robomimic_hdf5 import Dataset, EpisodeWriter, open_dataset
from hma_gym.envs.simulation import Simulation
from hma_gym.envs.tasks import TASKS, Task, get_task
from hma_gym.errors import DatasetError, InvalidArgument

EEF_TOLERANCE = 0.02
"""How far (metres) the gripper may be from where the file says it was, before the robots count as different."""

_QPOS_QVEL = {"free": (7, 6), "ball": (4, 3), "slide": (1, 1), "hinge": (1, 1)}


@dataclass(frozen=True)
class ImportConfig:
    """Import a robomimic file.

    Attributes:
        file: robomimic HDF5, low-dim or with images.
        out: the file to write, in our layout; by default FILE with ``_imported`` added to its name. An interrupted
            import goes on where it stopped.
        task: key of the task table; by default the task whose robosuite name the file gives.
        images: ``render`` frames from the recorded states, or ``keep`` the frames that the file has (then nothing
            is simulated, and the file may come from any robot).
        image_size: height and width of rendered frames, pixels.
        camera: which of the file's cameras to ``keep``; by default ``agentview``, else the first.
        limit: import only this many demos.
    """

    file: Path
    out: Path | None = None
    task: str | None = None
    images: Literal["render", "keep"] = "render"
    image_size: int = 64
    camera: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InvalidArgument(f"limit must be at least 1, got {self.limit}; leave it out to import all demos.")
        if self.camera is not None and self.images == "render":
            raise InvalidArgument(
                f"camera is for images='keep', got camera={self.camera!r} with images='render'; rendered frames are "
                "from the task's own camera."
            )


def import_dataset(config: ImportConfig) -> Path:
    """Import ``config.file`` and return the path of the file written.

    Raises:
        DatasetError: the file cannot be read, or its demos cannot be carried over; the message says why.
        UnknownName: no such task.
        ResumeError: the output exists and comes from an import of another file or with other settings.
        StorageError: the output cannot be written.
    """
    source = open_dataset(config.file, camera=config.camera)
    out = config.out or config.file.with_name(f"{config.file.stem}_imported.hdf5")
    info = {
        "imported_from": config.file.name,
        "imported_rows": int(source.lengths_N.sum()),
        "images": config.images,
        "image_size": config.image_size if config.images == "render" else None,
        "source": source.info,
    }
    if config.images == "keep":
        writer = EpisodeWriter(out, env_args=source.env_args, info=info)
        for position in _pending(source, writer, config.limit):
            writer.write(position, _kept(source, position))
        return writer.merge()
    task = get_task(config.task) if config.task is not None else task_of(source)
    check_same_control(source, task)
    simulation = Simulation(task)
    try:
        writer = EpisodeWriter(out, env_args=simulation.env_args, info=info)
        importer = _Renderer(source, simulation, config.image_size)
        for position in _pending(source, writer, config.limit):
            writer.write(position, importer.episode(position))
    finally:
        simulation.close()
    return writer.merge()


def _pending(source: Dataset, writer: EpisodeWriter, limit: int | None) -> Sequence[int]:
    finished = set(writer.finished())
    total = len(source) if limit is None else min(limit, len(source))
    pending = [position for position in range(total) if position not in finished]
    return tqdm(pending, desc="importing", unit="demo", initial=total - len(pending), total=total)


def task_of(source: Dataset) -> Task:
    """The task whose robosuite name a file gives. Raises :class:`DatasetError` where the task table has none."""
    name = source.env_args.get("env_name")
    for task in TASKS.values():
        if task.robosuite_env == name:
            return task
    known = sorted(task.robosuite_env for task in TASKS.values())
    raise DatasetError(
        f"{str(source.path)!r} was recorded in the environment {name!r}, and the task table has only {known}; "
        "add a row to hma_gym/envs/tasks.py, or import with images='keep' if the file has images."
    )


def check_same_control(source: Dataset, task: Task) -> None:
    """Make sure that the file's actions mean what the task's actions mean.

    Raises:
        DatasetError: another robot, action size, control rate or controller.
    """
    kwargs = source.env_args.get("env_kwargs", {})
    robots = kwargs.get("robots", task.robot)
    controller = _arm_controller(kwargs.get("controller_configs"))
    delta = controller.get("control_delta", controller.get("input_type", "delta") == "delta")
    for what, found, expected in (
        ("environment", source.env_args.get("env_name", task.robosuite_env), task.robosuite_env),
        ("robot", robots[0] if isinstance(robots, list) and len(robots) == 1 else robots, task.robot),
        ("number of action dims", source.action_dim, task.action_dim),
        ("control rate in Hz", kwargs.get("control_freq", task.control_hz), task.control_hz),
        ("controller", controller.get("type", "OSC_POSE"), "OSC_POSE"),
        ("controller's impedance mode", controller.get("impedance_mode", "fixed"), "fixed"),
        ("use of relative actions", delta, True),
    ):
        if found != expected:
            raise DatasetError(
                f"{str(source.path)!r} cannot be imported into task {task.key!r}: its {what} is {found!r}, the task's "
                f"is {expected!r}, so the same numbers would be another motion. Choose a file recorded with the "
                f"{expected!r} one."
            )


def _arm_controller(config: Any) -> Mapping[str, Any]:
    """The arm's part of robosuite's controller configuration, before and since robosuite 1.5."""
    if isinstance(config, list) and len(config) == 1:
        return _arm_controller(config[0])
    if not isinstance(config, dict):
        return {}
    parts = config.get("body_parts", config.get("body_parts_controller_configs"))
    if not isinstance(parts, dict):
        return config
    return _arm_controller(parts.get("arms", parts).get("right"))


@dataclass(frozen=True)
class Joint:
    """A joint of a MuJoCo model and where its numbers are in a flattened state."""

    name: str
    kind: str
    qpos: slice
    qvel: slice


@functools.lru_cache(maxsize=8)
def joints_of(model_xml: str) -> tuple[Joint, ...]:
    """The joints of a model in the order of its qpos, read from its XML without loading any mesh.

    Names are those of robosuite before 1.5, which did not tell the arms of one-armed robots apart.

    Raises:
        DatasetError: not the XML of a MuJoCo model.
    """
    try:
        root = ElementTree.fromstring(model_xml)
    except ElementTree.ParseError as error:
        raise DatasetError(
            f"model_file must be the XML of a MuJoCo model, got {model_xml[:60]!r} ({error})."
        ) from error
    found: list[tuple[str, str]] = []

    def visit(body: ElementTree.Element) -> None:
        for child in body:
            if child.tag in ("joint", "freejoint"):
                kind = "free" if child.tag == "freejoint" else child.get("type", "hinge")
                found.append((re.sub("^gripper0_right_", "gripper0_", child.get("name", "")), kind))
        for child in body.findall("body"):
            visit(child)

    for world in root.findall("worldbody"):
        visit(world)
    nq = sum(_QPOS_QVEL[kind][0] for _, kind in found)
    joints, at_qpos, at_qvel = [], 1, 1 + nq
    for name, kind in found:
        qpos_size, qvel_size = _QPOS_QVEL[kind]
        joints.append(Joint(name, kind, slice(at_qpos, at_qpos + qpos_size), slice(at_qvel, at_qvel + qvel_size)))
        at_qpos, at_qvel = at_qpos + qpos_size, at_qvel + qvel_size
    return tuple(joints)


def carry_over(states_TS: NDArray[np.float64], source: Sequence[Joint], target: Sequence[Joint]) -> NDArray[np.float64]:
    """States (T, S) of one model as states (T, S') of another, joint by joint; joints without a match are dropped.

    Raises:
        DatasetError: the states do not fit the source's joints, or a joint of the target is not in the source.
    """
    expected = source[-1].qvel.stop if source else 1
    if states_TS.shape[1] != expected:
        raise DatasetError(
            f"its states have {states_TS.shape[1]} numbers and its model_file has {expected} (time, qpos, qvel); "
            "the two do not belong together."
        )
    recorded = {(joint.name, joint.kind): joint for joint in source}
    missing = [f"{joint.name} ({joint.kind})" for joint in target if (joint.name, joint.kind) not in recorded]
    if missing:
        raise DatasetError(
            f"its model has no joint {', '.join(missing)}; it has {', '.join(joint.name for joint in source)}. "
            "It was recorded with another robot, gripper or object, or a robosuite too old to carry over."
        )
    carried_TS = np.zeros((len(states_TS), target[-1].qvel.stop))
    carried_TS[:, 0] = states_TS[:, 0]
    for joint in target:
        match = recorded[joint.name, joint.kind]
        carried_TS[:, joint.qpos] = states_TS[:, match.qpos]
        carried_TS[:, joint.qvel] = states_TS[:, match.qvel]
    return carried_TS


def recorded_states(
    source: Dataset, position: int, arrays: Mapping[str, NDArray[Any]], joints: Sequence[Joint]
) -> NDArray[np.float64]:
    """The states (T, S) of an episode with these arrays, carried over to the joints of the task's model.

    Raises:
        DatasetError: it has no states, or they cannot be carried over.
    """
    where = source.demos[position].where
    states_TS = arrays.get("states", np.zeros((0, 0)))
    if not states_TS.size:
        raise DatasetError(
            f"{where} has no states to render from; choose a file that keeps them, or import with images='keep' if the "
            "file has images."
        )
    model_file = source.model_file(position)
    try:
        recorded = joints if model_file is None else joints_of(model_file)
        return carry_over(states_TS.astype(np.float64), recorded, joints)
    except DatasetError as error:
        raise DatasetError(f"{where} cannot be carried over to this robosuite: {error}") from error


def check_same_place(where: str, arrays: Mapping[str, NDArray[Any]], eef_pos_3: NDArray[np.floating[Any]]) -> None:
    """Make sure that an episode's gripper is, at row 0, where its joints put it in this robosuite.

    Raises:
        DatasetError: it is elsewhere.
    """
    if f"obs/{EEF_POS}" not in arrays:
        return
    offset = float(np.abs(arrays[f"obs/{EEF_POS}"][0] - eef_pos_3).max())
    if offset > EEF_TOLERANCE:
        raise DatasetError(
            f"{where} cannot be carried over: at row 0 its gripper was {offset:.3f} m from where its joints put it in "
            f"this robosuite (tolerance {EEF_TOLERANCE}); the robot stands elsewhere or has another shape."
        )


class _Renderer:
    """Makes episodes of a source's states by simulation."""

    def __init__(self, source: Dataset, simulation: Simulation, image_size: int) -> None:
        self._source = source
        self._simulation = simulation
        self._image_size = image_size
        self._model_xml = simulation.model_xml
        self._joints = joints_of(self._model_xml)

    def episode(self, position: int) -> Episode:
        demo = self._source.demos[position]
        arrays = self._source.arrays(position)
        states_TS = recorded_states(self._source, position, arrays, self._joints)
        images_THWC, obs, success_T = show_states(self._simulation, states_TS, self._image_size)
        check_same_place(demo.where, arrays, obs[EEF_POS][0])
        length = len(states_TS)
        return Episode(
            images_THWC=images_THWC,
            agent_pos_TP=agent_pos_from_obs(obs),
            actions_TA=arrays["actions"],
            states_TS=states_TS,
            rewards_T=arrays.get("rewards", np.append(success_T[1:], success_T[-1])),
            dones_T=arrays.get("dones", np.arange(length) == length - 1),
            obs=obs,
            attrs=_labels(demo.attrs, success_T) | {"model_file": self._model_xml},
        )


def show_states(
    simulation: Simulation, states_TS: NDArray[np.float64], image_size: int
) -> tuple[NDArray[np.uint8], dict[str, NDArray[Any]], NDArray[np.bool_]]:
    """Images, observations and success of each state."""
    images, rows, success = [], [], []
    for state_S in states_TS:
        simulation.show(state_S)
        images.append(simulation.render(image_size))
        rows.append(simulation.observe())
        success.append(simulation.is_success())
    # Accelerations depend on the motors, which a state does not tell.
    keys = [key for key in rows[0] if not key.endswith("_acc")]
    return np.stack(images), {key: np.stack([row[key] for row in rows]) for key in keys}, np.array(success)


def _kept(source: Dataset, position: int) -> Episode:
    episode = source[position]
    return dataclasses.replace(
        episode,
        obs={key: value for key, value in episode.obs.items() if value.ndim < 4},
        attrs=dict(episode.attrs) | _labels(episode.attrs, np.append(False, episode.rewards_T[:-1] > 0)),
    )


def _labels(attrs: Mapping[str, AttrValue], success_T: NDArray[np.bool_]) -> dict[str, AttrValue]:
    """The labels of an imported episode: those that the file has, and the outcome as far as it can be told.

    ``success_T`` says which rows show success; what the last action brought about no row shows.
    """
    held, ever = bool(success_T[-1]), bool(success_T.any())
    known: dict[str, AttrValue] = {
        "policy": "imported",
        "mode": "imported",
        "category": "held" if held else "dropped" if ever else "other",
        "success": held,
        "success_ever": ever,
    }
    return known | {key: value for key, value in attrs.items() if key != "model_file"}
