"""What overlays do to matching: photos of four places under one logo, frame or bonnet, and photos as they are.

What the thresholds of `matching/overlay.py` rest on. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import torch
from common import data_root
from PIL import Image, ImageDraw, ImageOps
from retrieval_purity import encode_all

from mast3r_sfm.config import Config, MatchConfig
from mast3r_sfm.matching.check import Putative, check_pair
from mast3r_sfm.matching.overlay import overlay_matches
from mast3r_sfm.matching.putative import KeypointSource, match_keypoints
from mast3r_sfm.models.base import KeypointModel
from mast3r_sfm.models.registry import load_model
from mast3r_sfm.types import Encoding, ImageRecord, LoadedImage, PixelTransform, Verdict

SETS = ("strecha_fountain_p11", "lund_door", "sceaux_castle", "vggsfm_kitchen25")
PHOTOS = 6
SIZE = (1024, 680)
NEIGHBOURS = 10


def pattern(size: tuple[int, int]) -> Image.Image:
    """Blocks of 8 pixels in random colours."""
    blocks = np.random.default_rng(1).integers(0, 255, (size[1] // 8 + 1, size[0] // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def logo(photo: Image.Image) -> None:
    """A label in the corner."""
    photo.paste(pattern((170, 85)), (photo.width - 180, photo.height - 95))


def centre(photo: Image.Image) -> None:
    """A label in the middle."""
    photo.paste(pattern((204, 102)), (photo.width // 2 - 102, photo.height // 2 - 51))


def frame(photo: Image.Image) -> None:
    """A printed frame, 6 % of the width."""
    inner = ImageOps.crop(photo, photo.width // 16)
    photo.paste(pattern(photo.size), (0, 0))
    photo.paste(inner, (photo.width // 16, photo.width // 16))


def bonnet(photo: Image.Image) -> None:
    """The lowest quarter belongs to the car."""
    width, height = photo.size
    shape = Image.new("L", photo.size, 0)
    ImageDraw.Draw(shape).ellipse((-0.1 * width, 0.75 * height, 1.1 * width, 1.5 * height), fill=255)
    with Image.open(sorted((data_root() / "lund_door" / "images").iterdir())[0]) as other:
        photo.paste(ImageOps.fit(other.convert("RGB"), photo.size), (0, 0), shape)


def encode_under(model: KeypointModel, overlay: Callable[[Image.Image], None]) -> tuple[list[Encoding], list[str]]:
    """Encodings of some photos of each place under the overlay, and the place of each."""
    encodings, places = [], []
    for name in SETS:
        files = sorted((data_root() / name / "images").iterdir())
        for file in files[:: -(-len(files) // PHOTOS)]:
            with Image.open(file) as photo:
                drawn = ImageOps.fit(photo.convert("RGB"), SIZE)
            overlay(drawn)
            compressed = io.BytesIO()
            drawn.save(compressed, "JPEG", quality=90)
            record = ImageRecord(name=file.name, width_px=SIZE[0], height_px=SIZE[1], sha256="0" * 64)
            pixels = np.array(Image.open(compressed))
            loaded = LoadedImage(record=record, pixels=pixels, transform=PixelTransform(matrix=np.eye(2, 3)))
            encodings += model.encode([loaded])
            places.append(name)
    return encodings, places


def match(views: tuple[Encoding, Encoding], config: MatchConfig) -> Putative:
    """By the model's keypoints."""
    source = KeypointSource(encodings=views, min_similarity=config.min_similarity, max_ratio=config.max_ratio)
    return match_keypoints(views, source, views)


def judge(encodings: Sequence[Encoding], places: Sequence[str]) -> dict[str, int]:
    """Pairs of different places, how many are taken for links with and without the overlay known, and named."""
    config = Config().match
    figures = {"pairs": 0, "links": 0, "links_if_unknown": 0, "named": 0}
    for first, second in combinations(range(len(places)), 2):
        if places[first] != places[second]:
            putative = match((encodings[first], encodings[second]), config)
            edge = check_pair((first, second), putative, config, seed=0)
            blind = check_pair((first, second), replace(putative, frames=None), config, seed=0)
            figures["pairs"] += 1
            figures["links"] += edge.verdict.is_link
            figures["links_if_unknown"] += blind.verdict.is_link
            figures["named"] += edge.verdict is Verdict.WATERMARK
    return figures


def count_in_plain_photos() -> tuple[int, int]:
    """Pairs of photos as they are, each with its next ones of the same set, and in how many an overlay is seen."""
    encodings, places, _ = encode_all()
    seen = pairs = 0
    for first, second in combinations(range(len(places)), 2):
        if places[first] == places[second] and second - first <= NEIGHBOURS:
            putative = match((encodings[first], encodings[second]), Config().match)
            if putative.frames is not None:
                pairs += 1
                seen += bool(overlay_matches(putative.xy_first, putative.xy_second, putative.frames).any())
    return pairs, seen


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plain", action="store_true", help="also look for overlays in all sets as they are")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model("xfeat", device="cpu", config=Config().encode)
    if not isinstance(model, KeypointModel):
        raise TypeError("xfeat is a keypoint model")
    figures: dict[str, object] = {"benchmark": "overlays"}
    for overlay in (logo, centre, frame, bonnet):
        found = judge(*encode_under(model, overlay))
        figures[overlay.__name__] = found
        print(
            f"{overlay.__name__}: of {found['pairs']} pairs of different places, {found['links']} taken for links "
            f"({found['links_if_unknown']} if nothing were known of overlays), {found['named']} named"
        )
    if arguments.plain:
        figures["plain_pairs"], figures["plain_seen"] = count_in_plain_photos()
        print(f"photos as they are: an overlay in {figures['plain_seen']} of {figures['plain_pairs']} pairs")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
