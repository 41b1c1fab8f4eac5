"""Diffusion policy: action sequences cleaned out of noise, given the last images and the arm's pose.

>>> policy = load_diffusion_policy("runs/policy/step-0000001000", seeds=[0, 1])  # doctest: +SKIP
>>> policy.reset(np.array([True, True]))  # doctest: +SKIP
>>> actions_NHA = policy.act({"pixels": images_NHWC, "agent_pos": agent_pos_NP})  # doctest: +SKIP
"""

from hma_gym.policies.diffusion.files import load_diffusion, save_diffusion
from hma_gym.policies.diffusion.model import DiffusionConfig, DiffusionModel, Normalisation
from hma_gym.policies.diffusion.policy import DiffusionPolicy, load_diffusion_policy

__all__ = [
    "DiffusionConfig",
    "DiffusionModel",
    "DiffusionPolicy",
    "Normalisation",
    "load_diffusion",
    "load_diffusion_policy",
    "save_diffusion",
]
