"""Small checkpoints with random weights, in the layouts of the official ones."""

from __future__ import annotations

import argparse
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from mast3r_sfm.models.mast3r.arguments import architecture_from
from mast3r_sfm.models.mast3r.network import Network

DUST3R: dict[str, Any] = {
    "pos_embed": "RoPE100",
    "img_size": (224, 224),
    "head_type": "linear",
    "output_mode": "pts3d",
    "depth_mode": ("exp", -math.inf, math.inf),
    "conf_mode": ("exp", 1, math.inf),
    "enc_embed_dim": 16,
    "enc_depth": 2,
    "enc_num_heads": 2,
    "dec_embed_dim": 8,
    "dec_depth": 3,
    "dec_num_heads": 1,
}
"""Arguments of a tiny DUSt3R with a linear head."""

MAST3R: dict[str, Any] = {
    **DUST3R,
    "img_size": (512, 512),
    "dec_depth": 4,
    "head_type": "catmlp+dpt",
    "output_mode": "pts3d+desc6",
    "two_confs": True,
    "desc_conf_mode": ("exp", 0, math.inf),
}
"""Arguments of a tiny MASt3R; its DPT head needs `DPT` to be tiny as well."""

DPT: dict[str, Any] = {"feature_dim": 8, "last_dim": 4, "layer_dims": [4, 4, 8, 8]}


def model_text(arguments: dict[str, Any], class_name: str = "AsymmetricCroCo3DStereo") -> str:
    """As official files state a network."""
    return f"{class_name}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"


def random_tensors(arguments: dict[str, Any], dpt: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """A state dict, with all names."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {
            name: tensor.shape for name, tensor in Network(architecture_from(arguments, dpt=dpt)).state_dict().items()
        }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, other in shared_names(tensors).items():
        tensors[other] = tensors[name]
    return tensors


def shared_names(tensors: dict[str, Tensor]) -> dict[str, str]:
    """By the name that the hub keeps, the other name of a shared tensor."""
    return {
        f"{start}layer{index + 1}_rn.weight": f"{start}layer_rn.{index}.weight"
        for start in ("downstream_head1.dpt.scratch.", "downstream_head2.dpt.scratch.")
        for index in range(4)
        if f"{start}layer_rn.{index}.weight" in tensors
    }


def write_pth(path: Path, text: str, tensors: dict[str, Tensor], **extra: object) -> Path:
    """In the layout of the official files."""
    torch.save({"args": argparse.Namespace(model=text, lr=1e-4, epochs=3), "model": tensors, **extra}, path)
    return path


def write_hub_folder(folder: Path, arguments: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """config.json with bare infinities, and model.safetensors with shared tensors stored once."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(arguments, indent=2), encoding="utf-8")
    shared = shared_names(tensors)
    stored = {name: tensor for name, tensor in tensors.items() if name not in shared.values()}
    metadata = {other: name for name, other in shared.items()}
    safetensors.torch.save_file(stored, folder / "model.safetensors", metadata)
    return folder


RETRIEVAL_ARGS: dict[str, Any] = {
    "pretrained": "checkpoints/model.pth",
    "freeze_backbone": 1,
    "prewhiten": "photos",
    "hdims": "",
    "residual": False,
    "postwhiten": None,
    "featweights": "l2norm",
    "nfeat": 300,
    "nclusters": 64,
    "imsize": 512,
}
"""Settings of a retrieval model that only whitens."""


def retrieval_tensors(channels: int, settings: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """A random state dict of a retrieval model, for tokens of so many channels."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype) / math.sqrt(shape[-1])

    tensors = {}
    hidden = [int(width) for width in settings["hdims"].split("_") if width]
    widths = [channels, *hidden]
    for name, width in (("prewhiten", channels), ("postwhiten", widths[-1])):
        if settings[name] is not None:
            tensors[f"{name}.m"] = random(1, width, dtype=torch.float64)
            tensors[f"{name}.p"] = random(width, width, dtype=torch.float64)
    for index, width in enumerate(hidden):
        tensors[f"projector.{3 * index}.weight"] = random(width, widths[index])
        tensors[f"projector.{3 * index}.bias"] = random(width)
        if index + 1 < len(hidden):
            tensors[f"projector.{3 * index + 1}.weight"] = 1 + random(width)
            tensors[f"projector.{3 * index + 1}.bias"] = random(width)
    return tensors


def write_retrieval_model(path: Path, channels: int, tensors: dict[str, Tensor] | None = None, **settings: Any) -> Path:
    """A `…_retrieval_trainingfree.pth`, of the settings above but for those named."""
    every = {**RETRIEVAL_ARGS, **settings}
    state = retrieval_tensors(channels, every) if tensors is None else tensors
    torch.save({"args": argparse.Namespace(**every), "model": state}, path)
    return path


def write_codebook(path: Path, words: int, channels: int, protocol: int = 4) -> Path:
    """A `…_codebook.pkl` of random words."""
    centroids = np.random.default_rng(0).standard_normal((words, channels)).astype(np.float32)
    stored = {"type": "Codebook", "params": {"size": words}, "state": {"centroids": centroids}}
    path.write_bytes(pickle.dumps(stored, protocol=protocol))
    return path
