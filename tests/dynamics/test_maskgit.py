"""The discrete head: factors, patches, a temperature that acts, orders of unmasking, and its loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hma_gym.dynamics.heads import Draw, Scene
from hma_gym.dynamics.maskgit import MaskGITHead, MaskGITHeadConfig
from hma_gym.errors import InvalidArgument
from hma_gym.nn.vocabulary import join_factors, split_factors

VOCABULARY = (4, 3)


def _head(patch: int = 1, logits: Sequence[float] | None = None, **fields: object) -> MaskGITHead:
    torch.manual_seed(0)
    config = MaskGITHeadConfig((4, 4), VOCABULARY, patch, **fields)  # type: ignore[arg-type]
    head = MaskGITHead(config, width=8).eval().requires_grad_(False)
    if logits is not None:  # the same for every token, whatever the features are
        head.logits_out.bias.copy_(torch.tensor(logits * patch**2))
    else:
        torch.nn.init.normal_(head.logits_out.weight)
    return head


def _draw(rows: int, step: int = 0, stream: int = 0) -> Draw:
    return Draw(torch.arange(rows), torch.full((rows,), step), stream)


LOGITS = [0.0, 1.0, 2.0, -1.0, 0.5, 0.0, -0.5]


@pytest.mark.parametrize("patch", [1, 2])
def test_temperature_zero_is_greedy_and_small_ones_come_near(patch: int) -> None:
    head = _head(patch, LOGITS)
    features, previous = torch.zeros(200, head.positions, 8), torch.zeros(200, 16, dtype=torch.int64)
    best = int(join_factors(torch.tensor([2, 0]), VOCABULARY))
    tokens, _ = head.sample(features, Scene(previous, None), _draw(200), 0.0)
    assert (tokens == best).all()
    tokens, _ = head.sample(features, Scene(previous, None), _draw(200), 0.05)
    assert (tokens == best).float().mean() > 0.99


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 100.0])
def test_frequencies_are_the_softmax_at_that_temperature(patch: int, temperature: float) -> None:
    head = _head(patch, LOGITS)
    rows = 600
    tokens, _ = head.sample(
        torch.zeros(rows, head.positions, 8), torch.zeros(rows, 16, dtype=torch.int64), _draw(rows), temperature
    )
    digits = split_factors(tokens, VOCABULARY)
    for factor, logits in enumerate(torch.tensor(LOGITS).split(VOCABULARY)):
        wanted = (logits / temperature).softmax(dim=0) * digits[..., factor].numel()
        counts = torch.bincount(digits[..., factor].flatten(), minlength=len(logits))
        chi_square = ((counts - wanted).square() / wanted).sum()
        assert chi_square < 18, (factor, counts, wanted)  # p < 0.0005 with 3 degrees of freedom
    # factors are independent, and so are the tokens of a frame
    joint = torch.stack((digits[..., 0].flatten(), digits[..., 1].flatten())).float()
    assert abs(torch.corrcoef(joint)[0, 1]) < 0.05
    assert abs(torch.corrcoef(digits[:, :2, 0].T.float())[0, 1]) < 0.15


@pytest.mark.parametrize("patch", [1, 2])
def test_patches_put_every_token_back_in_its_place(patch: int) -> None:
    head = _head(patch)
    tokens = torch.arange(16).expand(2, 3, 16)
    assert torch.equal(head._unpatch(head._patch(tokens)), tokens)
    if patch == 2:  # the first trunk position holds the top left square of the grid
        assert head._patch(tokens)[0, 0, 0].tolist() == [0, 1, 4, 5]
    masked = torch.zeros(2, head.positions, dtype=torch.bool)
    masked[:, 0] = True
    merged = head.merge(tokens[:, 0], tokens[:, 0] + 100, masked)
    changed = [i for i in range(16) if merged[0, i] >= 100]
    assert changed == ([0, 1, 4, 5] if patch == 2 else [0])


def test_embedding_sums_factors_and_hides_masked_tokens() -> None:
    head = _head()
    tables = head.current_in.tables
    token = torch.full((1, 1, 16), int(join_factors(torch.tensor([3, 1]), VOCABULARY)))
    masked = torch.zeros(1, 1, 16, dtype=torch.bool)
    masked[..., 5] = True
    embedded = head.embed_current(token, masked)
    torch.testing.assert_close(embedded[0, 0, 0], tables[0].weight[3] + tables[1].weight[1])
    assert torch.equal(embedded[0, 0, 5], head.mask_embedding)


def test_random_order_ignores_the_logits_and_confidence_follows_them() -> None:
    rows = 50
    features = torch.randn(rows, 16, 8, generator=torch.Generator().manual_seed(0))
    previous = torch.zeros(rows, 16, dtype=torch.int64)
    sure = _head(order="confidence")
    tokens, order = sure.sample(features, Scene(previous, None), _draw(rows), 0.0)
    digits = split_factors(tokens[..., None], VOCABULARY)
    wanted = torch.zeros(rows, 16)
    for i, logits in enumerate(sure._logits(features)):
        wanted += logits.log_softmax(-1).gather(-1, digits[..., i : i + 1])[..., 0].sum(-1)
    torch.testing.assert_close(order, wanted)
    _, noisy = sure.sample(features, Scene(previous, None), _draw(rows), 1.0)
    assert not torch.equal(noisy.argsort(), order.argsort())
    at_random = _head(order="random")
    tokens_random, first = at_random.sample(features, Scene(previous, None), _draw(rows), 0.0)
    assert torch.equal(tokens_random, tokens)
    assert abs(torch.corrcoef(torch.stack((first.flatten(), wanted.flatten())))[0, 1]) < 0.1
    _, second = at_random.sample(features, Scene(previous, None), _draw(rows, stream=1), 0.0)
    assert not torch.equal(first, second)  # each unmasking step draws anew


@pytest.mark.parametrize("patch", [1, 2])
def test_loss_is_the_mean_cross_entropy_of_masked_tokens(patch: int) -> None:
    head = _head(patch)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, head.positions, 8, generator=generator)
    tokens = torch.randint(12, (2, 3, 16), generator=generator)
    masked = torch.rand(2, 3, head.positions, generator=generator) < 0.5
    loss, metrics = head.loss(features, tokens, Scene(tokens, None), masked, generator)
    target, total, count = head._patch(tokens), 0.0, 0
    for b, t, n in masked.nonzero().tolist():
        logits = head.logits_out(features[b, t, n]).view(patch**2, sum(VOCABULARY)).split(VOCABULARY, dim=-1)
        for p in range(patch**2):
            digits = split_factors(target[b, t, n, p], VOCABULARY)
            total += sum(float(F.cross_entropy(logits[i][p], digits[i])) for i in range(2))
            count += 1
    assert float(loss) == pytest.approx(total / count, rel=1e-5)
    assert float(metrics["changed_share"]) == 0.0


def test_corruption_stays_within_its_bound_and_in_the_vocabulary() -> None:
    head = _head(corrupt_max=0.4)
    tokens = torch.zeros(300, 2, 16, dtype=torch.int64)
    hit = head.corrupt(tokens, torch.Generator().manual_seed(0))
    share = (hit > 0).float().mean(dim=(1, 2)) * 12 / 11  # a random token may be the true one
    assert abs(float(share.mean()) - 0.2) < 0.02 and float(share.max()) < 0.8
    assert int(hit.max()) == 11 and int(hit.min()) == 0
    spared = _head(corrupt_max=0.0).corrupt(tokens, torch.Generator().manual_seed(0))
    assert torch.equal(spared, tokens)


def test_a_row_is_the_same_whatever_its_neighbours() -> None:
    head = _head()
    features = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(0))
    previous = torch.zeros(4, 16, dtype=torch.int64)
    tokens, order = head.sample(features, Scene(previous, None), _draw(4), 1.0)

    def row(x: Tensor) -> Tensor:
        return x[2:3]

    alone = Draw(torch.tensor([2]), torch.tensor([0]), 0)
    tokens_alone, order_alone = head.sample(row(features), Scene(row(previous), None), alone, 1.0)
    assert torch.equal(tokens_alone, row(tokens)) and torch.equal(order_alone, row(order))


def test_wrong_geometry_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="patch must divide the grid"):
        MaskGITHeadConfig((5, 4), VOCABULARY, patch=2)
    with pytest.raises(InvalidArgument, match="order must be"):
        dataclasses.replace(MaskGITHeadConfig(), order="greedy")  # type: ignore[arg-type]
