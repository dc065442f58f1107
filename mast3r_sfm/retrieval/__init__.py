"""The pairs stage: which photos are worth matching, told from their tokens alone."""

from mast3r_sfm.retrieval.stage import build_view_graph

__all__ = ["build_view_graph"]
