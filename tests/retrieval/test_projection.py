"""The official retrieval model against the same layers made of torch's own modules, in double precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mast3r_sfm.errors import ShapeError, WeightsError
from mast3r_sfm.models.retrieval_files import RetrievalModel, read_retrieval_model
from mast3r_sfm.retrieval.projection import ProjectedTokens, Projector, strongest
from mast3r_sfm.types import Encoding, Float32, PixelTransform
from tests.checkpoints import RETRIEVAL_ARGS, retrieval_tensors, write_retrieval_model

CHANNELS = 12


def model_of(tensors: dict[str, Tensor], settings: dict[str, Any]) -> RetrievalModel:
    return RetrievalModel(
        hidden=tuple(int(width) for width in settings["hdims"].split("_") if width),
        residual=settings["residual"],
        prewhitened=settings["prewhiten"] is not None,
        postwhitened=settings["postwhiten"] is not None,
        features=settings["nfeat"],
        words=settings["nclusters"],
        arrays={name: tensor.double().numpy() for name, tensor in tensors.items()},
    )


def tokens_of(count: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal((count, CHANNELS)).astype(np.float16).astype(np.float32)


def expected_features(tokens: Float32, tensors: dict[str, Tensor], settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Projected tokens and local features of all tokens."""
    state = {name: tensor.double() for name, tensor in tensors.items()}
    values = torch.from_numpy(tokens).double()
    if settings["prewhiten"] is not None:
        values = (values - state["prewhiten.m"]) @ state["prewhiten.p"]
    hidden = [int(width) for width in settings["hdims"].split("_") if width]
    layers: list[torch.nn.Module] = []
    for index, width in enumerate(hidden):
        layers.append(torch.nn.Linear([CHANNELS, *hidden][index], width))
        if index + 1 < len(hidden):
            layers += [torch.nn.LayerNorm(width), torch.nn.GELU()]
    network = torch.nn.Sequential(*layers).double()
    start = "projector."
    network.load_state_dict({name[len(start) :]: tensor for name, tensor in state.items() if name.startswith(start)})
    with torch.no_grad():
        projected = network(values) + (values if settings["residual"] else 0)
    if settings["postwhiten"] is None:
        return projected, projected
    return projected, (projected - state["postwhiten.m"]) @ state["postwhiten.p"]


@given(
    hidden=st.lists(st.integers(8, 20), max_size=4),
    before=st.booleans(),
    after=st.booleans(),
    residual=st.booleans(),
    count=st.integers(1, 60) | st.sampled_from([-1, -0.6, -0.25]),
    seed=st.integers(0, 99),
)
def test_every_combination_of_parts(
    hidden: list[int], before: bool, after: bool, residual: bool, count: int | float, seed: int
) -> None:
    if residual:
        hidden = [*hidden, CHANNELS]
    settings = {
        **RETRIEVAL_ARGS,
        "hdims": "_".join(map(str, hidden)),
        "residual": residual,
        "prewhiten": "photos" if before or not (hidden or after) else None,
        "postwhiten": "photos" if after else None,
    }
    tensors = retrieval_tensors(CHANNELS, settings, seed)
    projector = Projector(model_of(tensors, settings))
    assert (projector.channels, projector.dimension) == (CHANNELS, [CHANNELS, *hidden][-1])
    tokens = tokens_of(40, seed)
    projected, features = (values.numpy() for values in expected_features(tokens, tensors, settings))
    found, attention = projector.project(tokens)
    np.testing.assert_allclose(found, projected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(attention, np.linalg.norm(projected, axis=1), rtol=1e-5)
    local = projector.local_features(tokens, count)
    assert local.dtype == np.float32
    wanted = int(40 * -count) if count < 0 else min(40, count)
    chosen = np.argsort(-attention, kind="stable")[:wanted]
    assert len(local) == wanted
    np.testing.assert_allclose(local, features[chosen], rtol=0, atol=2e-5)


def test_the_strongest_tokens() -> None:
    attention = np.array([1, 3, 2, 3, 0], np.float32)
    assert strongest(attention, 3).tolist() == [1, 3, 2]
    assert strongest(attention, 99).tolist() == [1, 3, 2, 0, 4]
    assert strongest(attention, -0.5).tolist() == [1, 3]
    assert strongest(attention, -1).tolist() == [1, 3, 2, 0, 4]
    assert strongest(attention, -0.1).tolist() == []


def test_the_features_of_an_encoding_do_not_depend_on_the_model_s_own_attention(tmp_path: Path) -> None:
    model = read_retrieval_model(write_retrieval_model(tmp_path / "a.pth", CHANNELS, hdims="16_12", residual=True))
    tokens = tokens_of(30).astype(np.float16)
    encoding = Encoding(
        tokens=tokens,
        xy=np.zeros((30, 2), np.float32),
        attention=np.arange(30, dtype=np.float32),
        transform=PixelTransform(matrix=np.eye(2, 3)),
        network_size=(64, 64),
    )
    projector = Projector(model)
    found = ProjectedTokens(projector=projector, count=7).of(encoding)
    assert found.shape == (7, CHANNELS)
    np.testing.assert_array_equal(found, projector.local_features(tokens.astype(np.float32), 7))


def test_an_image_without_tokens() -> None:
    for settings in ({**RETRIEVAL_ARGS}, {**RETRIEVAL_ARGS, "hdims": "5_7", "postwhiten": "x"}):
        projector = Projector(model_of(retrieval_tensors(CHANNELS, settings), settings))
        assert projector.local_features(tokens_of(0), 300).shape == (0, projector.dimension)


def test_threads_change_nothing() -> None:
    settings = {**RETRIEVAL_ARGS, "hdims": "300_12", "residual": True, "postwhiten": "x"}
    projector = Projector(model_of(retrieval_tensors(CHANNELS, settings), settings))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(projector.local_features(tokens_of(768), 300))
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize(
    ("settings", "changes", "part"),
    [
        ({}, {"prewhiten.m": (CHANNELS,)}, "prewhiten.m of shape 12 and prewhiten.p of shape 12 × 12"),
        ({}, {"prewhiten.m": (1, 3)}, "prewhiten.m of shape 1 × 3"),
        ({}, {"prewhiten.p": (CHANNELS, 5)}, "prewhiten.p of shape 12 × 5"),
        ({}, {"prewhiten.m": (1, 0), "prewhiten.p": (0, 0)}, "must be 1 × C and C × C"),
        (
            {"hdims": "8"},
            {"projector.0.weight": (8, 5)},
            "its prewhiten gives 12 channels, but its projector.0 takes 5",
        ),
        ({"hdims": "8"}, {"projector.0.weight": (7, 12)}, "projector.0.weight has shape 7 × 12, expected 8 × 12"),
        ({"hdims": "8"}, {"projector.0.weight": (8, 12, 1)}, "projector.0.weight has shape 8 × 12 × 1"),
        ({"hdims": "8"}, {"projector.0.bias": (9,)}, "projector.0.bias has shape 9, expected 8"),
        ({"hdims": "8", "prewhiten": None}, {"projector.0.weight": (8, 0)}, "projector.0.weight has shape 8 × 0"),
        ({"hdims": "8_6"}, {"projector.3.weight": (6, 7)}, "projector.3.weight has shape 6 × 7, expected 6 × 8"),
        ({"hdims": "8_6"}, {"projector.1.weight": (6,)}, "projector.1.weight has shape 6, expected 8"),
        ({"hdims": "8_6"}, {"projector.1.bias": ()}, "projector.1.bias has shape (), expected 8"),
        (
            {"hdims": "8", "postwhiten": "x"},
            {"postwhiten.m": (1, 12), "postwhiten.p": (12, 12)},
            "its projector.0 gives 8 channels, but its postwhiten takes 12",
        ),
        ({"hdims": "8", "residual": True}, {}, "their widths differ"),
        ({"residual": True}, {}, "their widths differ"),
        ({"prewhiten": None}, {}, "neither whitens nor projects"),
    ],
)
def test_parts_that_do_not_fit(settings: dict[str, Any], changes: dict[str, tuple[int, ...]], part: str) -> None:
    every = {**RETRIEVAL_ARGS, **settings}
    tensors = retrieval_tensors(CHANNELS, every)
    tensors |= {name: torch.zeros(shape) for name, shape in changes.items()}
    with pytest.raises(WeightsError) as raised:
        Projector(model_of(tensors, every))
    assert part in str(raised.value)


def test_tokens_of_another_width() -> None:
    projector = Projector(model_of(retrieval_tensors(CHANNELS, RETRIEVAL_ARGS), RETRIEVAL_ARGS))
    with pytest.raises(ShapeError, match=r"expected \[\*, 12\]"):
        projector.project(np.zeros((3, 5), np.float32))
