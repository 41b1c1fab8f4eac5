"""A checkpoint whose networks run through ``torch.compile``, by choice: faster rollouts after a minute of compiling.

>>> from hma_gym.dynamics.checkpoint import load_checkpoint
>>> from hma_gym.dynamics.compiled import with_compilation
>>> fast = with_compilation(load_checkpoint("lift-64"))  # doctest: +SKIP
>>> envs = gymnasium.make_vec("HMA-Lift-v0", num_envs=32, checkpoint=fast)  # doctest: +SKIP

Compiled are the trunk's blocks (once for all of them), the token head's noise model, and the tokenizer's decoder; on a
GPU, where each of their hundreds of tiny operations is a launch, also the bodies. Each is compiled at its first use
with a number of rows, and again for another number. Frames differ from those of the same networks uncompiled by float
rounding.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil

from torch import nn

from hma_gym.dynamics.checkpoint import Checkpoint
from hma_gym.dynamics.mar import NoiseModel
from hma_gym.dynamics.model import Dynamics
from hma_gym.errors import InvalidArgument
from hma_gym.nn.transformer import SpaceTimeTransformer
from hma_gym.tokenizers.conv import Decoder


def lacks_compiler() -> str:
    """Why ``torch.compile`` cannot make code for the CPU here; "" if it can."""
    wanted = (os.environ.get("CXX", ""), "g++", "c++", "clang++")
    return "" if any(name and shutil.which(name) for name in wanted) else "no C++ compiler here: apt-get install g++"


def compiled(network: nn.Module) -> nn.Module:
    """A copy of a network, with weights of its own, whose parts that are worth it run through ``torch.compile``."""
    twin = copy.deepcopy(network)
    for part in twin.modules():
        if isinstance(part, SpaceTimeTransformer):
            part.compile_extend()
        elif isinstance(part, Dynamics) and part.position_embedding.is_cuda:
            part.compile_bodies()
        elif isinstance(part, (NoiseModel, Decoder)):
            part.compile(dynamic=False, fullgraph=True)
    return twin


def with_compilation(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with compiled networks; ``provenance["compiled"]`` says so. For rollouts, not for training.

    Raises:
        InvalidArgument: compiled before, or on a CPU without a C++ compiler.
    """
    reason = lacks_compiler() if checkpoint.dynamics.position_embedding.device.type == "cpu" else ""
    if reason or "compiled" in checkpoint.provenance:
        raise InvalidArgument(
            f"checkpoint {checkpoint.name!r} cannot be compiled: {reason or 'it is compiled already; use it as it is'}."
        )
    dynamics, tokenizer = compiled(checkpoint.dynamics), compiled(checkpoint.tokenizer)
    assert isinstance(dynamics, type(checkpoint.dynamics)) and isinstance(tokenizer, type(checkpoint.tokenizer))
    return dataclasses.replace(
        checkpoint, dynamics=dynamics, tokenizer=tokenizer, provenance={**checkpoint.provenance, "compiled": True}
    )
