"""Retrieval on all photo sets thrown together: are the nearest images of the same place, and does the graph hold them?

    python benchmarks/retrieval_purity.py [--tokens N] [--words N] [--threads N]

The sets mix_* and junk_*, which repeat photos of other sets, are left out. Of a place with fewer than eleven photos, as
many nearest images are looked at as it has others.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import replace

import common
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mast3r_sfm.config import Config, PairsConfig
from mast3r_sfm.images.listing import list_images
from mast3r_sfm.images.loading import load_image
from mast3r_sfm.models.base import ImageModel
from mast3r_sfm.models.registry import load_model
from mast3r_sfm.progress import SilentProgress
from mast3r_sfm.retrieval.stage import choose_pairs
from mast3r_sfm.types import Encoding, Float32, ImageRecord, ImageSet, ViewGraph

NEAREST = 10
# Rendered from photos of these places.
SAME_PLACE = {
    "synth_planar_a": "strecha_fountain_p11",
    "strecha_herzjesu_p8": "strecha_herzjesu_p25",
    "synth_pure_rotation_b": "strecha_herzjesu_p25",
}


def encode_all(model: ImageModel | None = None) -> tuple[list[Encoding], list[str], list[ImageRecord]]:
    """The encodings of all photos with a model (by default XFeat), the place each shows, and their records."""
    config = Config()
    model = model or load_model("xfeat", device="cpu", config=config.encode)
    encodings, places, records = [], [], []
    for name in common.all_sets():
        if name.startswith(("mix_", "junk_")):
            continue
        photos = list_images(common.data_root() / name / "images", config.prepare, SilentProgress())
        pattern = common.SCENE_IN_NAME.get(name)
        for record in photos.records:
            records.append(replace(record, name=f"{name}/{record.name}"))
            encodings += model.encode([load_image(photos.root, record, model.preparation)])
            scene = pattern.fullmatch(record.name) if pattern else None
            places.append(scene[1] if scene else SAME_PLACE.get(name, name))
    return encodings, places, records


def same_place_counts(similarity: Float32, places: NDArray[np.str_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each image: how many of its nearest images show its place, and how many were looked at."""
    values = similarity.copy()
    np.fill_diagonal(values, -1)
    order = np.argsort(-values, axis=1, kind="stable")
    looked_at = np.array([min(NEAREST, int((places == place).sum()) - 1) for place in places])
    same = places[order[:, :NEAREST]] == places[:, None]
    return (same & (np.arange(NEAREST) < looked_at[:, None])).sum(axis=1), looked_at


def parts_of_places(graph: ViewGraph, places: NDArray[np.str_]) -> dict[str, int]:
    """Into how many parts each place falls when only pairs within places count."""
    pairs = graph.pairs[places[graph.pairs[:, 0]] == places[graph.pairs[:, 1]]]
    edges = coo_array((np.ones(len(pairs)), tuple(pairs.T)), shape=(graph.num_images, graph.num_images))
    label = connected_components(edges, directed=False)[1]
    return {str(place): len(set(label[places == place].tolist())) for place in np.unique(places)}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=0, help="tokens per image; 0 = what suits the model")
    parser.add_argument("--words", type=int, default=0, help="words of the codebook; 0 = what suits the collection")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    started = time.perf_counter()
    encodings, place_list, records = encode_all()
    encoded = time.perf_counter()
    model_tokens = load_model("xfeat", device="cpu").retrieval_tokens
    settings = PairsConfig(tokens_per_image=options.tokens, codebook_words=options.words)
    begin = time.perf_counter()
    chosen = choose_pairs(
        encodings,
        ImageSet(root=common.data_root(), records=tuple(records)),
        settings,
        model_tokens=model_tokens,
        seed=0,
        progress=SilentProgress(),
        threads=options.threads,
    )
    seconds = time.perf_counter() - begin

    places = np.array(place_list)
    good, looked_at = same_place_counts(chosen.similarity, places)
    parts = parts_of_places(chosen.graph, places)
    print(f"{'place':28} photos  same  parts")
    for place, photos in sorted(Counter(place_list).items()):
        mine = places == place
        print(f"{place:28} {photos:6}  {good[mine].sum() / max(looked_at[mine].sum(), 1):.3f}  {parts[place]:4}")
    figures = {
        "photos": len(places),
        "places": len(parts),
        "same_place_share": round(float(good.sum() / looked_at.sum()), 4),
        "parts_of_places": sum(parts.values()),
        "places_in_one_part": sum(count == 1 for count in parts.values()),
        "pairs": len(chosen.graph.pairs),
        "ratio_pairs": round(len(chosen.graph.pairs) / (len(places) * (len(places) - 1) / 2), 4),
        "encode_seconds": round(encoded - started, 2),
        "pairs_stage_seconds": round(seconds, 2),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
