"""How many matches agree by chance: pairs of photos of different places through matching and the two-view check.

What the thresholds of the match stage rest on: the distinct matches that agree with one epipolar geometry, of the
default model's keypoints, of SIFT's, and of both. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from retrieval_purity import encode_all

from mast3r_sfm.config import Config, MatchConfig
from mast3r_sfm.matching.check import EpipolarEdge, check_pair
from mast3r_sfm.matching.putative import KeypointSource, join_putative, match_keypoints
from mast3r_sfm.models.sift import SiftModel
from mast3r_sfm.types import Encoding


def sources_of(own: Sequence[Encoding], config: MatchConfig) -> Mapping[str, list[KeypointSource]]:
    """What `match.features` stands for, by its names."""
    model = KeypointSource(encodings=own, min_similarity=config.min_similarity, max_ratio=config.max_ratio)
    detector = SiftModel()
    sift = KeypointSource(
        encodings=encode_all(detector)[0], min_similarity=detector.min_similarity, max_ratio=detector.max_ratio
    )
    return {"model": [model], "sift": [sift], "both": [sift, model]}


def draw_pairs(places: Sequence[str], count: int, seed: int) -> list[tuple[int, int]]:
    """Pairs of photos of different places, each once."""
    rng = np.random.default_rng(seed)
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < count:
        first, second = sorted(rng.choice(len(places), 2, replace=False).tolist())
        if places[first] != places[second]:
            pairs[first, second] = None
    return list(pairs)


def check(
    pair: tuple[int, int], sources: Sequence[KeypointSource], pixels: Sequence[Encoding], config: MatchConfig
) -> EpipolarEdge:
    """One pair as the match stage does it, in the pixels of the default model."""
    first, second = pair
    parts = [
        match_keypoints((source.encodings[first], source.encodings[second]), source, (pixels[first], pixels[second]))
        for source in sources
    ]
    return check_pair(pair, join_putative(parts), config, seed=0)


def summarise(edges: Sequence[EpipolarEdge], config: MatchConfig) -> dict[str, float]:
    """How far chance reaches."""
    putative, inliers, evidence = np.array(
        [(edge.num_putative, edge.num_inliers, edge.num_inliers * edge.inlier_ratio**2) for edge in edges], np.float64
    ).T
    excess = inliers - config.chance_share * putative
    return {
        "taken_for_links": sum(edge.verdict.is_link for edge in edges),
        "distinct_p99": float(np.percentile(putative, 99)),
        "inliers_p99": float(np.percentile(inliers, 99)),
        "inliers_max": float(inliers.max()),
        "excess_p99": float(np.percentile(excess, 99)),
        "excess_max": float(excess.max()),
        "evidence_max": float(evidence.max()),
    }


def main() -> None:
    """Draw pairs of different places and print how far their inliers reach."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    config = Config().match
    own, places, _ = encode_all()
    pairs = draw_pairs(places, arguments.pairs, arguments.seed)
    figures: dict[str, object] = {"benchmark": "chance_matches", "pairs": len(pairs), "photos": len(places)}
    for name, sources in sources_of(own, config).items():
        found = summarise([check(pair, sources, own, config) for pair in pairs], config)
        figures[name] = found
        print(
            f"{name}: {found['taken_for_links']} of {len(pairs)} pairs of different places taken for links before the "
            f"slow matcher is asked; distinct inliers at most {found['inliers_max']:.0f}, beyond {config.chance_share} "
            f"per distinct match 99 % below {found['excess_p99']:.1f}, all below {found['excess_max']:.1f} (allowed: "
            f"{config.min_inliers}); evidence at most {found['evidence_max']:.1f}",
            flush=True,
        )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
