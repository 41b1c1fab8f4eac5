"""Models by name: our own sizes, and the geometry of the paper's (HMA, arXiv 2502.04296, Table 2 and Appendix).

Ours name a trunk only, so that they fit either kind of token; the paper's are whole models. Parameters in millions,
with one domain of 7 action dims and no state, and the paper's figures:

    name       tokens              shared   domain   together   paper
    base       256, 2 x 512 codes  37.6     6.4      44.0       44 (35.2 + 8.5 a domain)
    xl         256, 2 x 512 codes  578.1    101.8    679.9      679
    mar-base   256 x 16 numbers    62.3     31.9     94.3       96
    mar-xl     256 x 16 numbers    601.4    129.2    730.5      741

The projection after each modulation (2.1 M in base) belongs to a domain in the paper and is shared by all of them here.
Both diffusion heads of the paper's MAR models, for tokens and for actions, have 4 layers of width 1024;
``dataclasses.replace`` gives a model a smaller head, or the few-step one.
"""

from __future__ import annotations

from hma_gym.dynamics.mar import DiffusionHeadConfig, SoftHeadConfig
from hma_gym.dynamics.maskgit import MaskGITHeadConfig
from hma_gym.dynamics.model import DynamicsConfig
from hma_gym.errors import UnknownName
from hma_gym.nn.transformer import TrunkConfig

#: Trunks for 64 x 64 frames. "shallow" is the shipped one, enough where a body draws; "toy" is for tests.
TRUNKS: dict[str, TrunkConfig] = {
    "toy": TrunkConfig(layers=2, width=64, heads=4, window=4),
    "small": TrunkConfig(layers=6, width=192, heads=6, window=8),
    "lift": TrunkConfig(layers=6, width=256, heads=8, window=8),
    "shallow": TrunkConfig(layers=2, width=256, heads=8, window=8),
}


def _paper(width: int, head: MaskGITHeadConfig | SoftHeadConfig) -> DynamicsConfig:
    """32 layers, 8 heads, 12 frames, 64 action tokens; the same learning rates at every width (muP)."""
    trunk = TrunkConfig(layers=32, width=width, heads=8, window=12, modulation="residual", positions="learned")
    return DynamicsConfig(trunk=trunk, head=head, conditioning="in_place", action_tokens=64, decode_steps=2)


_DISCRETE = MaskGITHeadConfig(grid=(16, 16), vocabulary=(512, 512))
_SOFT = DiffusionHeadConfig(
    grid=(32, 32), channels=4, flow_width=1024, flow_layers=4, flow_weight=1.0, predicts="latent", action_layers=4
)

#: The paper's models: 256 tokens a frame, each a pair of 512 codes or 2 x 2 latents of 4 channels.
MODELS: dict[str, DynamicsConfig] = {
    "base": _paper(256, _DISCRETE),
    "xl": _paper(1024, _DISCRETE),
    "mar-base": _paper(256, _SOFT),
    "mar-xl": _paper(1024, _SOFT),
}


def named_trunk(name: str) -> TrunkConfig:
    """A trunk of :data:`TRUNKS`; :class:`UnknownName` otherwise."""
    if name not in TRUNKS:
        raise UnknownName("size", name, list(TRUNKS))
    return TRUNKS[name]


def named_model(name: str) -> DynamicsConfig:
    """A model of :data:`MODELS`; :class:`UnknownName` otherwise."""
    if name not in MODELS:
        raise UnknownName("model", name, list(MODELS))
    return MODELS[name]
