"""The pairs stage: which photos are worth matching, told from their tokens, their order, their positions or a list."""

from mast3r_sfm.retrieval.stage import ChosenPairs, choose_pairs

__all__ = ["ChosenPairs", "choose_pairs"]
