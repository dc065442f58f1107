"""How many matches agree by chance: pairs of photos of different places through matching and the two-view check.

What the thresholds of the match stage rest on. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from retrieval_purity import encode_all

from mast3r_sfm.config import Config
from mast3r_sfm.matching.check import check_pair
from mast3r_sfm.matching.putative import match_keypoints


def main() -> None:
    """Draw pairs of different places and print how far their inliers reach."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    config = Config().match
    encodings, places = encode_all()
    rng = np.random.default_rng(arguments.seed)
    rows = []
    while len(rows) < arguments.pairs:
        first, second = sorted(rng.choice(len(places), 2, replace=False).tolist())
        if places[first] != places[second]:
            putative = match_keypoints(encodings[first], encodings[second], config)
            edge = check_pair((first, second), putative, config, seed=0)
            rows.append((edge.num_putative, len(edge.xy_first), edge.inlier_ratio, edge.verdict.is_link))
    putatives, inliers, ratio, linked = np.array(rows, np.float64).T
    excess = inliers - config.chance_share * putatives
    figures = {
        "benchmark": "chance_matches",
        "pairs": len(rows),
        "taken_for_links": int(linked.sum()),
        "excess_p99": float(np.percentile(excess, 99)),
        "excess_max": float(excess.max()),
        "evidence_max": float((inliers * ratio**2).max()),
    }
    print(
        f"{len(rows)} pairs of different places: {int(linked.sum())} taken for links before the slow matcher is asked"
    )
    print(
        f"inliers beyond {config.chance_share} per match: 99 % below {figures['excess_p99']:.1f}, all below "
        f"{figures['excess_max']:.1f} (allowed: {config.min_inliers})"
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
