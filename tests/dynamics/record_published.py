"""Where ``published.safetensors`` comes from: the reference implementation, run at a reduced size.

    python tests/dynamics/record_published.py PATH_TO_HMA

``PATH_TO_HMA`` is a checkout of github.com/liruiw/HMA (recorded at commit e3c89088fa82). The file holds the state dict
of its model with random weights (seed 0), random inputs, and the logits that it gives for them; its metadata holds the
configuration. No code of it is kept.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from hma_gym.benchmarks._reference import PUBLISHED_FIELDS, load_reference, random_reference

FIXTURE = Path(__file__).with_name("published.safetensors")
FIELDS = {
    "num_layers": 2,
    "num_heads": 2,
    "d_model": 16,
    "T": 4,
    "S": 16,
    "image_vocab_size": 64,
    "action_token_size": 4,
}


def main(path: str) -> None:
    """Write the fixture."""
    model = random_reference(load_reference(path, "plain"), FIELDS, "arm", 3, seed=0, noise=0.15)
    generator = torch.Generator().manual_seed(1)
    tokens_BTS = torch.randint(64, (2, 4, 16), generator=generator)
    masked_BTS = torch.zeros(2, 4, 16, dtype=torch.bool)
    masked_BTS[:, -1] = torch.rand(2, 16, generator=generator) < 0.7
    actions_BTA = torch.randn(2, 4, 3, generator=generator)
    hidden_BTHW = torch.where(masked_BTS, 64, tokens_BTS).view(2, 4, 4, 4)
    with torch.no_grad():
        logits_BCTHW, _ = model.compute_logits(hidden_BTHW, action_ids=actions_BTA, domain=["arm"])
    tensors = {f"weights.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {"tokens": tokens_BTS, "masked": masked_BTS, "actions": actions_BTA}
    tensors["logits"] = logits_BCTHW.permute(0, 2, 3, 4, 1).flatten(2, 3)
    config = json.dumps({**PUBLISHED_FIELDS, **FIELDS})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, FIXTURE, {"config": config})


if __name__ == "__main__":
    main(sys.argv[1])
