"""A checkpoint whose networks run through ``torch.compile``, by choice: faster rollouts after a minute of compiling.

>>> from hma_gym.dynamics.checkpoint import load_checkpoint
>>> from hma_gym.dynamics.compiled import with_compilation
>>> fast = with_compilation(load_checkpoint("lift-64"))  # doctest: +SKIP
>>> envs = gymnasium.make_vec("HMA-Lift-v0", num_envs=32, checkpoint=fast)  # doctest: +SKIP

Compiled are, on a CPU, a whole step of a model of one domain that has few unmasking and noise steps, and the decoding
of its frames; else the trunk's blocks (once for all of them), the token head's noise model, the bodies, and the
tokenizer's decoder. Each is compiled at its first use with a number of rows, and again for another number. Frames
differ from those of the same networks uncompiled by float rounding. Weights that are packed stay so: pack them first.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil

from torch import nn

from hma_gym.dynamics.checkpoint import Checkpoint
from hma_gym.dynamics.mar import NoiseModel, SoftHeadConfig
from hma_gym.dynamics.model import Dynamics
from hma_gym.errors import InvalidArgument
from hma_gym.nn.compiling import compile_methods
from hma_gym.nn.transformer import SpaceTimeTransformer
from hma_gym.tokenizers.conv import Decoder
from hma_gym.tokenizers.soft import SoftTokenizer

#: A step that goes through the trunk or the noise model more often than this is not unrolled into one graph.
MOST_ROUNDS = 16


def lacks_compiler() -> str:
    """Why ``torch.compile`` cannot make code for the CPU here; "" if it can."""
    wanted = (os.environ.get("CXX", ""), "g++", "c++", "clang++")
    return "" if any(name and shutil.which(name) for name in wanted) else "no C++ compiler here: apt-get install g++"


def compiled(network: nn.Module) -> nn.Module:
    """A copy of a network, with weights of its own, whose parts that are worth it run through ``torch.compile``."""
    twin = copy.deepcopy(network)
    if isinstance(twin, Dynamics) and _fits_whole(twin):
        twin.compile_step()
        return twin
    if isinstance(twin, SoftTokenizer) and not twin.background.is_cuda:
        compile_methods(twin, ("latents_to_frames",), fullgraph=False)
        return twin
    for part in twin.modules():
        if isinstance(part, SpaceTimeTransformer):
            part.compile_extend()
        elif isinstance(part, Dynamics):
            part.compile_bodies()
        elif isinstance(part, (NoiseModel, Decoder)):
            part.compile(dynamic=False, fullgraph=True)
    return twin


def _fits_whole(dynamics: Dynamics) -> bool:
    """Whether a step is one graph of reasonable size, on a CPU."""
    head = dynamics.config.head
    rounds = dynamics.config.decode_steps * (head.flow_steps if isinstance(head, SoftHeadConfig) else 1)
    return len(dynamics.domains) == 1 and rounds <= MOST_ROUNDS and not dynamics.position_embedding.is_cuda


def with_compilation(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with compiled networks; ``provenance["compiled"]`` says so. For rollouts, not for training.

    Raises:
        InvalidArgument: compiled before, or on a CPU without a C++ compiler.
    """
    reason = lacks_compiler() if checkpoint.dynamics.position_embedding.device.type == "cpu" else ""
    if "compiled" in checkpoint.provenance:
        reason = "it is compiled already; use it as it is"
    if reason:
        raise InvalidArgument(f"checkpoint {checkpoint.name!r} cannot be compiled: {reason}.")
    dynamics, tokenizer = compiled(checkpoint.dynamics), compiled(checkpoint.tokenizer)
    assert isinstance(dynamics, type(checkpoint.dynamics)) and isinstance(tokenizer, type(checkpoint.tokenizer))
    return dataclasses.replace(
        checkpoint, dynamics=dynamics, tokenizer=tokenizer, provenance={**checkpoint.provenance, "compiled": True}
    )
