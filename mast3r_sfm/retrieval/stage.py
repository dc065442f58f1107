"""The pairs stage: tokens → whitening → codebook → binary ASMK → view graph, joined with what else tells of pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mast3r_sfm.config import PairsConfig
from mast3r_sfm.progress import Progress, steps
from mast3r_sfm.retrieval.features import Vocabulary
from mast3r_sfm.retrieval.graph import (
    connected,
    exhaustive_graph,
    graph_of_pairs,
    reserve,
    retrieval_graph,
    union,
    view_graph,
)
from mast3r_sfm.retrieval.similarity import Similarity, measure_similarity, shown_matrix
from mast3r_sfm.retrieval.sources import gps_pairs, read_pairs, sequential_pairs, swin_pairs
from mast3r_sfm.types import Encoding, Float32, ImageSet, Int64, Reason, ViewGraph

KINDS = {
    Reason.KEYFRAME: "between keyframes",
    Reason.NEAREST: "with the nearest keyframe",
    Reason.NEIGHBOUR: "with similar photos",
    Reason.BRIDGE: "as bridges between parts",
    Reason.USER: "of the list",
    Reason.SEQUENCE: "by the order of the names",
    Reason.GPS: "by GPS position",
    Reason.EXHAUSTIVE: "of all photos",
}
"""The kinds of pairs, for people."""
_RESERVE = 2
"""How many times `pairs.neighbours` pairs of each image are kept for the second round."""


@dataclass(frozen=True, kw_only=True)
class ChosenPairs:
    """What the pairs stage found."""

    graph: ViewGraph
    """The pairs to be matched."""
    reserve: ViewGraph
    """The next most similar ones, of which a second round may choose; empty where none is wanted."""
    similarity: Float32
    """[M, M] symmetric, in [0, 1], with ones on the diagonal; an image without tokens is similar to nothing. Of all
    images, or of some, evenly spaced, where a matrix of all would be too large (`shown_matrix`)."""


def choose_pairs(
    encodings: Sequence[Encoding],
    photos: ImageSet,
    config: PairsConfig,
    *,
    model_tokens: int,
    seed: int,
    progress: Progress,
    threads: int = 1,
    vocabulary: Vocabulary | None = None,
) -> ChosenPairs:
    """Decide which pairs of images are to be matched.

    Also a collection small enough to be matched exhaustively gets its similarity from ASMK: its codebook is small, so
    that this costs about a hundredth of the matching, and the score of a pair means the same everywhere. Except where
    the user's list is the only source, parts that no pair joins are joined by bridges.

    Args:
        encodings: one per image; may read them from disk, each is asked for twice and none is kept.
        photos: the images' names and GPS positions.
        config: settings of the stage.
        model_tokens: tokens of highest attention that suit the model, used where the config leaves it open.
        seed: of the tokens that the codebook is learnt from, and of its first centroids.
        progress: told of two steps per image, and of what was decided.
        threads: that score images side by side; the result does not depend on their number.
        vocabulary: what tokens are compared by; None: it is learnt from the collection.

    Raises:
        ShapeError: the encodings differ in their number of channels.
        InputError: the list of pairs cannot be used, or no photo has a GPS position.
    """
    with steps(progress, "pairs", 2 * len(encodings), "image"):
        # First of all, so that a list that cannot be used is found out at once.
        given = {
            source: pairs
            for source in config.sources
            if (pairs := _given_pairs(source, photos, config, progress)) is not None
        }
        similarity = measure_similarity(
            encodings,
            config,
            model_tokens=model_tokens,
            seed=seed,
            progress=progress,
            threads=threads,
            vocabulary=vocabulary,
        )
        graph = _joined_graph(given, similarity, config)
        spare = _RESERVE * config.neighbours if config.second_round and config.sources != ("file",) else 0
        progress.note(_summary(graph))
    return ChosenPairs(graph=graph, reserve=reserve(similarity, graph, spare), similarity=shown_matrix(similarity))


def _joined_graph(given: Mapping[str, tuple[Int64, Reason]], similarity: Similarity, config: PairsConfig) -> ViewGraph:
    """The union of all sources."""
    graphs = []
    for source in config.sources:
        if source in given:
            graphs.append(graph_of_pairs(similarity, *given[source]))
        elif source == "exhaustive":
            graphs.append(exhaustive_graph(similarity))
        elif source == "retrieval":
            keyframes = config.keyframes_of(len(similarity))
            graphs.append(retrieval_graph(similarity, keyframes=keyframes, neighbours=config.neighbours))
        else:
            graphs.append(view_graph(similarity, config))
    joined = union(graphs)
    return joined if config.sources == ("file",) else connected(joined, similarity)


def _given_pairs(source: str, photos: ImageSet, config: PairsConfig, progress: Progress) -> tuple[Int64, Reason] | None:
    """The pairs of a source that needs no similarity; None of one that does."""
    if source == "sequential":
        return sequential_pairs(photos.names, config.window), Reason.SEQUENCE
    if source == "swin":
        return swin_pairs(photos.names, config.window), Reason.SEQUENCE
    if source == "gps":
        return gps_pairs(photos.records, config.neighbours), Reason.GPS
    if source == "file":
        left_out = [entry.name for entry in photos.left_out]
        return read_pairs(Path(config.file), photos.names, left_out, progress), Reason.USER
    return None


def _summary(graph: ViewGraph) -> str:
    pairs, every = len(graph.pairs), graph.num_images * (graph.num_images - 1) // 2
    if pairs == every:
        return f"all {pairs:,} pairs of {graph.num_images:,} photos are matched"
    count = Counter(graph.reason.tolist())
    kinds = ", ".join(f"{count[kind]:,} {text}" for kind, text in KINDS.items() if count[kind])
    return f"{pairs:,} of {every:,} pairs are matched: {kinds}"
