"""Tiny MASt3R and DUSt3R networks with seeded weights, for tests that need no parity.

from tests.networks import checkpoint, tiny

network = build_network(tiny(), random_weights(tiny()))
model = Mast3rModel(checkpoint(tiny()), torch.device("cpu"))
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mast3r_sfm.models.mast3r.architecture import Architecture, DptWidths, Head
from mast3r_sfm.models.mast3r.checkpoint import Checkpoint
from mast3r_sfm.models.mast3r.network import Network, build_network


def tiny(head: Head = "catmlp+dpt", **changes: Any) -> Architecture:
    """Two blocks of encoder and four of decoder, of a few channels."""
    smallest = Architecture(
        encoder_width=32,
        encoder_depth=2,
        encoder_heads=2,
        decoder_width=24,
        decoder_depth=4,
        decoder_heads=3,
        head=head,
        descriptor_channels=8 if head == "catmlp+dpt" else 0,
        dpt=DptWidths(levels=(4, 6, 8, 12), fusion=16, last=8),
    )
    return replace(smallest, **changes)


@lru_cache
def random_weights(architecture: Architecture, seed: int = 0) -> dict[str, Tensor]:
    """A state dict whose activations neither vanish nor explode; nobody may write into it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        meta = Network(architecture).state_dict(keep_vars=True)
    made: dict[int, Tensor] = {}
    for name, tensor in meta.items():
        if id(tensor) in made:  # the second name of a tensor
            continue
        values = 2 * torch.rand(tensor.shape, generator=generator) - 1
        if tensor.ndim == 1:
            values *= 0.2
            values += "norm" in name and name.endswith("weight")
        else:
            values *= (3 / tensor[0].numel()) ** 0.5
            # Points at distances of about 1 to 10.
            values *= 2.0 if name.endswith(("dpt.head.4.weight", "downstream_head1.proj.weight")) else 1.0
        made[id(tensor)] = values
    return {name: made[id(tensor)] for name, tensor in meta.items()}


def checkpoint(architecture: Architecture | None = None, seed: int = 0) -> Checkpoint:
    """As if it had been read from a file."""
    architecture = architecture or tiny()
    return Checkpoint(architecture=architecture, tensors=random_weights(architecture, seed), sha256=f"{seed:064d}")


def network(architecture: Architecture | None = None, seed: int = 0) -> Network:
    """A network of its own for whoever asks; its weights are copies."""
    architecture = architecture or tiny()
    tensors = random_weights(architecture, seed)
    copies = {id(tensor): tensor.clone() for tensor in tensors.values()}
    return build_network(architecture, {name: copies[id(tensor)] for name, tensor in tensors.items()})


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
