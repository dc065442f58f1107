"""Patches found in another image to a fraction of a pixel, against shifts and distortions that are known exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mast3r_sfm.mapping import patches as module
from mast3r_sfm.mapping.patches import RADIUS, Alignment, Patches, align_patches, cut_windows, sample, smooth
from mast3r_sfm.synthetic.render import pixel_centres
from mast3r_sfm.types import Float64
from tests.surfaces import Texture

WIDTH, HEIGHT = 160, 120
NONE = np.zeros(2)
TURN = np.array([[np.cos(0.5), -np.sin(0.5)], [np.sin(0.5), np.cos(0.5)]])
FINE = Texture(shortest=6.0, longest=40.0)
COARSE = Texture(shortest=12.0, longest=60.0)


def image_of(texture: Texture, matrix: Float64 | None = None, shift: Float64 = NONE) -> Tensor:
    """[H, W] an image that shows at pixel x what the texture is at matrix⁻¹ (x - shift)."""
    places = pixel_centres(WIDTH, HEIGHT) - shift
    grey = texture(places @ np.linalg.inv(np.eye(2) if matrix is None else matrix).T)
    return torch.from_numpy(grey.reshape(HEIGHT, WIDTH)).float()


def anywhere(count: int, margin: float = 25.0, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    places = rng.uniform([margin, margin], [WIDTH - margin, HEIGHT - margin], (count, 2))
    return torch.from_numpy(places).float()


def affine_of(count: int, matrix: Float64 | None = None) -> Tensor:
    return torch.from_numpy(np.eye(2) if matrix is None else matrix).float().expand(count, 2, 2).contiguous()


def off_by(count: int, distance: float, seed: int = 1) -> Tensor:
    """[count, 2] vectors of one length in all directions."""
    angle = torch.from_numpy(np.random.default_rng(seed).uniform(0, 2 * np.pi, count)).float()
    return distance * torch.stack([angle.cos(), angle.sin()], dim=1)


@dataclass(frozen=True, kw_only=True)
class Found:
    """An alignment and the truth, of patches that lie well inside both images."""

    alignment: Alignment
    error: Tensor
    """[N, 2]."""

    @property
    def distance(self) -> Tensor:
        distance: Tensor = self.error.norm(dim=1)
        return distance


def find(
    texture: Texture,
    matrix: Float64 | None = None,
    shift: Float64 = NONE,
    *,
    start_off: float = 0.0,
    gain: float = 1.0,
    offset: float = 0.0,
    noise: float = 0.0,
    smoothing: float = 1.0,
) -> Found:
    """Align patches of the plain texture in an image that shows it moved; noise comes after smoothing."""
    rng = np.random.default_rng(5)
    plain, moved = image_of(texture), gain * image_of(texture, matrix, shift) + offset
    plain, moved = (
        smooth(image, smoothing) + noise * torch.from_numpy(rng.normal(size=(HEIGHT, WIDTH))).float()
        for image in (plain, moved)
    )
    xy = anywhere(200)
    true = xy @ affine_of(1, matrix)[0].T + torch.from_numpy(shift).float()
    inside = ((true > 15) & (true < torch.tensor([WIDTH - 15, HEIGHT - 15]))).all(dim=1)
    xy, true = xy[inside], true[inside]
    assert len(xy) > 80
    reference = Patches.prepare(cut_windows(plain, xy, 1.0))
    alignment = align_patches(moved, reference, affine_of(len(xy), matrix), true + off_by(len(xy), start_off))
    return Found(alignment=alignment, error=alignment.xy - true)


@pytest.mark.parametrize("texture", [FINE, COARSE], ids=["fine", "coarse"])
@pytest.mark.parametrize("shift", [(0.3, -0.4), (0.5, 0.5), (7.25, -3.9)])
def test_a_shift_is_found(texture: Texture, shift: tuple[float, float]) -> None:
    found = find(texture, shift=np.array(shift))
    assert found.alignment.converged.all()
    # What is left comes from interpolation between pixels.
    assert found.distance.median() < 0.02
    assert found.distance.quantile(0.95) < 0.04
    assert found.distance.max() < 0.08
    assert found.alignment.correlation.min() > 0.999
    assert found.alignment.correlation.max() < 1 + 1e-5


@pytest.mark.parametrize("texture", [FINE, COARSE], ids=["fine", "coarse"])
@pytest.mark.parametrize("shift", [(0.0, 0.0), (5.0, -3.0)])
def test_between_equal_fractions_of_pixels_a_shift_is_exact(texture: Texture, shift: tuple[float, float]) -> None:
    assert find(texture, shift=np.array(shift), start_off=1.0).distance.max() < 0.006


@given(
    start_off=st.floats(0, 2),
    gain=st.floats(0.3, 3),
    offset=st.floats(-50, 50),
    x=st.floats(-3, 3),
    y=st.floats(-3, 3),
)
@settings(max_examples=10)
def test_neither_the_light_nor_the_start_matter(
    start_off: float, gain: float, offset: float, x: float, y: float
) -> None:
    found = find(FINE, shift=np.array([x, y]), start_off=start_off, gain=gain, offset=offset)
    assert found.alignment.converged.all()
    assert found.distance.median() < 0.02
    assert found.distance.max() < 0.08
    assert found.alignment.correlation.min() > 0.998


@pytest.mark.parametrize(
    "matrix",
    [
        TURN,
        np.array([[0.0, -1.0], [1.0, 0.0]]),
        np.diag([1.3, 1.3]),
        np.diag([0.8, 0.8]),
        np.array([[1.0, 0.4], [0.0, 1.0]]),
        np.array([[1.0, 0.0], [0.4, 1.0]]),
        TURN @ np.diag([1.2, 0.8]),
    ],
    ids=["turn", "quarter turn", "larger", "smaller", "shear x", "shear y", "turn and stretch"],
)
@pytest.mark.parametrize("start_off", [0.0, 1.5])
def test_patches_are_found_under_a_known_affine_map(matrix: Float64, start_off: float) -> None:
    centre = np.array([WIDTH / 2, HEIGHT / 2])
    found = find(FINE, matrix, centre - matrix @ centre + [0.3, -0.2], start_off=start_off)
    assert found.alignment.converged.all()
    # Another scale smoothed by as many pixels is not as smooth; it costs some hundredths of a pixel.
    is_turn = np.allclose(matrix @ matrix.T, np.eye(2))
    assert found.distance.median() < (0.02 if is_turn else 0.06)
    assert found.distance.quantile(0.95) < (0.04 if is_turn else 0.12)
    assert found.alignment.correlation.min() > (0.999 if is_turn else 0.98)


def test_a_wrong_affine_map_is_seen_in_the_correlation() -> None:
    centre = np.array([WIDTH / 2, HEIGHT / 2])
    shift = centre - TURN @ centre
    moved, xy = smooth(image_of(FINE, TURN, shift), 1.0), anywhere(100)
    true = xy @ affine_of(1, TURN)[0].T + torch.from_numpy(shift).float()
    reference = Patches.prepare(cut_windows(smooth(image_of(FINE), 1.0), xy, 1.0))
    right, wrong, inverse = (
        align_patches(moved, reference, affine_of(100, matrix), true).correlation for matrix in (TURN, None, TURN.T)
    )
    assert right.min() > 0.95
    assert wrong.median() < 0.9
    assert inverse.median() < wrong.median()


def test_steps_of_the_patch_may_be_wider_than_pixels() -> None:
    """Twice as wide, patches find a place from twice as far, though their pixels are coarser."""
    texture = Texture(shortest=16.0, longest=80.0)
    shift = np.array([0.6, -1.1])
    plain, moved = smooth(image_of(texture), 2.0), smooth(image_of(texture, shift=shift), 2.0)
    xy = anywhere(150, margin=35)
    true = xy + torch.from_numpy(shift).float()
    start = true + off_by(150, 4.0)
    found = align_patches(moved, Patches.prepare(cut_windows(plain, xy, 2.0)), affine_of(150, 2 * np.eye(2)), start)
    assert found.converged.all()
    distance = (found.xy - true).norm(dim=1)
    assert distance.median() < 0.02
    assert distance.max() < 0.08


@pytest.mark.parametrize("noise", [3.0, 6.0])
def test_the_uncertainty_is_that_of_white_noise(noise: float) -> None:
    found = find(FINE, shift=np.array([0.4, 0.2]), noise=noise)
    assert found.alignment.converged.all()
    claimed = found.alignment.uncertainty
    # What is claimed is the worst direction, so the error along both axes together is less than √2 times it.
    ratio = float(found.error.square().mean().sqrt() / claimed.square().mean().sqrt())
    assert 0.6 < ratio < 1.6
    # Patches that claim more err more.
    certain = claimed < claimed.median()
    assert found.distance[certain].mean() < 0.95 * found.distance[~certain].mean()


def test_the_uncertainty_grows_with_the_noise() -> None:
    claimed = [float(find(FINE, noise=noise).alignment.uncertainty.median()) for noise in (1.0, 2.0, 4.0)]
    assert claimed[1] == pytest.approx(2 * claimed[0], rel=0.15)
    assert claimed[2] == pytest.approx(4 * claimed[0], rel=0.15)


def test_nothing_to_see_is_not_certain() -> None:
    flat, xy = torch.full((HEIGHT, WIDTH), 77.0), anywhere(20)
    start = xy + 0.3
    blank = align_patches(flat, Patches.prepare(cut_windows(flat, xy, 1.0)), affine_of(20), start)
    assert blank.uncertainty.min() > 100
    assert torch.equal(blank.xy, start)
    texture = image_of(COARSE)
    for reference, image in ((flat, texture), (texture, flat)):
        found = align_patches(image, Patches.prepare(cut_windows(reference, xy, 1.0)), affine_of(20), start)
        assert found.correlation.abs().max() < 0.01
        assert found.uncertainty.min() > 10
        assert torch.isfinite(found.xy).all()


def test_along_an_edge_nothing_is_certain() -> None:
    stripes = 128 + 60 * np.tanh((np.arange(WIDTH) + 0.5 - 80) / 2)
    edge = torch.from_numpy(np.tile(stripes, (HEIGHT, 1))).float()
    xy = torch.stack([torch.full((50,), 80.3), torch.linspace(25, 95, 50)], dim=1)
    reference = Patches.prepare(cut_windows(edge, xy, 1.0))
    found = align_patches(edge, reference, affine_of(50), xy + torch.tensor([0.7, 1.0]))
    assert found.uncertainty.min() > 1
    assert (found.xy - xy)[:, 0].abs().max() < 0.02  # across the edge all is well
    rng = np.random.default_rng(0)
    noisy = [smooth(edge + 2 * torch.from_numpy(rng.normal(size=edge.shape)).float(), 1.0) for _ in range(2)]
    claimed = align_patches(noisy[1], Patches.prepare(cut_windows(noisy[0], xy, 1.0)), affine_of(50), xy).uncertainty
    textured = [
        smooth(image_of(COARSE) + 2 * torch.from_numpy(rng.normal(size=edge.shape)).float(), 1.0) for _ in range(2)
    ]
    xy = anywhere(50)
    others = align_patches(textured[1], Patches.prepare(cut_windows(textured[0], xy, 1.0)), affine_of(50), xy)
    # The noise of the reference looks like texture, and the edge seems to be known better than it is.
    assert claimed.min() > 3 * others.uncertainty.median()


def test_other_patches_do_not_correlate() -> None:
    stranger = smooth(image_of(Texture(seed=9, shortest=6.0)), 1.0)
    xy = anywhere(200)
    found = align_patches(
        stranger, Patches.prepare(cut_windows(smooth(image_of(FINE), 1.0), xy, 1.0)), affine_of(200), xy
    )
    # Smooth patches have few degrees of freedom, and some are alike by chance.
    assert 0 < (found.correlation > 0.75).float().mean() < 0.1
    assert found.correlation.median() < 0.6
    assert (found.converged & (found.correlation > 0.75) & (found.uncertainty < 0.25)).float().mean() < 0.06
    assert torch.isfinite(found.xy).all()


def test_a_negative_does_not_correlate() -> None:
    xy = anywhere(50)
    plain = smooth(image_of(COARSE), 1.0)
    found = align_patches(255 - plain, Patches.prepare(cut_windows(plain, xy, 1.0)), affine_of(50), xy)
    assert found.correlation.median() < -0.9
    assert found.correlation.max() < 0.75


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_step_is_bounded(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """However wrong it is, a patch does not leave its surroundings at once; the bound counts its own pixels."""
    monkeypatch.setattr(module, "MAX_ITERATIONS", 1)
    stranger, xy = smooth(image_of(Texture(seed=9, shortest=6.0)), 1.0), anywhere(100)
    reference = Patches.prepare(cut_windows(smooth(image_of(FINE), 1.0), xy, 1.0))
    found = align_patches(stranger, reference, affine_of(100, scale * np.eye(2)), xy)
    longest = (found.xy - xy).norm(dim=1).max()
    assert float(longest) == pytest.approx(scale * module.MAX_STEP, rel=1e-3)
    assert not found.converged.any()


def test_at_the_border_patches_are_cut_and_still_found() -> None:
    """Beyond the border there are its pixels again: places stay finite, and whole patches do better."""
    shift = np.array([0.4, -0.3])
    plain, moved = smooth(image_of(COARSE), 1.0), smooth(image_of(COARSE, shift=shift), 1.0)
    rows = torch.linspace(20, HEIGHT - 20, 40)
    distances, correlations = [], []
    for column in (1.5, 5.0, 20.0):
        xy = torch.stack([torch.full((40,), column), rows], dim=1)
        found = align_patches(moved, Patches.prepare(cut_windows(plain, xy, 1.0)), affine_of(40), xy)
        assert torch.isfinite(torch.cat([found.xy.flatten(), found.correlation, found.uncertainty])).all()
        distances.append((found.xy - xy - torch.from_numpy(shift).float()).norm(dim=1).median())
        correlations.append(found.correlation.median())
    assert distances[2] < 0.02 < distances[0]
    assert correlations[0] < correlations[1] < correlations[2]
    outside = torch.tensor([[-500.0, 20.0], [80.0, 1e4], [1e6, -1e6]])
    found = align_patches(moved, Patches.prepare(cut_windows(plain, anywhere(3), 1.0)), affine_of(3), outside)
    assert found.correlation.abs().max() < 0.7
    assert found.uncertainty.min() > 0.25
    assert torch.isfinite(found.xy).all()


def test_patches_do_not_know_each_other() -> None:
    plain, moved = smooth(image_of(FINE), 1.0), smooth(image_of(FINE, shift=np.array([1.2, -0.9])), 1.0)
    xy = anywhere(60)
    windows, affine = cut_windows(plain, xy, 1.0), affine_of(60)
    together = align_patches(moved, Patches.prepare(windows), affine, xy)
    for rows in (torch.arange(5), torch.tensor([41]), torch.arange(59, -1, -2)):
        alone = align_patches(moved, Patches.prepare(windows[rows]), affine[rows], xy[rows])
        for name in ("xy", "correlation", "uncertainty"):
            torch.testing.assert_close(getattr(alone, name), getattr(together, name)[rows], rtol=0.02, atol=1e-4)
        assert torch.equal(alone.converged, together.converged[rows])


def test_no_patches_are_found_nowhere() -> None:
    image, none = image_of(COARSE), torch.zeros(0, 2)
    windows = cut_windows(image, none, 1.0)
    assert windows.shape == (0, 2 * RADIUS + 3, 2 * RADIUS + 3)
    found = align_patches(image, Patches.prepare(windows), affine_of(0), none)
    assert [len(values) for values in found] == [0, 0, 0, 0]
    assert found.xy.shape == (0, 2)


def test_what_is_given_stays_as_it_is() -> None:
    image, xy = image_of(COARSE), anywhere(10)
    before = xy.clone(), image.clone()
    align_patches(image, Patches.prepare(cut_windows(image, xy + 1, 1.0)), affine_of(10), xy)
    assert torch.equal(xy, before[0])
    assert torch.equal(image, before[1])


def test_patches_are_normalised_and_their_gradient_is_the_derivative() -> None:
    image = smooth(image_of(COARSE), 1.0)
    xy = anywhere(30)
    patches = Patches.prepare(cut_windows(image, xy, 1.0))
    pixels = ((2 * RADIUS + 1) ** 2 + 1) // 2
    assert patches.values.shape == (30, pixels)
    assert patches.gradient.shape == (30, 2, pixels)
    # The place of a patch moved by a little, to first order, without a change of gain and offset: the same values as
    # the gradient predicts, up to what a gain and an offset explain.
    for axis, move in enumerate(torch.tensor([[0.1, 0.0], [0.0, 0.1]])):
        change = (Patches.prepare(cut_windows(image, xy + move, 1.0)).values - patches.values) / 0.1
        gradient = patches.gradient[:, axis]
        cosine = (change * gradient).sum(dim=1) / change.norm(dim=1) / gradient.norm(dim=1)
        assert cosine.min() > 0.97
    torch.testing.assert_close(patches.precision, patches.precision.transpose(1, 2))
    assert torch.linalg.eigvalsh(patches.precision).min() > 0


def test_values_between_pixels_are_colmaps() -> None:
    """The centre of the top-left pixel is (0.5, 0.5); beyond the border there are its pixels."""
    image = torch.arange(12.0).reshape(3, 4)
    places = torch.tensor([[[0.5, 0.5], [1.5, 0.5], [3.5, 2.5]], [[1.0, 0.5], [0.5, 1.0], [1.0, 1.0]]])
    torch.testing.assert_close(sample(image, places), torch.tensor([[0.0, 1.0, 11.0], [0.5, 2.0, 2.5]]))
    outside = torch.tensor([[-3.0, 0.5], [100.0, 100.0], [0.0, 0.0]])
    torch.testing.assert_close(sample(image, outside), torch.tensor([0.0, 11.0, 0.0]))


def test_windows_show_the_image_around_a_place() -> None:
    image = image_of(COARSE)
    (window,) = cut_windows(image, torch.tensor([[60.5, 40.5]]), 1.0).float()
    reach = RADIUS + 1
    torch.testing.assert_close(window, image[40 - reach : 41 + reach, 60 - reach : 61 + reach], rtol=1e-3, atol=0.1)
    (wide,) = cut_windows(image, torch.tensor([[60.5, 40.5]]), 3.0).float()
    wanted = image[40 - 3 * reach : 41 + 3 * reach : 3, 60 - 3 * reach : 61 + 3 * reach : 3]
    torch.testing.assert_close(wide, wanted, rtol=1e-3, atol=0.1)


@pytest.mark.parametrize("sigma", [1.0, 2.5, 8.0])
def test_smoothing_is_a_gaussian(sigma: float) -> None:
    side = 101
    point = torch.zeros(side, side)
    point[50, 50] = 1000.0
    spread = smooth(point, sigma)
    assert spread.shape == point.shape
    assert float(spread.sum()) == pytest.approx(1000, rel=1e-3)
    steps = torch.arange(side) - 50.0
    for axis in (0, 1):
        profile = spread.sum(dim=axis) / 1000
        assert float((profile * steps).sum()) == pytest.approx(0, abs=1e-3)
        assert float((profile * steps**2).sum()) == pytest.approx(sigma**2, rel=0.05)
    flat = torch.full((40, 60), 12.0)
    torch.testing.assert_close(smooth(flat, sigma), flat)


def test_what_leaves_for_good_is_given_up() -> None:
    image, xy = image_of(COARSE), anywhere(60)
    reference = Patches.prepare(cut_windows(smooth(image, 1.0), xy, 1.0))
    start = xy + torch.tensor([3.5, 0.0])
    free, bound = (align_patches(image, reference, affine_of(60), start, reach=reach) for reach in (math.inf, 1.0))
    assert free.converged.float().mean() > 0.8
    # They have to go farther than they may.
    assert not bound.converged[free.converged].any()
    assert float((bound.xy - start).norm(dim=1).max()) < 1.0 + 1.5
