"""Checked pairs as arrays, in which form they stand on disk."""

from __future__ import annotations

import numpy as np

from mast3r_sfm.matching.check import EpipolarEdge
from mast3r_sfm.storage.cache import Arrays
from mast3r_sfm.types import Float64, Verdict

_VERDICTS = list(Verdict)


def pack_edges(edges: list[EpipolarEdge]) -> Arrays:
    """As arrays, one row per edge and the matches of all edges in a row."""
    none: Float64 = np.zeros((0, 3))
    points = [(edge.points_first, edge.points_second) for edge in edges]
    return {
        "pairs": np.array([(edge.first, edge.second) for edge in edges], np.int32).reshape(-1, 2),
        "length": np.array([len(edge.xy_first) for edge in edges], np.int64),
        "has_points": np.array([first is not None for first, _ in points], np.bool_),
        "xy_first": np.concatenate([edge.xy_first for edge in edges]),
        "xy_second": np.concatenate([edge.xy_second for edge in edges]),
        "confidence": np.concatenate([edge.confidence for edge in edges]),
        "is_distinct": np.concatenate([edge.is_distinct for edge in edges]),
        "points_first": np.concatenate([none if first is None else first for first, _ in points]),
        "points_second": np.concatenate([none if second is None else second for _, second in points]),
        "fundamental": np.stack([edge.fundamental for edge in edges]),
        "homography": np.stack([edge.homography for edge in edges]),
        "homography_share": np.array([edge.homography_share for edge in edges]),
        "num_putative": np.array([edge.num_putative for edge in edges], np.int64),
        "num_rejected": np.array([len(edge.rejected) for edge in edges], np.int64),
        "rejected": np.concatenate([edge.rejected for edge in edges]),
        "verdict": np.array([_VERDICTS.index(edge.verdict) for edge in edges], np.int32),
        "decode_disagreement_deg": np.array([edge.decode_disagreement_deg for edge in edges]),
    }


def unpack_edges(arrays: Arrays) -> list[EpipolarEdge]:
    """What `pack_edges` packed."""
    ends = np.cumsum(arrays["length"])
    point_ends = np.cumsum(arrays["length"] * arrays["has_points"])
    rejected_ends = np.cumsum(arrays["num_rejected"])
    edges = []
    for row, end in enumerate(ends):
        part = slice(int(end - arrays["length"][row]), int(end))
        has_points = bool(arrays["has_points"][row])
        rejected = slice(int(rejected_ends[row] - arrays["num_rejected"][row]), int(rejected_ends[row]))
        points = slice(int(point_ends[row] - arrays["length"][row]), int(point_ends[row]))
        edges.append(
            EpipolarEdge(
                first=int(arrays["pairs"][row, 0]),
                second=int(arrays["pairs"][row, 1]),
                xy_first=arrays["xy_first"][part],
                xy_second=arrays["xy_second"][part],
                confidence=arrays["confidence"][part],
                is_distinct=arrays["is_distinct"][part],
                points_first=arrays["points_first"][points] if has_points else None,
                points_second=arrays["points_second"][points] if has_points else None,
                fundamental=arrays["fundamental"][row],
                homography=arrays["homography"][row],
                homography_share=float(arrays["homography_share"][row]),
                num_putative=int(arrays["num_putative"][row]),
                rejected=arrays["rejected"][rejected],
                verdict=_VERDICTS[int(arrays["verdict"][row])],
                decode_disagreement_deg=float(arrays["decode_disagreement_deg"][row]),
            )
        )
    return edges
