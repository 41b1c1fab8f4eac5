"""Published autoencoders behind our protocol, on small ones with random weights: no hub is asked for anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_dynamics import domain, fit

from hma_gym.dynamics.body import BodyConfig
from hma_gym.dynamics.checkpoint import Checkpoint, StartBank, load_checkpoint, save_checkpoint, start_bank
from hma_gym.dynamics.mar import FlowHeadConfig
from hma_gym.dynamics.model import Dynamics, DynamicsConfig
from hma_gym.errors import CheckpointError, InvalidArgument, InvalidImage, MissingExtra, UnknownName
from hma_gym.nn.transformer import TrunkConfig
from hma_gym.robomimic_compat import make_torchvision_importable
from hma_gym.tokenizers import build_tokenizer
from hma_gym.tokenizers.files import load_tokenizer, save_tokenizer
from hma_gym.tokenizers.published import AUTOENCODERS, AutoencoderConfig, AutoencoderTokenizer, load_autoencoder

diffusers = pytest.importorskip("diffusers")

SIZE = (16, 16)
DOWN, UP = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
SETTINGS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {
        "down_block_types": DOWN,
        "up_block_types": UP,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
    },
    "AutoencoderKLTemporalDecoder": {"down_block_types": DOWN, "block_out_channels": (32, 32), "scaling_factor": 0.5},
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    },
    "AutoencoderDC": {
        "latent_channels": 4,
        "encoder_block_types": "ResBlock",
        "decoder_block_types": "ResBlock",
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "encoder_qkv_multiscales": ((), ()),
        "decoder_qkv_multiscales": ((), ()),
    },
}


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    return torch.randint(256, (6, *SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def published(name: str, folder: Path) -> tuple[Any, Path]:
    """A small model of the library with random weights, and the folder that it was saved to."""
    make_torchvision_importable()  # as the package does before it asks the library for a class
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**SETTINGS[name]).eval().requires_grad_(False)
    model.save_pretrained(folder / "vae")
    return model, folder


@pytest.mark.parametrize("name", sorted(AUTOENCODERS))
def test_it_gives_what_the_library_gives(name: str, frames: torch.Tensor, tmp_path: Path) -> None:
    model, folder = published(name, tmp_path / "pipeline")
    tokenizer = load_autoencoder(folder, SIZE, subfolder="vae")
    grid = (8, 8) if name != "AutoencoderDC" else tokenizer.grid
    assert (tokenizer.kind, tokenizer.grid, tokenizer.channels, tokenizer.vocabulary) == ("soft", grid, 4, ())
    images = frames.permute(0, 3, 1, 2) / 127.5 - 1
    encoded = model.encode(images)[0]
    latents = encoded if isinstance(encoded, torch.Tensor) else encoded.mode()
    scale, shift = SETTINGS[name].get("scaling_factor", 1.0), SETTINGS[name].get("shift_factor", 0.0)
    tokens = tokenizer.encode(frames)
    assert tokens.shape == (6, grid[0] * grid[1], 4)
    wanted = (latents - shift) * model.config.get("scaling_factor", scale)
    torch.testing.assert_close(tokens.transpose(1, 2).unflatten(2, grid), wanted, rtol=1e-4, atol=1e-5)
    decoded = model.decode(latents, **AUTOENCODERS[name]).sample
    shown = ((decoded + 1) * 127.5).clamp(0, 255).round().permute(0, 2, 3, 1)
    assert int((tokenizer.decode(tokens).int() - shown.int()).abs().max()) <= 1
    # statistics, and the contract's leading dims and independence of the batch
    tokenizer.set_statistics(frames)
    tokens = tokenizer.encode(frames)
    torch.testing.assert_close(tokens.mean((0, 1)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(tokens.std((0, 1)), torch.ones(4), atol=1e-2, rtol=0)
    nested = tokenizer.encode(frames.view(2, 3, *frames.shape[1:]))
    torch.testing.assert_close(nested.flatten(0, 1), tokens, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tokenizer.encode(frames[:1])[0], tokens[0], rtol=1e-4, atol=1e-4)
    assert tokenizer.decode(nested).shape == (2, 3, *SIZE, 3)
    # our own folder: the source is needed no more, and no path of this machine is in it
    saved = save_tokenizer(tokenizer, tmp_path / "ours")
    shutil.rmtree(folder)
    assert str(tmp_path) not in (saved / "config.json").read_text()
    loaded = load_tokenizer(saved, expect="soft")
    assert isinstance(loaded, AutoencoderTokenizer) and loaded.config == tokenizer.config
    assert torch.equal(loaded.encode(frames), tokens)


def test_a_checkpoint_of_it_trains_saves_loads_and_rolls_out(frames: torch.Tensor, tmp_path: Path) -> None:
    tokenizer = load_autoencoder(published("AutoencoderKL", tmp_path)[1], SIZE, subfolder="vae")
    tokenizer.set_statistics(frames)
    head = FlowHeadConfig(tokenizer.grid, tokenizer.channels, patch=2, flow_width=16, flow_layers=1)
    config = DynamicsConfig(TrunkConfig(1, 32, 2, window=4), head, BodyConfig(look_width=16, look_layers=1))
    dynamics = Dynamics(config, [domain()])
    batch = {
        "tokens": tokenizer.encode(frames).view(2, 3, 64, 4),
        "actions": torch.zeros(2, 2, 3),
        "agent_pos": torch.zeros(2, 3, 2),
    }
    losses = fit(dynamics, iter([batch] * 10), 10)
    assert losses[-1] < losses[0]
    starts: StartBank = start_bank(list(frames.numpy()), [torch.zeros(2).numpy()] * 6)
    checkpoint = Checkpoint("vae", "", tokenizer.requires_grad_(False), dynamics, None, starts)
    loaded = load_checkpoint(save_checkpoint(checkpoint, tmp_path / "saved", half=False))
    shown = []
    for made in (checkpoint, loaded):
        state = made.dynamics.start(made.tokenizer.encode(frames), torch.zeros(6, 2), torch.arange(6))
        _, out = made.dynamics.step(state, torch.zeros(6, 3))
        shown.append(made.tokenizer.decode(out.tokens))
    assert torch.equal(*shown) and shown[0].shape == frames.shape


def test_wrong_sources_sizes_and_settings_are_refused(
    frames: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _, folder = published("AutoencoderTiny", tmp_path / "a")
    with pytest.raises(CheckpointError, match="config.json of diffusers.*subfolder"):
        load_autoencoder(folder, SIZE)
    with pytest.raises(InvalidArgument, match=r"AutoencoderTiny.*\(17, 16\).*downsampling"):
        load_autoencoder(folder, (17, 16), "vae")
    with pytest.raises(InvalidImage, match=r"16, 16, 3"):
        load_autoencoder(folder, SIZE, "vae").encode(frames[:, :8])
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged or has no safetensors"):
        load_autoencoder(folder, SIZE, "vae")
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "AutoencoderOobleck"}))
    with pytest.raises(CheckpointError, match="AutoencoderOobleck; known to work are.*AutoencoderKL"):
        load_autoencoder(folder, SIZE, "vae")
    with pytest.raises(UnknownName, match="unknown autoencoder 'UNet'"):
        AutoencoderConfig(model="UNet")
    with pytest.raises(InvalidArgument, match="must take its settings"):
        AutoencoderTokenizer(AutoencoderConfig(SIZE, "AutoencoderKL", {"norm_num_groups": 7}))
    with pytest.raises(CheckpointError, match="'soft' tokens.*'vq' ones"):
        build_tokenizer(AutoencoderConfig(SIZE, "AutoencoderTiny", SETTINGS["AutoencoderTiny"]).to_dict(), expect="vq")


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtra, match=r"hma_gym\[diffusion\]"):
        AutoencoderTokenizer(AutoencoderConfig(SIZE))
