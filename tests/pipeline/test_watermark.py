"""Photos that share nothing but what was drawn over them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mast3r_sfm.matching import check
from tests.pipeline.conftest import Reconstruct, Run
from tests.surfaces import Surface, Texture, arc

HOUSE = 6


def logo() -> Image.Image:
    """A bright label with a name and a pattern, as large as a quarter of a photo is wide."""
    pattern = np.random.default_rng(1).integers(0, 255, (9, 20, 3), dtype=np.uint8)
    label = Image.fromarray(pattern).resize((120, 54), Image.Resampling.NEAREST)
    ImageDraw.Draw(label).text((12, 10), "ACME", fill="white", font=ImageFont.load_default(size=30))
    return label


def hills(number: int) -> list[Image.Image]:
    """Photos of a bumpy surface, which look like nothing on the house."""
    surface = Surface(texture=Texture(seed=3, shortest=0.08, longest=0.6), bumps=0.3)
    cameras = arc(5, turn_deg=30.0, focal_px=420.0, width_px=448, height_px=336)
    photos = (surface.photograph(cameras, image) for image in range(number))
    return [Image.fromarray(grey.round().astype(np.uint8)).convert("RGB") for grey in photos]


def write_marked(repository: Path, folder: Path, number_of_hills: int) -> Path:
    """Photos of the example's house and of hills, all with the same label in one corner."""
    folder.mkdir()
    names = sorted((repository / "examples" / "house" / "images").iterdir())[: 2 * HOUSE : 2]
    photos = [("house", ImageOps.fit(Image.open(name), (448, 336))) for name in names]
    photos += [("hills", photo) for photo in hills(number_of_hills)]
    label = logo()
    for number, (scene, photo) in enumerate(photos):
        photo.paste(label, (photo.width - label.width - 6, photo.height - label.height - 6))
        photo.save(folder / f"{scene}{number:02d}.jpg", quality=90)
    return folder


def scenes_of_models(run: Run) -> list[list[str]]:
    return [sorted({name[:5] for name in model.images}) for model in run.report.models]


def counts(run: Run) -> dict[str, float]:
    return next(stage.counts for stage in run.report.stages if stage.stage == "match")


def test_two_scenes_with_one_logo_are_two_models(
    repository: Path, run_small: Reconstruct, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_marked(repository, tmp_path / "photos", 5)
    run = run_small(photos, tmp_path / "out")
    assert scenes_of_models(run) == [["house"], ["hills"]]
    assert [len(model.images) for model in run.report.models] == [HOUSE, 5]
    assert run.report.left_out == ()
    assert 20 <= counts(run)["watermark"] <= HOUSE * 5
    assert counts(run)["links"] <= 15 + 10
    # Were nothing known of overlays, pairs of both scenes would pass, and only their contradictions tell.
    monkeypatch.setattr(check, "overlay_matches", lambda xy_first, *_: np.zeros(len(xy_first), np.bool_))
    blind = run_small(photos, tmp_path / "blind")
    assert counts(blind)["watermark"] == 0
    assert counts(blind)["links"] >= 15 + 10 + 5


def test_a_photo_that_shares_only_the_logo_is_told_so(repository: Path, run_small: Reconstruct, tmp_path: Path) -> None:
    run = run_small(write_marked(repository, tmp_path / "photos", 1), tmp_path / "out")
    assert scenes_of_models(run) == [["house"]]
    (left_out,) = run.report.left_out
    assert left_out.name == "hills06.jpg"
    assert re.fullmatch(r"matches [3-6] other photos, but only on .* watermark.*", left_out.reason)
