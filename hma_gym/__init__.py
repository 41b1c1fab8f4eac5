"""hma_gym: robot manipulation in a learned simulator, side by side with MuJoCo, through Gymnasium.

Importing this package registers its Gymnasium ids (``gymnasium.make("hma_gym:HMA-Lift-v0")`` imports it
for you) and imports neither torch nor MuJoCo:

* ``GroundTruth-<Task>-v0``: the task in MuJoCo; needs the extra ``sim``.
* ``HMA-<Task>-v0``: the task in the learned simulator, from the checkpoint that ships with the package.
* ``HMA-v0``: any checkpoint, ``gymnasium.make("HMA-v0", checkpoint=FOLDER)``.

The learned ids also have a native vector environment: ``gymnasium.make_vec("HMA-Lift-v0", num_envs=8)``.
"""

import importlib.util

from hma_gym.envs.tasks import TASKS
from hma_gym.version import __version__

__all__ = ["__version__"]


def _register_ids() -> None:
    from gymnasium.envs.registration import register

    single, vector = "hma_gym.envs.single:HMAEnv", "hma_gym.envs.vector:HMAVectorEnv"
    for task in TASKS.values():
        register(
            id=f"GroundTruth-{task.id_stem}-v0",
            entry_point="hma_gym.envs.ground_truth:GroundTruthEnv",
            max_episode_steps=task.horizon,
            kwargs={"task": task.key},
        )
        if task.checkpoint is not None:
            register(
                id=f"HMA-{task.id_stem}-v0",
                entry_point=single,
                vector_entry_point=vector,
                max_episode_steps=task.horizon,
                kwargs={"task": task.key},
            )
    register(id="HMA-v0", entry_point=single, vector_entry_point=vector)


# A machine that only trains needs no Gymnasium: torch, numpy, h5py, einops, safetensors and tqdm are enough there.
if importlib.util.find_spec("gymnasium") is not None:
    _register_ids()
