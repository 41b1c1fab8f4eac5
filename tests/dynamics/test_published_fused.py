"""Fused kernels give the frames that one operation after the other gives.

Without a GPU the kernels run in Triton's interpreter, which does their arithmetic with numpy; on one they are compiled.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from hma_gym.dynamics.published import PublishedGraphs, PublishedModel, PublishedState, read_published
from hma_gym.errors import InvalidArgument, MissingExtra
from hma_gym.nn import noise
from hma_gym.nn.precision import LowLinear, in_precision, tensor_float32

FIXTURE = Path(__file__).with_name("published.safetensors")
pytestmark = pytest.mark.triton

DEVICES = [pytest.param("cpu", marks=pytest.mark.interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def model() -> PublishedModel:
    with safe_open(FIXTURE, "pt") as file:
        weights = {n.removeprefix("weights."): file.get_tensor(n) for n in file.keys() if n.startswith("weights.")}
        return read_published(weights, json.loads(file.metadata()["config"]), "arm")


def _prompt(model: PublishedModel, rows: int, keep: int) -> tuple[PublishedState, Tensor]:
    """Rollouts at their second frame, and actions of a longer run."""
    generator = torch.Generator().manual_seed(2)
    device = model.position_embedding.device
    tokens = torch.randint(64, (rows, 2, 16), generator=generator).to(device)
    actions = torch.randn(rows, 8, 3, generator=generator).to(device)
    state = model.start(tokens[:, 0], 7 * torch.arange(rows) - 3, keep)
    return model.observe(state, actions[:, 0], tokens[:, 1]), actions


def _fused(model: PublishedModel, early: bool = False) -> PublishedModel:
    fused = copy.deepcopy(model)
    fused.fuse_step(early)
    return fused


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "keep", "in_place"), [(1, 1, True), (2, 3, False), (2, 2, True)])
def test_fused_frames_equal_plain_ones(
    model: PublishedModel, device: str, rows: int, keep: int, in_place: bool
) -> None:
    model = copy.deepcopy(model).to(device)
    fused = _fused(model)
    (plain, actions), (ours, _) = _prompt(model, rows, keep), _prompt(fused, rows, keep)
    with tensor_float32(False):
        for t in range(1, 5):  # the window of 4 frames fills, and is emptied
            before = ours
            plain, wanted = model.step(plain, actions[:, t])
            ours, first = fused.step(ours, actions[:, t], in_place=in_place)
            torch.testing.assert_close(first, wanted, rtol=0.0, atol=1e-4)
            assert torch.equal(ours.tokens_BWS, plain.tokens_BWS)
    if not in_place:  # what it was given is as it was
        _, again = fused.step(before, actions[:, 4])
        torch.testing.assert_close(again, first, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("width", [16, 48])
def test_any_width_and_number_of_heads_fits_the_tiles(model: PublishedModel, width: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = model.config
    trunk = dataclasses.replace(config.trunk, layers=1, width=width, heads=1, window=3)
    torch.manual_seed(0)
    odd = PublishedModel(dataclasses.replace(config, trunk=trunk, action_tokens=3, decode_steps=3)).eval()
    for parameter in odd.requires_grad_(False).parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    odd = odd.to(device)
    fused = _fused(odd)
    (plain, actions), (ours, _) = _prompt(odd, 1, 1), _prompt(fused, 1, 1)
    with tensor_float32(False):
        for t in range(1, 4):
            plain, wanted = odd.step(plain, actions[:, t])
            ours, first = fused.step(ours, actions[:, t])
            assert float((first - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
            assert torch.equal(ours.tokens_BWS, plain.tokens_BWS)


@pytest.mark.parametrize("device", DEVICES)
def test_products_in_a_lower_precision_stay_near(model: PublishedModel, device: str) -> None:
    low = in_precision(model, "bfloat16").to(device)
    if device == "cpu":  # the interpreter knows no bfloat16; float16 goes the same way
        for layer in low.modules():
            if isinstance(layer, LowLinear):
                nn.Module.half(layer)
    (plain, actions), (ours, _) = _prompt(model, 2, 2), _prompt(_fused(low), 2, 2)
    _, wanted = model.step(plain, actions[:, 1])
    _, first = _fused(low).step(ours, actions[:, 1].to(device))
    error = (first.cpu() - wanted).abs().max() / wanted.abs().max()
    assert first.dtype == torch.float32 and 0 < float(error) < (0.005 if device == "cpu" else 0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("early", [False, True])
def test_on_a_gpu_recorded_fused_frames_equal_plain_ones(model: PublishedModel, early: bool) -> None:
    model = copy.deepcopy(model).to("cuda")
    with tensor_float32(False):
        recorded = PublishedGraphs(_fused(model, early))
        (plain, actions), (ours, _) = _prompt(model, 2, 2), _prompt(model, 2, 2)
        for t in range(1, 7):
            plain, wanted = model.step(plain, actions[:, t])
            ours, first = recorded.step(ours, actions[:, t])
            torch.testing.assert_close(first, wanted, rtol=0.0, atol=1e-4)
            assert torch.equal(ours.tokens_BWS, plain.tokens_BWS)


@pytest.mark.parametrize("device", DEVICES)
def test_unmasking_takes_the_likeliest_tokens_in_the_order_of_the_noise(device: str) -> None:
    from hma_gym.nn.fused import Launcher

    B, N, V, F, left = 3, 21, 2, 5, 6
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(B, N, V, F, generator=generator)
    tokens = torch.randint(F**V, (B, N), generator=generator)
    masked = torch.rand(B, N, generator=generator) < 0.7
    seed, step = torch.tensor([-(2**63), 5, 2**63 - 1]), torch.tensor([0, 17, 100_000])
    given = (x.to(device) for x in (logits, tokens, masked, seed, step))
    new, hidden = (x.cpu() for x in Launcher(torch.device(device)).unmask(*given, 63, left))
    likeliest = logits.argmax(dim=-1)
    assert torch.equal(new, torch.where(masked, likeliest[..., 0] + F * likeliest[..., 1], tokens))
    order = noise.uniform(seed, step, 63, (N,)).masked_fill(~masked, 2.0)
    for b in range(B):
        first = order[b].argsort(descending=True, stable=True)[: N - left]
        shown = torch.zeros(N, dtype=torch.bool).index_fill(0, first, True)
        assert torch.equal(hidden[b], masked[b] & ~shown)


def test_what_has_no_kernels_is_refused(model: PublishedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    warm = PublishedModel(dataclasses.replace(model.config, temperature=1.0))
    with pytest.raises(InvalidArgument, match=r"got temperature=1\.0.*do not fuse it"):
        warm.fuse_step()
    if not torch.cuda.is_available():
        with pytest.raises(InvalidArgument, match="need compute capability 9.0.*got device 'cpu'"):
            model.fuse_step(early=True)
        monkeypatch.setattr("hma_gym.nn.kernels.INTERPRETED", False)
        with pytest.raises(InvalidArgument, match="need weights on a CUDA device, got 'cpu'"):
            model.fuse_step()
    monkeypatch.delitem(sys.modules, "hma_gym.nn.kernels")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingExtra, match=r"'triton' is needed for fused steps.*hma_gym\[fused\]"):
        model.fuse_step()
