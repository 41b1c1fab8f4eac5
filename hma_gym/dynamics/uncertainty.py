"""How sure a rollout may be of its present frame: calibrated on validation episodes against the true error.

Soft tokens at temperature 0 have no entropy, and one sample has nobody to disagree with. What is left to read are the
trunk's own features and how long has been dreamt. Two things are read off them:

- the expected error: a ridge regression of the log of the frame's token error, turned into the probability that this
  error is large (:attr:`UncertaintyConfig.large`) by logistic calibration on episodes that the regression had not seen;
- strangeness: how far the features lie outside those of the validation episodes (whitened distance), for a regression
  knows nothing of what it never saw.

The score is the probability that one of both says so: 0 sure, 1 lost.

Shape legend: B rows, F features of the trunk, D = F + 1 inputs (with the log of the number of dreamt steps), W
directions of the whitened features, E episodes, T steps, R = E x T frames.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hma_gym.errors import CheckpointError, InvalidArgument

_STEEPNESS = 4.0
"""Strangeness is 1 - exp(-4 x excess), the excess over the largest distance of validation frames, relative to it."""


@dataclass(frozen=True)
class UncertaintyConfig:
    """Shape and calibration.

    Attributes:
        features: F.
        directions: W.
        large: token error from which a frame counts as wrong (root mean square; with discrete tokens the share of wrong
            ones).
        slope, offset: of the logistic function of the expected log error.
        known: largest whitened distance among validation frames.
        auroc: how well the score tells frames of large error from others, on validation episodes that it was not fitted
            to.
        episodes, steps: what it was fitted to.
    """

    features: int
    directions: int
    large: float
    slope: float
    offset: float
    known: float
    auroc: float
    episodes: int
    steps: int

    def __post_init__(self) -> None:
        if min(self.features, self.directions) < 1 or not self.large > 0 or not self.known > 0:
            raise InvalidArgument(
                "uncertainty needs features and directions of at least 1 and large and known above 0, got "
                f"features={self.features}, directions={self.directions}, large={self.large}, known={self.known}."
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict, read back by :meth:`from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> UncertaintyConfig:
        """The inverse of :meth:`to_dict`; unknown or missing keys raise :class:`CheckpointError`."""
        known = {f.name for f in dataclasses.fields(cls)}
        if set(fields) != known:
            raise CheckpointError(
                f"uncertainty must have exactly the keys {sorted(known)}, got {sorted(fields)}; calibrate the "
                "checkpoint again: hma-gym calibrate."
            )
        return cls(**fields)


class Uncertainty(nn.Module):
    """A calibrated score; made by :func:`fit_uncertainty`, kept in a checkpoint."""

    mean_D: Tensor
    std_D: Tensor
    weight_D: Tensor
    centre_F: Tensor
    whitening_FW: Tensor

    def __init__(self, config: UncertaintyConfig) -> None:
        super().__init__()
        self.config = config
        inputs = config.features + 1
        for name in ("mean_D", "weight_D"):
            self.register_buffer(name, torch.zeros(inputs))
        self.register_buffer("std_D", torch.ones(inputs))
        self.register_buffer("centre_F", torch.zeros(config.features))
        self.register_buffer("whitening_FW", torch.zeros(config.features, config.directions))

    def expected(self, features_BF: Tensor, dreamt_B: Tensor) -> Tensor:
        """The log of the expected error, (B,), up to a constant."""
        return ((_inputs(features_BF, dreamt_B) - self.mean_D) / self.std_D) @ self.weight_D

    def distance(self, features_BF: Tensor) -> Tensor:
        """Whitened distance from the validation frames' centre, (B,); about 1 among them."""
        return ((features_BF.float() - self.centre_F) @ self.whitening_FW).square().mean(dim=1).sqrt()

    def forward(self, features_BF: Tensor, dreamt_B: Tensor) -> Tensor:
        """The score, (B,) in [0, 1].

        Args:
            features_BF: :attr:`StepOutput.features_BD <hma_gym.dynamics.rollout.StepOutput>` of the step.
            dreamt_B: int64, steps since the last real frame, this one included.
        """
        wrong_B = torch.sigmoid(self.config.slope * self.expected(features_BF, dreamt_B) + self.config.offset)
        excess_B = (self.distance(features_BF) / self.config.known - 1).clamp_min(0)
        return 1 - (1 - wrong_B) * torch.exp(-_STEEPNESS * excess_B)


def _inputs(features_BF: Tensor, dreamt_B: Tensor) -> Tensor:
    return torch.cat((features_BF.float(), dreamt_B.clamp_min(1).float().log()[:, None]), dim=1)


def token_error(tokens: Tensor, true: Tensor) -> Tensor:
    """How wrong frames are, (B,): root mean square of soft tokens' errors, share of wrong discrete ones."""
    if tokens.is_floating_point():
        return (tokens.float() - true.float()).square().flatten(1).mean(dim=1).sqrt()
    return (tokens != true).flatten(1).float().mean(dim=1)


def auroc(score: Tensor, large: Tensor) -> float:
    """Probability that a frame of large error has the higher score; 0.5 where there is only one kind.

    Args:
        score, large: (R,) float and bool.
    """
    positive, negative = int(large.sum()), int((~large).sum())
    if not positive or not negative:
        return 0.5
    values, index = score.double().unique(return_inverse=True)
    counts = torch.bincount(index, minlength=len(values)).double()
    rank = (counts.cumsum(0) - (counts - 1) / 2)[index]
    return float((rank[large].sum() - positive * (positive + 1) / 2) / (positive * negative))


def fit_uncertainty(
    features_ETF: Tensor, dreamt_ET: Tensor, error_ET: Tensor, *, large_share: float = 0.25, folds: int = 4
) -> Uncertainty:
    """Fit and calibrate on rollouts of E episodes.

    The strength of the ridge is chosen, the probability calibrated, and the AUROC measured, by cross-validation over
    whole episodes.

    Args:
        features_ETF, dreamt_ET: see :meth:`Uncertainty.forward`.
        error_ET: true error of each frame, above 0 (see :func:`token_error`).
        large_share: share of the frames whose error counts as large.
        folds: of the cross-validation.

    Raises:
        InvalidArgument: fewer than two episodes for each fold, or errors that are not finite.
    """
    E, T, F = features_ETF.shape
    if E < 2 * folds or not bool(torch.isfinite(error_ET).all()) or not 0 < large_share < 1:
        raise InvalidArgument(
            f"calibration needs at least {2 * folds} episodes, finite errors and large_share in (0, 1), got {E} "
            f"episodes and large_share={large_share}; take more validation episodes."
        )
    inputs_ETD = _inputs(features_ETF.flatten(0, 1), dreamt_ET.flatten()).unflatten(0, (E, T)).double()
    target_ET = error_ET.double().clamp_min(1e-6).log()
    large = float(torch.quantile(error_ET.double().flatten(), 1 - large_share))
    is_large_ET = error_ET > large
    fold_E = torch.arange(E) % folds
    best: tuple[float, float, Tensor] | None = None
    for strength in (30.0, 300.0, 3000.0):
        guessed_ET = torch.zeros_like(target_ET)
        for fold in range(folds):
            seen = fold_E != fold
            mean, std, weight = _ridge(inputs_ETD[seen].flatten(0, 1), target_ET[seen].flatten(), strength)
            guessed_ET[~seen] = ((inputs_ETD[~seen] - mean) / std) @ weight
        value = auroc(guessed_ET.flatten(), is_large_ET.flatten())
        if best is None or value > best[0]:
            best = value, strength, guessed_ET
    assert best is not None
    slope, offset = _logistic(best[2].flatten(), is_large_ET.flatten())
    centre, whitening = _whitening(inputs_ETD[..., :F].flatten(0, 1))
    distance = ((inputs_ETD[..., :F] - centre) @ whitening).square().mean(dim=-1).sqrt()
    config = UncertaintyConfig(
        F, whitening.shape[1], large, slope, offset, float(distance.max()), best[0], E, int(dreamt_ET.max())
    )
    score = Uncertainty(config)
    fitted = _ridge(inputs_ETD.flatten(0, 1), target_ET.flatten(), best[1])
    for name, found in zip(("mean_D", "std_D", "weight_D"), fitted, strict=True):
        score.get_buffer(name).copy_(found)
    score.centre_F.copy_(centre)
    score.whitening_FW.copy_(whitening)
    return score.eval()


def _ridge(inputs_RD: Tensor, target_R: Tensor, strength: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and deviation of the inputs, and the weights of the standardised ones; the constant is left out."""
    mean, std = inputs_RD.mean(dim=0), inputs_RD.std(dim=0).clamp_min(1e-6)
    z = (inputs_RD - mean) / std
    gram = z.T @ z + strength * torch.eye(z.shape[1], dtype=z.dtype)
    return mean, std, torch.linalg.solve(gram, z.T @ (target_R - target_R.mean()))


def _logistic(value_R: Tensor, label_R: Tensor) -> tuple[float, float]:
    """Slope and offset of the logistic regression of a label on one value, by Newton's method with a light ridge."""
    design = torch.stack((value_R, torch.ones_like(value_R)), dim=1)
    weight = design.new_zeros(2)
    for _ in range(50):
        p = torch.sigmoid(design @ weight)
        gradient = design.T @ (p - label_R.double()) + 1e-3 * weight
        curvature = (design * (p * (1 - p))[:, None]).T @ design + 1e-3 * torch.eye(2, dtype=design.dtype)
        weight = weight - torch.linalg.solve(curvature, gradient)
    return float(weight[0]), float(weight[1])


def _whitening(features_RF: Tensor, kept: float = 0.99) -> tuple[Tensor, Tensor]:
    """Centre and directions of the features, scaled to unit variance; the faintest percent of the variance is left."""
    centre = features_RF.mean(dim=0)
    covariance = (features_RF - centre).T @ (features_RF - centre) / len(features_RF)
    variance, directions = torch.linalg.eigh(covariance)
    variance, directions = variance.flip(0), directions.flip(1)
    share = variance.clamp_min(0).cumsum(0) / variance.clamp_min(0).sum()
    count = max(1, int((share < kept).sum()) + 1)
    count = min(count, int((variance > 1e-12).sum()))
    return centre, directions[:, :count] / variance[:count].sqrt()
