"""MASt3R and DUSt3R as models of the chain: batches, orders, memory, half precision, threads."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mast3r_sfm.errors import ConfigError, WeightsError
from mast3r_sfm.images.loading import load_image
from mast3r_sfm.matching.putative import match_dense
from mast3r_sfm.models.base import DenseModel, KeypointModel
from mast3r_sfm.models.mast3r import model as module
from mast3r_sfm.models.mast3r.architecture import Architecture
from mast3r_sfm.models.mast3r.checkpoint import Checkpoint, read_checkpoint
from mast3r_sfm.models.mast3r.model import Mast3rModel, Precision
from mast3r_sfm.types import Encoding, ImageRecord, LoadedImage, PairPrediction, PixelTransform, Preparation
from tests.networks import checkpoint, network, random_weights, tiny

CPU = torch.device("cpu")
Pairs = list[tuple[Encoding, Encoding]]


def make_model(
    architecture: Architecture | None = None, dtype: torch.dtype = torch.float32, **settings: Any
) -> Mast3rModel:
    return Mast3rModel(checkpoint(architecture), CPU, precision=Precision(decoder=dtype), **settings)


def loaded(pixels: NDArray[np.uint8]) -> LoadedImage:
    height, width = pixels.shape[:2]
    record = ImageRecord(name="photo.jpg", width_px=width, height_px=height, sha256="0" * 64)
    return LoadedImage(record=record, pixels=pixels, transform=PixelTransform(matrix=np.eye(2, 3)))


def random_image(rows: int, columns: int, seed: int) -> LoadedImage:
    return loaded(np.random.default_rng(seed).integers(0, 256, (16 * rows, 16 * columns, 3), np.uint8))


GRIDS = [(2, 3), (3, 2), (2, 3), (2, 2), (2, 3), (3, 2), (2, 3)]


@pytest.fixture(scope="module")
def images() -> list[LoadedImage]:
    """Of three shapes, mixed."""
    return [random_image(*grid, seed) for seed, grid in enumerate(GRIDS)]


@pytest.fixture(scope="module")
def model() -> Mast3rModel:
    """For looking at, not for changing."""
    return make_model()


@pytest.fixture(scope="module")
def encodings(model: Mast3rModel, images: list[LoadedImage]) -> list[Encoding]:
    return [encoding for image in images for encoding in model.encode([image])]


def grid_of(encoding: Encoding) -> tuple[int, int]:
    return encoding.network_size[1] // 16, encoding.network_size[0] // 16


def tokens_of(encoding: Encoding) -> Tensor:
    return torch.from_numpy(encoding.tokens).float()[None]


def everywhere(encoding: Encoding) -> Tensor:
    return torch.arange(encoding.network_size[0] * encoding.network_size[1])


def assert_alike(one: PairPrediction, other: PairPrediction, pair: tuple[Encoding, Encoding]) -> None:
    """Equal but for the noise of float32, which depends on the size of a batch."""
    for mine, theirs, encoding in zip((one.first, one.second), (other.first, other.second), pair, strict=True):
        torch.testing.assert_close(mine.descriptors, theirs.descriptors, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine.descriptor_confidence, theirs.descriptor_confidence, rtol=1e-4, atol=1e-5)
        points, expected = (view.points_at(everywhere(encoding)) for view in (mine, theirs))
        error = (points[0] - expected[0]).norm(dim=1) / expected[0].norm(dim=1)
        assert error.max() < 1e-3
        torch.testing.assert_close(points[1], expected[1], rtol=1e-4, atol=1e-5)


def test_it_is_a_dense_model(model: Mast3rModel) -> None:
    assert isinstance(model, DenseModel)
    assert not isinstance(model, KeypointModel)
    assert model.retrieval_tokens == 300
    assert model.images_at_once > 1  # with all threads, rather than images side by side
    assert model.pairs_at_once >= 1


@pytest.mark.parametrize(
    ("architecture", "name", "max_size_px", "expected"),
    [
        (tiny(), "mast3r", 0, Preparation(size_px=512, patch_px=16)),
        (tiny(), "mast3r", 128, Preparation(size_px=128, patch_px=16)),
        (tiny("dpt"), "dust3r", 0, Preparation(size_px=512, patch_px=16)),
        (tiny("linear", image_size_px=224), "dust3r", 0, Preparation(size_px=224, patch_px=16, square_crop=True)),
        (tiny("linear", image_size_px=224), "dust3r", 384, Preparation(size_px=384, patch_px=16)),
        (tiny(), "mast3r", 224, Preparation(size_px=224, patch_px=16)),
    ],
)
def test_name_and_preparation(architecture: Architecture, name: str, max_size_px: int, expected: Preparation) -> None:
    made = make_model(architecture, max_size_px=max_size_px)
    assert (made.name, made.preparation) == (name, expected)


def test_what_an_encoding_holds(images: list[LoadedImage], encodings: list[Encoding]) -> None:
    plain = network()
    for image, encoding in zip(images, encodings, strict=True):
        normalised = torch.from_numpy(image.pixels).permute(2, 0, 1)[None] / 127.5 - 1
        tokens = plain.encode(normalised)[0]
        assert encoding.tokens.dtype == np.float16
        assert encoding.tokens.shape == (image.pixels.shape[0] * image.pixels.shape[1] // 256, 32)
        np.testing.assert_allclose(encoding.tokens, tokens, rtol=1e-3, atol=1e-3)
        assert np.abs(encoding.tokens - tokens.numpy()).max() > 1e-5  # rounded to half precision
        assert encoding.attention.dtype == np.float32
        np.testing.assert_allclose(encoding.attention, tokens.norm(dim=1), rtol=1e-4)
        assert encoding.network_size == (image.pixels.shape[1], image.pixels.shape[0])
        assert encoding.transform is image.transform
    np.testing.assert_allclose(encodings[0].xy, [[8, 8], [24, 8], [40, 8], [8, 24], [24, 24], [40, 24]])
    np.testing.assert_allclose(encodings[1].xy[:3], [[8, 8], [24, 8], [8, 24]])
    assert encodings[0].xy.dtype == np.float32


def test_tokens_lie_at_the_centres_of_their_patches_in_the_stored_photo(tmp_path: Path) -> None:
    """A photo that lies on its side, is enlarged, and loses a border at its left and right."""
    photo = np.random.default_rng(0).integers(0, 256, (36, 50, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # upright, the stored rows are columns from right to left
    Image.fromarray(photo).save(tmp_path / "photo.png", exif=exif)
    record = ImageRecord(name="photo.png", width_px=50, height_px=36, sha256="0" * 64, orientation=6)
    made = make_model(max_size_px=64)
    (encoding,) = made.encode([load_image(tmp_path, record, made.preparation)])
    # Upright 36 × 50, resized to 46 × 64, the middle 32 columns kept.
    assert encoding.network_size == (32, 64)
    upright = [(column, row) for row in (8, 24, 40, 56) for column in (8, 24)]
    expected = [(row * 50 / 64, 36 - (column + 7) * 36 / 46) for column, row in upright]
    np.testing.assert_allclose(encoding.xy, expected, rtol=1e-5)


@pytest.mark.parametrize("at_once", [1, 2, 3, 16])
def test_images_come_back_in_their_order_whatever_the_batches(
    images: list[LoadedImage], encodings: list[Encoding], at_once: int
) -> None:
    made = make_model()
    made.images_at_once = at_once
    sizes = record_batches(made, "encode")
    found = made.encode(images)
    assert max(sizes) <= at_once
    assert sum(sizes) == len(images)
    assert len(found) == len(images)
    for encoding, alone in zip(found, encodings, strict=True):
        assert encoding.network_size == alone.network_size
        assert encoding.transform is alone.transform
        # One rounding to half precision more or less.
        np.testing.assert_allclose(encoding.tokens, alone.tokens, rtol=2e-3, atol=2e-4)
        np.testing.assert_allclose(encoding.attention, alone.attention, rtol=1e-5)


def test_no_images_and_no_pairs(model: Mast3rModel) -> None:
    assert model.encode([]) == []
    assert list(model.predict([])) == []


def record_batches(made: Mast3rModel, name: str, most: int = 1000) -> list[int]:
    """Note the sizes of the batches that the network gets from now on; those beyond `most` do not fit."""
    sizes: list[int] = []
    original = getattr(made._network, name)

    def run(batch: Tensor, *rest: Any) -> Any:
        sizes.append(len(batch))
        if len(batch) > most:
            raise torch.OutOfMemoryError("out of memory")
        return original(batch, *rest)

    setattr(made._network, name, run)
    return sizes


NUMBERS = [(0, 2), (0, 1), (2, 4), (1, 0), (3, 5), (1, 5), (4, 6), (0, 2), (6, 6), (2, 0)]


def pairs_of(encodings: Sequence[Encoding]) -> Pairs:
    """Of the same shape and of two shapes, one of them twice, one an image with itself."""
    return [(encodings[first], encodings[second]) for first, second in NUMBERS]


def predict(made: Mast3rModel, pairs: Pairs) -> list[tuple[PairPrediction, PairPrediction]]:
    """Both orders of each pair, in the order of the pairs; every number must come once."""
    found = {}
    for number, forward, backward in made.predict(pairs):
        assert number not in found
        found[number] = forward, backward
    assert sorted(found) == list(range(len(pairs)))
    return [found[number] for number in range(len(pairs))]


@pytest.fixture(scope="module")
def one_by_one(model: Mast3rModel, encodings: list[Encoding]) -> list[tuple[PairPrediction, PairPrediction]]:
    return [orders for pair in pairs_of(encodings) for orders in predict(model, [pair])]


@pytest.mark.parametrize("at_once", [1, 2, 3, 8])
def test_pairs_of_mixed_shapes_equal_those_decoded_one_by_one(
    encodings: list[Encoding], one_by_one: list[tuple[PairPrediction, PairPrediction]], at_once: int
) -> None:
    made, pairs = make_model(), pairs_of(encodings)
    made.pairs_at_once = at_once
    sizes = record_batches(made, "decode")
    found = predict(made, pairs)
    assert max(sizes) <= 2 * at_once
    assert max(sizes) == {1: 2, 2: 4, 3: 6, 8: 12}[at_once]  # six pairs are of the commonest shape
    assert sum(sizes) == 2 * len(pairs)
    for (forward, backward), (alone, reverse), pair in zip(found, one_by_one, pairs, strict=True):
        assert_alike(forward, alone, pair)
        assert_alike(backward, reverse, pair[::-1])


@pytest.mark.parametrize("numbers", [(0, 2), (1, 0), (3, 5)])
def test_a_prediction_is_what_the_network_says(
    model: Mast3rModel, encodings: list[Encoding], numbers: tuple[int, int]
) -> None:
    """In both orders, of which the second sees the pair swapped."""
    plain = network()
    pair = encodings[numbers[0]], encodings[numbers[1]]
    for prediction, (first, second) in zip(predict(model, [pair])[0], (pair, pair[::-1]), strict=True):
        assert not prediction.euclidean
        grids = grid_of(first), grid_of(second)
        outputs = plain.decode(tokens_of(first), tokens_of(second), grids)
        for view, mine, head, grid in zip(
            (prediction.first, prediction.second), outputs, plain.heads, grids, strict=True
        ):
            hooks = [mine[hook] for hook in head.hooks]
            values, confidence = head.descriptors(hooks, grid)
            torch.testing.assert_close(view.descriptors, values[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(view.descriptor_confidence, confidence[0], rtol=1e-4, atol=1e-5)
            points = head.points(head.features(hooks, grid))
            index = torch.randperm(256 * grid[0] * grid[1], generator=torch.Generator().manual_seed(1))[:300]
            xyz, sure = view.points_at(index)
            expected = points.xyz[0].flatten(0, 1)[index]
            assert ((xyz - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-3
            torch.testing.assert_close(sure, points.confidence[0].flatten()[index], rtol=1e-4, atol=1e-5)
            assert view.points_at(index[:0])[0].shape == (0, 3)


def test_the_orders_differ(encodings: list[Encoding], one_by_one: list[tuple[PairPrediction, PairPrediction]]) -> None:
    """Otherwise the tests above could not tell them apart."""
    forward, backward = one_by_one[0]
    for one, other in ((forward.first, backward.second), (forward.second, backward.first)):
        assert (one.descriptors - other.descriptors).abs().max() > 0.1
    same, swapped = one_by_one[0][0], one_by_one[9][1]  # (0, 2), and (2, 0) turned around
    assert_alike(same, swapped, pairs_of(encodings)[0])


def test_a_pointmap_is_made_when_it_is_asked_for(encodings: list[Encoding], monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_model()
    asked = []
    for head in made._network.heads:
        original = head.features
        monkeypatch.setattr(
            head, "features", lambda *rest, original=original: asked.append(len(rest[0][0])) or original(*rest)
        )
    (forward, _), *_ = predict(made, pairs_of(encodings))
    assert asked == []
    forward.second.points_at(torch.arange(5))
    assert asked == [1]


@pytest.mark.parametrize("most", [1, 2, 3])
def test_images_that_do_not_fit_are_encoded_in_smaller_batches(
    images: list[LoadedImage], encodings: list[Encoding], most: int
) -> None:
    made = make_model()
    made.images_at_once = 8
    sizes = record_batches(made, "encode", most)
    found = made.encode([images[0], images[2], images[4], images[6], images[0], images[2]])
    assert sizes == {1: [6, 3, 1, 1, 1, 1, 1, 1], 2: [6, 3, 1, 1, 1, 1, 1, 1], 3: [6, 3, 3]}[most]
    sizes.clear()
    made.encode([images[0], images[2], images[4], images[6]])
    assert sizes == {1: [1, 1, 1, 1], 2: [1, 1, 1, 1], 3: [3, 1]}[most]  # what did not fit is not tried again
    for encoding, number in zip(found, (0, 2, 4, 6, 0, 2), strict=True):
        np.testing.assert_allclose(encoding.tokens, encodings[number].tokens, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("most", [2, 5, 8])
def test_pairs_that_do_not_fit_are_decoded_in_smaller_batches(
    encodings: list[Encoding], one_by_one: list[tuple[PairPrediction, PairPrediction]], most: int
) -> None:
    made, pairs = make_model(), pairs_of(encodings)
    made.pairs_at_once = 8
    sizes = record_batches(made, "decode", most)
    found = predict(made, pairs)
    # Both orders of the six pairs of the commonest shape: the batch is halved until it fits.
    alike = {2: [12, 6, 2, 2, 2, 2, 2, 2], 5: [12, 6, 2, 2, 2, 2, 2, 2], 8: [12, 6, 6]}[most]
    assert sizes[: len(alike)] == alike
    for (forward, backward), (alone, reverse), pair in zip(found, one_by_one, pairs, strict=True):
        assert_alike(forward, alone, pair)
        assert_alike(backward, reverse, pair[::-1])


def test_what_a_failed_batch_held_is_let_go_of_before_the_next(
    images: list[LoadedImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_model()
    made.images_at_once = 2
    held: list[weakref.ref[Tensor]] = []
    original = made._network.encode

    def run(batch: Tensor) -> Tensor:
        assert all(tensor() is None for tensor in held)
        if len(batch) > 1:
            large = torch.zeros(10)
            held.append(weakref.ref(large))
            raise torch.OutOfMemoryError("out of memory")
        return original(batch)

    monkeypatch.setattr(made._network, "encode", run)
    assert len(made.encode([images[0], images[2], images[4], images[6]])) == 4
    assert len(held) == 1


def test_too_little_memory_for_a_single_one(images: list[LoadedImage], encodings: list[Encoding]) -> None:
    advice = r"cpu has too little free memory for mast3r: .*smaller encode\.max_size_px.*--device cpu"
    made = make_model()
    record_batches(made, "encode", 0)
    record_batches(made, "decode", 1)
    with pytest.raises(ConfigError, match=advice) as caught:
        made.encode(images)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    with pytest.raises(ConfigError, match=advice):
        list(made.predict(pairs_of(encodings)))
    made = make_model()
    (prediction, _), *_ = predict(made, pairs_of(encodings)[:1])

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    made._network.heads[0].dpt.features = fail
    with pytest.raises(ConfigError, match=advice):
        prediction.first.points_at(torch.arange(4))


def spoiled(name: str, value: float, architecture: Architecture | None = None) -> Checkpoint:
    architecture = architecture or tiny()
    tensors = dict(random_weights(architecture))
    tensors[name] = torch.full_like(tensors[name], value)
    return Checkpoint(architecture=architecture, tensors=tensors, sha256="0" * 64)


def use(made: Mast3rModel, images: Sequence[LoadedImage]) -> None:
    """All that the chain does with a pair."""
    first, second = made.encode(images[:2])
    for _, forward, backward in made.predict([(first, second)]):
        for prediction, pair in ((forward, (first, second)), (backward, (second, first))):
            for view, encoding in zip((prediction.first, prediction.second), pair, strict=True):
                view.points_at(everywhere(encoding))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["patch_embed.proj.bias", "enc_blocks.1.attn.qkv.weight", "enc_norm.weight"])
def test_a_broken_encoder_is_noticed(images: list[LoadedImage], name: str, dtype: torch.dtype) -> None:
    """Whatever the decoder computes in: the encoder is always float32."""
    made = Mast3rModel(spoiled(name, torch.nan), CPU, precision=Precision(decoder=dtype))
    with pytest.raises(WeightsError, match="mast3r gives NaN or infinite values: the weights are broken"):
        use(made, images)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize(
    "name",
    [
        "dec_blocks2.2.norm3.weight",
        "decoder_embed.bias",
        "dec_norm.weight",
        "downstream_head1.head_local_features.fc2.weight",
        "downstream_head2.head_local_features.fc1.bias",
        "downstream_head2.dpt.head.4.bias",
        "downstream_head1.dpt.head.0.weight",
    ],
)
def test_a_broken_decoder_or_head_is_noticed(images: list[LoadedImage], name: str, value: float) -> None:
    with pytest.raises(WeightsError, match="mast3r gives NaN or infinite values: the weights are broken"):
        use(Mast3rModel(spoiled(name, value), CPU), images)


@pytest.mark.parametrize("head", ["dpt", "linear"])
def test_a_broken_dust3r_is_noticed(images: list[LoadedImage], head: Any) -> None:
    name = "downstream_head2.proj.bias" if head == "linear" else "downstream_head2.dpt.head.4.bias"
    with pytest.raises(WeightsError, match="dust3r gives NaN or infinite values: the weights are broken"):
        use(Mast3rModel(spoiled(name, 1e3, tiny(head)), CPU), images)  # exp(1000)


def test_an_overflow_in_half_precision_says_which_one(images: list[LoadedImage]) -> None:
    # Beyond 65,504 inside a block, but not where it ends.
    tensors = dict(checkpoint().tensors)
    tensors["dec_blocks.1.mlp.fc1.weight"] = 1e5 * tensors["dec_blocks.1.mlp.fc1.weight"]
    tensors["dec_blocks.1.mlp.fc2.weight"] = 1e-5 * tensors["dec_blocks.1.mlp.fc2.weight"]
    large = replace(checkpoint(), tensors=tensors)
    use(Mast3rModel(large, CPU), images)
    use(Mast3rModel(large, CPU, precision=Precision(decoder=torch.bfloat16)), images)
    with pytest.raises(WeightsError, match=r"torch\.float16 overflows; take --dtype float32"):
        use(Mast3rModel(large, CPU, precision=Precision(decoder=torch.float16)), images)


def test_tokens_too_large_to_be_stored(images: list[LoadedImage]) -> None:
    with pytest.raises(WeightsError, match="mast3r gives NaN or infinite values: the weights are broken"):
        Mast3rModel(spoiled("enc_norm.weight", 1e6), CPU).encode(images[:1])


@pytest.mark.parametrize(("dtype", "least"), [(torch.float16, 0.99), (torch.bfloat16, 0.95)])
def test_nearest_neighbours_of_descriptors_agree_in_half_precision(
    golden_dir: Path, dtype: torch.dtype, least: float
) -> None:
    """Measured: 99.6 % of all pixels with float16, in the worst of 32 maps 98.9 %; 96.8 % and 93.6 % with bfloat16."""
    stored = read_checkpoint(golden_dir / "tiny_mast3r.safetensors")
    exact, half = (Mast3rModel(stored, CPU, precision=Precision(decoder=kind)) for kind in (torch.float32, dtype))
    shares = []
    for pair in golden_pairs(golden_dir / "tiny_mast3r_io.npz"):
        encoded = exact.encode(list(pair))
        for one, other in zip(*(predict(made, [(encoded[0], encoded[1])])[0] for made in (exact, half)), strict=True):
            shares += [mine == theirs for mine, theirs in zip(neighbours(one), neighbours(other), strict=True)]
    assert len(shares) == 32
    agree = torch.cat(shares).float().mean()
    assert least <= agree < 1
    assert min(share.float().mean() for share in shares) > least - 0.02


def golden_pairs(path: Path) -> Iterable[list[LoadedImage]]:
    """The images of all inference cases, in 8 bits."""
    with np.load(path) as file:
        cases = sorted({name.split("/")[1] for name in file.files if name.startswith("infer/")})
        for case in cases:
            views = [file[f"infer/{case}/in/{view}/img"].transpose(0, 2, 3, 1) for view in ("view1", "view2")]
            for pair in zip(*views, strict=True):
                yield [loaded(np.round(127.5 * (image + 1)).clip(0, 255).astype(np.uint8)) for image in pair]


def neighbours(prediction: PairPrediction) -> tuple[Tensor, Tensor]:
    """For every pixel of each view the nearest of the other."""
    first, second = (view.descriptors.flatten(0, 1) for view in (prediction.first, prediction.second))
    product = first @ second.T
    return product.argmax(dim=1), product.argmax(dim=0)


def test_the_fingerprint_is_that_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    one = make_model().fingerprint
    assert len(one) == 64
    # The decoder's type is a setting of the match stage, and the size of images one of the encode stage.
    assert {make_model(dtype=torch.float16).fingerprint, make_model(max_size_px=128).fingerprint} == {one}
    assert Mast3rModel(checkpoint(seed=1), CPU).fingerprint != one
    assert Mast3rModel(replace(checkpoint(tiny("dpt")), sha256=checkpoint().sha256), CPU).fingerprint != one
    monkeypatch.setattr(module, "CODE_VERSION", module.CODE_VERSION + 1)
    assert make_model().fingerprint != one


def test_weights_of_another_network_are_refused() -> None:
    wrong = replace(checkpoint(), architecture=tiny(decoder_depth=5))
    with pytest.raises(WeightsError, match=r"48 tensors are missing: dec_blocks\.4\."):
        Mast3rModel(wrong, CPU)


def test_many_threads_give_what_one_gives(
    images: list[LoadedImage], encodings: list[Encoding], one_by_one: list[tuple[PairPrediction, PairPrediction]]
) -> None:
    """Points are asked for by one thread while another decodes."""
    made, pairs = make_model(), pairs_of(encodings)

    def work(number: int) -> tuple[list[Encoding], list[tuple[PairPrediction, PairPrediction]]]:
        chosen = [number % len(pairs), (3 * number + 1) % len(pairs)]
        orders = predict(made, [pairs[index] for index in chosen])
        for index, (forward, backward), (alone, reverse) in zip(
            chosen, orders, [one_by_one[index] for index in chosen], strict=True
        ):
            assert_alike(forward, alone, pairs[index])
            assert_alike(backward, reverse, pairs[index][::-1])
        return made.encode(images[number % 3 : number % 3 + 2]), orders

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(work, range(24)))
    for number, (encoded, _) in enumerate(results):
        for encoding, alone in zip(encoded, encodings[number % 3 :], strict=False):
            np.testing.assert_allclose(encoding.tokens, alone.tokens, rtol=2e-3, atol=2e-4)


def symmetric(architecture: Architecture) -> Mast3rModel:
    """A network that treats both views alike."""
    tensors = {
        name: random_weights(architecture)[
            name.replace("dec_blocks2", "dec_blocks").replace("downstream_head2", "downstream_head1")
        ]
        for name in random_weights(architecture)
    }
    return Mast3rModel(Checkpoint(architecture=architecture, tensors=tensors, sha256="0" * 64), CPU)


@pytest.mark.parametrize("head", ["catmlp+dpt", "dpt", "linear"])
def test_an_image_matches_itself(head: Any, images: list[LoadedImage]) -> None:
    made = symmetric(tiny(head))
    (encoding,) = made.encode(images[1:2])
    ((forward, backward),) = predict(made, [(encoding, encoding)])
    assert forward.euclidean == (head != "catmlp+dpt")
    putative = match_dense((forward, backward), encoding, encoding)
    np.testing.assert_array_equal(putative.xy_first, putative.xy_second)
    assert len(np.unique(putative.xy_first, axis=0)) == len(putative.xy_first) == 48 * 32
    assert putative.points is not None
    points = putative.points(np.arange(len(putative.xy_first)))
    np.testing.assert_allclose(points.first, points.second, rtol=1e-3, atol=1e-4)
    assert np.ptp(points.first, axis=0).min() > 0.1


@pytest.mark.parametrize("head", ["dpt", "linear"])
def test_dust3r_is_matched_by_its_points(head: Any, images: list[LoadedImage]) -> None:
    made = make_model(tiny(head))
    first, second = made.encode(images[:2])
    prediction = predict(made, [(first, second)])[0][0]
    for view, encoding in ((prediction.first, first), (prediction.second, second)):
        assert view.descriptors.shape == (encoding.network_size[1], encoding.network_size[0], 3)
        points, confidence = view.points_at(everywhere(encoding))
        torch.testing.assert_close(points, view.descriptors.flatten(0, 1), rtol=0, atol=0)
        torch.testing.assert_close(confidence, view.descriptor_confidence.flatten(), rtol=0, atol=0)
        assert confidence.min() >= 1
        some = torch.tensor([5, 3, 5])
        torch.testing.assert_close(view.points_at(some)[0], points[some], rtol=0, atol=0)


@pytest.mark.parametrize("tf32", [True, False])
def test_rounding_of_products_is_switched_for_the_time_of_a_batch(tf32: bool) -> None:
    def switches() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = switches()
    with module._products(torch.device("cuda"), tf32=tf32):
        assert switches() == (tf32, tf32)
    assert switches() == before
    with pytest.raises(ZeroDivisionError), module._products(torch.device("cuda"), tf32=not before[0]):
        raise ZeroDivisionError
    assert switches() == before
    with module._products(CPU, tf32=not before[0]):
        assert switches() == before


@pytest.mark.parametrize(("free_gb", "expected"), [(0.1, 1), (1.0, 1), (2.0, 3), (80.0, 8)])
def test_pairs_are_as_many_as_fit_into_the_free_memory(
    monkeypatch: pytest.MonkeyPatch, free_gb: float, expected: int
) -> None:
    """512 × 384 pixels of 2,500 bytes are 0.49 GB a pair; a fifth of the memory stays free."""
    monkeypatch.setattr(module, "_BYTES_PER_PIXEL", 2500)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free_gb * 1e9), int(80e9)))
    made = make_model()
    assert made.pairs_at_once == 1
    made._device = torch.device("cuda")
    assert made._pairs_that_fit() == expected
