"""Steps of the published models by the kernels of :mod:`hma_gym.nn.fused`; see :meth:`PublishedModel.fuse_step`.

Shape legend: as :mod:`hma_gym.dynamics.published`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hma_gym.dynamics.heads import Draw
from hma_gym.dynamics.masking import masked_after
from hma_gym.errors import InvalidArgument
from hma_gym.nn.fused import Affine, BlockWeights, Launcher, extend, modulated
from hma_gym.nn.transformer import Cache, PublishedBlock

if TYPE_CHECKING:
    from hma_gym.dynamics.published import PublishedModel


class FusedStep:
    """What a published model does in a step, by fused kernels.

    Args:
        model: whose weights are used, where they are now.
        early: as for :class:`hma_gym.nn.fused.Launcher`.

    Raises:
        MissingExtra: no Triton here.
        InvalidArgument: sampling that these kernels do not do, or a device that does not run them.
    """

    def __init__(self, model: PublishedModel, early: bool) -> None:
        config, head = model.config, model.head
        sizes = set(head.config.vocabulary)
        if config.temperature or head.config.order != "random" or len(sizes) > 1 or head.config.patch > 1:
            raise InvalidArgument(
                "fused steps of a published model take the likeliest tokens of factors of one size, in a random order, "
                f"got temperature={config.temperature}, order={head.config.order!r}, "
                f"vocabulary={head.config.vocabulary}, patch={head.config.patch}; do not fuse it."
            )
        self._model = model
        self._launcher = Launcher(model.position_embedding.device, early)
        self._tables_VFD = torch.stack([weight.detach() for weight in head.current_in.tables.parameters()])
        blocks = [block for block in model.trunk.blocks if isinstance(block, PublishedBlock)]
        self._blocks, self._modulated = [BlockWeights.of(block) for block in blocks], modulated(blocks)
        self._logits_out = Affine.of(head.logits_out)

    def embed(self, tokens_BTS: Tensor, masked_BTN: Tensor, action_BTD: Tensor, first_B: Tensor | None) -> Tensor:
        """As :meth:`PublishedModel._embed`."""
        model = self._model
        if first_B is None:
            first_B = torch.zeros(len(tokens_BTS), dtype=torch.int64, device=tokens_BTS.device)
        mask_D, position_WMD = model.head.mask_embedding, model.position_embedding
        tables = self._tables_VFD
        return self._launcher.embed(tokens_BTS, masked_BTN, tables, mask_D, action_BTD, position_WMD, first_B)

    def told(self, action_BTA: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`PublishedModel._told_steps`: (B, T, D), and layers with the action in their weights, made once for
        all passes of a frame, (B, T, L, 1, X)."""
        embedded, modulation_BTLMD = self._model._told(action_BTA)
        return embedded, self._launcher.modulate(self._modulated, modulation_BTLMD)

    def extend(
        self, x_BTND: Tensor, told_BTL1X: Tensor, cache: Cache, commit: int, in_place: bool = False
    ) -> tuple[Tensor, Cache]:
        """As :meth:`hma_gym.nn.transformer.SpaceTimeTransformer.extend`, of what was :meth:`told`."""
        return extend(self._launcher, self._blocks, self._modulated, x_BTND, told_BTL1X, cache, commit, in_place)

    def filled(
        self,
        features_BND: Tensor,
        before_BS: Tensor,
        now: tuple[Tensor, Tensor],
        draw: tuple[Tensor, Tensor],
        index: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As :meth:`PublishedModel._filled`."""
        model = self._model
        logits = self._launcher.linear(self._logits_out, features_BND.contiguous()[:, None])[:, 0]
        left = masked_after(index, model.config.decode_steps, model.head.positions)
        split = logits.unflatten(-1, self._tables_VFD.shape[:2])
        tokens, masked = self._launcher.unmask(split, *now, *draw, Draw(*draw, index).order().stream, left)
        return tokens, masked, None if index else logits
