"""Textures: rich, not repeating, the same from everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from mast3r_sfm.synthetic.texture import Material, Pattern, surface_colour

SIDE = 200


def sheet(material: Material, origin: tuple[float, float] = (0.0, 0.0), footprint: float = 0.005, face: int = 0):
    """[SIDE, SIDE, 3] colours of one square unit."""
    u, v = np.meshgrid(np.linspace(0, 1, SIDE), np.linspace(0, 1, SIDE))
    uv = np.stack([u.ravel() + origin[0], v.ravel() + origin[1]], axis=-1).astype(np.float32)
    faces = np.full(len(uv), face, dtype=np.uint32)
    size = np.full(len(uv), footprint, dtype=np.float32)
    return surface_colour(material, uv, faces, size).reshape(SIDE, SIDE, 3)


def correlation(first, second) -> float:
    return float(np.corrcoef(first.mean(axis=-1).ravel(), second.mean(axis=-1).ravel())[0, 1])


@pytest.mark.parametrize("pattern", ["plain", "brick", "tiles", "planks"])
def test_every_pattern_has_structure_at_coarse_and_fine_scale(pattern: Pattern) -> None:
    grey = sheet(Material(seed=5, colour=(0.4, 0.4, 0.4), pattern=pattern)).mean(axis=-1)
    blocks = grey.reshape(10, 20, 10, 20).mean(axis=(1, 3))
    fine = np.abs(np.diff(grey, axis=1))
    assert 0.01 < blocks.std() < 0.3
    assert 0.002 < fine.mean() < 0.1
    assert 0.1 < grey.mean() < 0.8


def test_other_places_faces_and_seeds_look_different() -> None:
    material = Material(seed=5, colour=(0.4, 0.4, 0.4))
    here = sheet(material)
    assert correlation(here, sheet(material)) == pytest.approx(1.0)
    for other in (
        sheet(material, origin=(8.0, 0.0)),
        sheet(material, origin=(0.0, -13.0)),
        sheet(material, face=1),
        sheet(Material(seed=6, colour=(0.4, 0.4, 0.4))),
    ):
        assert abs(correlation(here, other)) < 0.5


def test_a_wide_footprint_keeps_the_mean_and_drops_the_detail() -> None:
    material = Material(seed=5, colour=(0.4, 0.4, 0.4))
    sharp, soft = sheet(material), sheet(material, footprint=0.4)
    assert soft.mean() == pytest.approx(sharp.mean(), rel=0.15)
    assert np.abs(np.diff(soft, axis=1)).mean() < 0.2 * np.abs(np.diff(sharp, axis=1)).mean()


def test_without_contrast_and_marks_there_is_one_flat_colour() -> None:
    flat = sheet(Material(seed=5, colour=(0.4, 0.3, 0.2), contrast=0.0, marks=0.0))
    np.testing.assert_allclose(flat, np.broadcast_to([0.4, 0.3, 0.2], flat.shape), rtol=1e-6)
