"""The pairs stage: tokens → whitening → codebook → binary ASMK → view graph."""

from __future__ import annotations

from collections.abc import Sequence

from mast3r_sfm.config import PairsConfig
from mast3r_sfm.progress import Progress, steps
from mast3r_sfm.retrieval.features import Vocabulary
from mast3r_sfm.retrieval.graph import view_graph
from mast3r_sfm.retrieval.similarity import measure_similarity
from mast3r_sfm.types import Encoding, Float32, Reason, ViewGraph


def build_view_graph(
    encodings: Sequence[Encoding],
    config: PairsConfig,
    *,
    model_tokens: int,
    seed: int,
    progress: Progress,
    vocabulary: Vocabulary | None = None,
) -> tuple[ViewGraph, Float32]:
    """Decide which pairs of images are to be matched.

    Also a collection small enough to be matched exhaustively gets its similarity from ASMK: its codebook is small, so
    that this costs about a hundredth of the matching, and the score of a pair means the same everywhere.

    Args:
        encodings: one per image; may read them from disk, each is asked for twice and none is kept.
        config: settings of the stage.
        model_tokens: tokens of highest attention that suit the model, used where the config leaves it open.
        seed: of the tokens that the codebook is learnt from, and of its first centroids.
        progress: told of two steps per image, and of what was decided.
        vocabulary: what tokens are compared by; None: it is learnt from the collection.

    Returns:
        The graph and the symmetric similarity [N, N] in [0, 1] with ones on the diagonal. An image without tokens is
        similar to nothing.

    Raises:
        ShapeError: the encodings differ in their number of channels.
    """
    with steps(progress, "pairs", 2 * len(encodings), "image"):
        similarity = measure_similarity(
            encodings, config, model_tokens=model_tokens, seed=seed, progress=progress, vocabulary=vocabulary
        )
        graph = view_graph(similarity, config)
        progress.note(_summary(graph, config))
    return graph, similarity


def _summary(graph: ViewGraph, config: PairsConfig) -> str:
    pairs, every = len(graph.pairs), graph.num_images * (graph.num_images - 1) // 2
    if pairs == every:
        return f"all {pairs:,} pairs of {graph.num_images:,} photos are matched"
    bridges = int((graph.reason == Reason.BRIDGE).sum())
    text = (
        f"{pairs:,} of {every:,} pairs are matched: {min(config.keyframes, graph.num_images)} keyframes with each "
        f"other, every photo with its {config.neighbours} most similar"
    )
    return f"{text}, and {bridges} bridges between parts that have nothing else in common" if bridges else text
