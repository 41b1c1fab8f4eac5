"""Environments: learned (HMA-*) and ground truth (GroundTruth-*), and the task table.

* :mod:`~hma_gym.envs.vector`, :mod:`~hma_gym.envs.single`: ``HMAVectorEnv`` and ``HMAEnv``;
* :mod:`~hma_gym.envs.world`: the checkpoint as a world (begin, step, see, judge), which knows nothing of Gymnasium;
* :mod:`~hma_gym.envs.autoreset`, :mod:`~hma_gym.envs.starts`, :mod:`~hma_gym.envs.actions`,
  :mod:`~hma_gym.envs.outputs`: when episodes end, where they begin, which actions are valid, how results go out;
* :mod:`~hma_gym.envs.ground_truth`, :mod:`~hma_gym.envs.simulation`, :mod:`~hma_gym.envs.rendering`: MuJoCo;
* :mod:`~hma_gym.envs.sb3`, :mod:`~hma_gym.envs.robomimic_env`: learned environments for other packages;
* :mod:`~hma_gym.envs.tasks`, :mod:`~hma_gym.envs.spaces`: what both have in common.

Nothing is imported here: ``import hma_gym`` must not import torch.
"""

if __name__ == "envs":
    raise ImportError("import hma_gym.envs instead of envs: this folder is part of the hma_gym package.")
