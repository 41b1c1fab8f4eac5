"""The table of tasks: one row per task, from which the gymnasium ids, spaces and defaults are built.

A second robosuite task is one more row here (and data to learn it from). This module is light: it
imports neither MuJoCo nor torch, so that ``import hma_gym`` may read it to register the ids.
"""

from __future__ import annotations

from dataclasses import dataclass

from hma_gym.errors import UnknownName


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        key: short name used in arguments, e.g. ``"lift"``.
        id_stem: middle of the gymnasium ids: ``GroundTruth-<id_stem>-v0`` and ``HMA-<id_stem>-v0``.
        robosuite_env: name of the robosuite environment class.
        robot: robosuite's name of the robot.
        camera: name of the camera that the observation comes from.
        control_hz: actions per second.
        horizon: ``max_episode_steps`` of the registered ids.
        object_body: MuJoCo body of the object that scripted policies and info["privileged"] are about.
        scripted: whether the scripted policies solve it, so that ``hma-gym collect`` can record it. For another task,
            import demonstrations.
        checkpoint: name of the default learned checkpoint, or ``None`` where none exists yet.
        action_dim: A, dims of an action: 3 translation, 3 rotation, 1 gripper (-1 opens, +1 closes).
        agent_pos_dim: P, dims of agent_pos: eef position 3 m, quaternion 4 xyzw, gripper fingers 2 m.
    """

    key: str
    id_stem: str
    robosuite_env: str
    object_body: str
    checkpoint: str | None
    scripted: bool = False
    robot: str = "Panda"
    camera: str = "agentview"
    control_hz: int = 20
    horizon: int = 80
    action_dim: int = 7
    agent_pos_dim: int = 9


TASKS: dict[str, Task] = {
    task.key: task
    for task in (
        Task("lift", "Lift", "Lift", object_body="cube_main", checkpoint="lift-64", scripted=True),
        Task("stack", "Stack", "Stack", object_body="cubeA_main", checkpoint=None, horizon=160),
    )
}


def get_task(key: str) -> Task:
    """The row of ``key``; :class:`UnknownName` lists the known ones."""
    if key not in TASKS:
        raise UnknownName("task", key, list(TASKS), "A new task is one new row in hma_gym/envs/tasks.py.")
    return TASKS[key]
