"""The points that a pointmap model's two decodes of a pair give its matches, and whether both tell the same story."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mast3r_sfm.geometry.rigid import angle_between_rotations
from mast3r_sfm.geometry.similarity import Similarity, align_similarity_robust, spanned_dimensions
from mast3r_sfm.matching.check import MatchedPoints
from mast3r_sfm.types import Float64

MIN_MATCHES = 8
MAX_FITTED = 1000
"""Matches, evenly picked, to which similarities are fitted: more make them slower rather than better."""
CONTRADICTION_DEG = 180.0
"""Where points in one place or on one line fix no rotation, the decodes are taken to contradict each other wholly."""


@dataclass(frozen=True)
class DecodedPoints:
    """K matches, by each decode; each has a scale of its own."""

    first: Float64
    """[K, 3] pixels of the first image, in the first camera's frame, by the forward decode."""
    second_in_first: Float64
    """[K, 3] pixels of the second image, in the first camera's frame, by the forward decode."""
    second: Float64
    """[K, 3] pixels of the second image, in the second camera's frame, by the backward decode."""
    first_in_second: Float64
    """[K, 3] pixels of the first image, in the second camera's frame, by the backward decode."""

    def matched(self) -> MatchedPoints:
        """Points in both cameras' frames in one scale, that of the forward decode, and how far the decodes disagree.

        The rotation from the first camera to the second follows once from the pixels of the second image and once from
        those of the first, by robust similarities; the disagreement is the angle between both. It is 180 degrees where
        no rotation follows because points coincide or lie on one line, and 0 for fewer than MIN_MATCHES matches.
        """
        disagreement, scale = 0.0, 1.0
        if len(self.first) >= MIN_MATCHES:
            some = slice(None, None, -(-len(self.first) // MAX_FITTED))
            by_second = _fit(self.second[some], self.second_in_first[some])
            by_first = _fit(self.first_in_second[some], self.first[some])
            disagreement = CONTRADICTION_DEG
            if by_second is not None and by_first is not None:
                scale = by_second.scale
                disagreement = float(np.degrees(angle_between_rotations(by_second.rotation, by_first.rotation)))
        return MatchedPoints(first=self.first, second=scale * self.second, decode_disagreement_deg=disagreement)


def _fit(source: Float64, target: Float64) -> Similarity | None:
    """The similarity of two point sets; None where what agrees of them fixes no rotation."""
    if min(map(spanned_dimensions, (source, target))) < 2:
        return None
    similarity, agreeing = align_similarity_robust(source, target)
    if min(map(spanned_dimensions, (source[agreeing], target[agreeing]))) < 2:
        return None
    return similarity
