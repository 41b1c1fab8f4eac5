"""Counter-based random numbers: as random as they must be, and a function of their coordinates alone."""

from __future__ import annotations

import math

import torch

from hma_gym.nn import noise


def _rows(count: int, seed: int = 0, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(count) + seed, torch.full((count,), step)


def _chi_square(u: torch.Tensor, bins: int) -> float:
    """Normalised: standard normal for uniform numbers."""
    counts = torch.histc(u.flatten(), bins, 0.0, 1.0)
    wanted = u.numel() / bins
    statistic = float(((counts - wanted).square() / wanted).sum())
    return (statistic - (bins - 1)) / math.sqrt(2 * (bins - 1))


def test_uniform_along_every_coordinate() -> None:
    steps = torch.arange(20_000)
    zero = torch.zeros_like(steps)
    for name, u in {
        "index": noise.uniform(zero[:1] + 7, zero[:1] + 3, 1, (20_000,)),
        "step": noise.uniform(zero + 7, steps, 1, (1,)),
        "seed": noise.uniform(steps, zero + 3, 1, (1,)),
        "stream": torch.cat([noise.uniform(zero[:20], steps[:20], s, (50,)) for s in range(20)]),
    }.items():
        assert abs(_chi_square(u, 50)) < 4, name
        assert 0 < float(u.min()) and float(u.max()) < 1


def test_normal_moments_and_tails() -> None:
    x = noise.normal(*_rows(100), 0, (2000,)).double()
    assert abs(float(x.mean())) < 0.01 and abs(float(x.var()) - 1) < 0.02
    assert abs(float((x**4).mean()) - 3) < 0.1
    assert abs(float((x.abs() > 1.96).double().mean()) - 0.05) < 0.002
    assert x.isfinite().all()


def test_gumbel_argmax_is_a_categorical_sample() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5])
    choice = (logits + noise.gumbel(*_rows(20_000), 0, (4,))).argmax(dim=-1)
    share = torch.bincount(choice, minlength=4) / 20_000
    torch.testing.assert_close(share, logits.softmax(dim=0), rtol=0, atol=0.012)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    seed, step = torch.tensor([5, 9, 5]), torch.tensor([0, 4, 7])
    together = noise.normal(seed, step, 2, (3, 4))
    for row in range(3):
        assert torch.equal(noise.normal(seed[row : row + 1], step[row : row + 1], 2, (3, 4))[0], together[row])
    assert torch.equal(noise.normal(seed, step, 2, (3, 4)), together)  # nothing was remembered


def test_every_coordinate_matters_and_neighbours_are_not_correlated() -> None:
    def draw(seed: int = 3, step: int = 4, stream: int = 5) -> torch.Tensor:
        return noise.normal(torch.tensor([seed]), torch.tensor([step]), stream, (4000,))[0]

    one = draw()
    for other in (draw(seed=4), draw(step=5), draw(stream=6), draw(seed=4, step=3), draw(seed=-3)):
        assert not (one == other).any(dim=0).all()
        assert abs(float(torch.corrcoef(torch.stack((one, other)))[0, 1])) < 0.06
    assert abs(float(torch.corrcoef(torch.stack((one[1:], one[:-1])))[0, 1])) < 0.06


def test_known_values() -> None:
    """The numbers are part of every recorded rollout: a change here breaks "same seed, same frames"."""
    u = noise.uniform(torch.tensor([0, 123]), torch.tensor([0, 45]), 6, (2,))
    assert u.shape == (2, 2) and u.dtype == torch.float32
    known = torch.tensor([[0.06046789884567261, 0.33913105726242065], [0.7288534045219421, 0.45642250776290894]])
    assert torch.equal(u, known)
