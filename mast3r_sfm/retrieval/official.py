"""The official retrieval of MASt3R-SfM instead of one learnt from the collection: whether it is there, and fits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mast3r_sfm.config import PairsConfig, fingerprint
from mast3r_sfm.errors import ConfigError, WeightsError
from mast3r_sfm.models.retrieval_files import read_codebook, read_retrieval_model
from mast3r_sfm.models.tensor_files import sha256_of
from mast3r_sfm.models.weights import codebook_path, find_retrieval_model
from mast3r_sfm.progress import Progress
from mast3r_sfm.retrieval.codebook import Codebook
from mast3r_sfm.retrieval.features import Vocabulary
from mast3r_sfm.retrieval.projection import ProjectedTokens, Projector

CODE_VERSION = 1
_WITHOUT = "to learn from the photos instead, set pairs.retrieval=collection"


@dataclass(frozen=True, kw_only=True)
class OfficialRetrieval:
    """Official files that were read and fit the tokens of the model in use."""

    path: Path
    """Of the retrieval model; its codebook lies beside it."""
    projector: Projector
    features: int | float
    """Tokens of highest attention that describe an image; negative: their share of all tokens."""
    words: int
    fingerprint: str
    """Of both files' contents; enters the cache key."""

    def vocabulary(self, tokens_per_image: int = 0) -> Vocabulary:
        """How tokens become visual words; reads the codebook, 256 MiB where it has 64k words of 1,024 channels.

        Args:
            tokens_per_image: tokens that describe an image; 0 = as many as the files say.

        Raises:
            WeightsError: the codebook cannot be read or does not belong to the retrieval model.
        """
        words = read_codebook(codebook_path(self.path), self.words)
        if words.shape[1] != self.projector.dimension:
            raise WeightsError(
                f"{codebook_path(self.path)} has words of {words.shape[1]} channels, but {self.path.name} gives local "
                f"features of {self.projector.dimension}: they do not belong together"
            )
        features = ProjectedTokens(projector=self.projector, count=tokens_per_image or self.features)
        return Vocabulary(features=features, codebook=Codebook(words))


def resolve_retrieval(
    config: PairsConfig, *, checkpoint: Path | None, channels: int, progress: Progress
) -> OfficialRetrieval | None:
    """Whether photos are compared by the official files, as `pairs.retrieval` says.

    All that is in the files is looked at, so that a broken one ends a run before its photos are encoded.

    Args:
        config: settings of the stage.
        checkpoint: the weights of the pointmap model in use; None: the model is none.
        channels: of the model's tokens.
        progress: told which files are used, or why those that are there are not.

    Returns:
        None where the collection itself is learnt from.

    Raises:
        ConfigError: the setting names what cannot be used.
        WeightsError: the files are broken, would have code run, or do not fit each other or, where a path was asked
            for, the model.
    """
    if config.retrieval == "collection":
        return None
    asked = config.retrieval != "auto"
    path = _asked_for(config, checkpoint) if asked else _beside(config, checkpoint, progress)
    if path is None:
        return None
    try:
        official = _read(path)
        if official.projector.channels == channels:
            words = len(official.vocabulary().codebook)
            progress.note(f"photos are compared by {path.name}, in {words:,} visual words")
            return official
    except WeightsError as error:
        raise WeightsError(f"{error}; {_WITHOUT}") from error
    widths = f"{path} takes tokens of {official.projector.channels} channels, and the model's have {channels}"
    if asked:
        raise WeightsError(f"pairs.retrieval: {widths}; name the file that belongs to the model, or {_WITHOUT}")
    progress.note(f"{widths}: it is not used")
    return None


def _asked_for(config: PairsConfig, checkpoint: Path | None) -> Path:
    path = Path(config.retrieval)
    setting = f"pairs.retrieval = {config.retrieval!r}"
    if checkpoint is None:
        raise ConfigError(f"{setting}: the model in use has no such files; leave it at auto, or choose --model mast3r")
    if config.codebook_words:
        raise ConfigError(f"{setting} and pairs.codebook_words = {config.codebook_words}: leave out one of both")
    if not path.is_file():
        raise ConfigError(f"{setting}: there is no such file; write auto, collection, or the path of a .pth file")
    if not codebook_path(path).is_file():
        raise ConfigError(f"{setting}: its codebook is missing; put it beside it, as {codebook_path(path).name}")
    return path


def _beside(config: PairsConfig, checkpoint: Path | None, progress: Progress) -> Path | None:
    """The files that lie beside the checkpoint, where nothing speaks against them."""
    # A size of the codebook can only be asked of one that is learnt.
    path = None if checkpoint is None or config.codebook_words else find_retrieval_model(checkpoint)
    if path is not None and not codebook_path(path).is_file():
        progress.warn(f"{path} is not used, since its codebook is missing: put {codebook_path(path).name} beside it")
        return None
    return path


def _read(path: Path) -> OfficialRetrieval:
    model = read_retrieval_model(path)
    try:
        projector = Projector(model)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    return OfficialRetrieval(
        path=path,
        projector=projector,
        features=model.features,
        words=model.words,
        fingerprint=fingerprint(CODE_VERSION, sha256_of(path), sha256_of(codebook_path(path))),
    )
