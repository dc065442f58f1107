"""How similar the images of a collection are, told from their tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mast3r_sfm.config import PairsConfig
from mast3r_sfm.progress import Progress
from mast3r_sfm.retrieval.asmk import score, symmetric
from mast3r_sfm.retrieval.features import Vocabulary, describe_images, learn_vocabulary
from mast3r_sfm.types import Encoding, Float32


def measure_similarity(
    encodings: Sequence[Encoding],
    config: PairsConfig,
    *,
    model_tokens: int,
    seed: int,
    progress: Progress,
    vocabulary: Vocabulary | None = None,
) -> Float32:
    """Similarity of every two images.

    Args:
        encodings: one per image; may read them from disk, each is asked for twice at most and none is kept.
        config: settings of the stage.
        model_tokens: tokens of highest attention that suit the model, used where the config leaves it open.
        seed: of the tokens that the codebook is learnt from, and of its first centroids.
        progress: told of two steps per image.
        vocabulary: what tokens are compared by; None: it is learnt from the collection.

    Returns:
        [N, N] symmetric, in [0, 1], with ones on the diagonal. An image without tokens is similar to nothing.

    Raises:
        ShapeError: the encodings differ in their number of channels.
    """
    if vocabulary is not None:
        progress.advance(len(encodings))  # the look at each image that learning takes
    else:
        vocabulary = learn_vocabulary(encodings, config, config.tokens_per_image or model_tokens, seed, progress)
    if vocabulary is None:
        progress.warn("no photo shows anything to compare it with others by; pairs are chosen without similarity")
        progress.advance(len(encodings))
        return np.eye(len(encodings), dtype=np.float32)
    database, query = describe_images(encodings, vocabulary, progress)
    return symmetric(score(query, database))
