"""Whether photos are compared by official retrieval files or by what is learnt from them, and what is said of it."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from mast3r_sfm.config import PairsConfig
from mast3r_sfm.errors import ConfigError, WeightsError
from mast3r_sfm.models.weights import codebook_path
from mast3r_sfm.retrieval.codebook import Codebook
from mast3r_sfm.retrieval.features import Vocabulary
from mast3r_sfm.retrieval.official import OfficialRetrieval, resolve_retrieval
from mast3r_sfm.retrieval.similarity import measure_similarity
from mast3r_sfm.types import Encoding, Float32, PixelTransform
from tests.checkpoints import write_codebook, write_retrieval_model
from tests.exact import Listener

CHANNELS, LOCAL = 12, 32
CHECKPOINT = "tiny.safetensors"


def write_files(folder: Path, channels: int = CHANNELS, name: str = "tiny", words: int = 64) -> Path:
    """The retrieval model with its codebook, beside a checkpoint of that name."""
    write_codebook(folder / f"{name}_retrieval_codebook.pkl", words, LOCAL)
    settings = {"hdims": f"20_{LOCAL}", "postwhiten": "photos", "nfeat": -0.5, "nclusters": words}
    return write_retrieval_model(folder / f"{name}_retrieval_trainingfree.pth", channels, **settings)


def resolve(
    folder: Path, retrieval: str = "auto", channels: int = CHANNELS, words: int = 0, listener: Listener | None = None
) -> OfficialRetrieval | None:
    config = PairsConfig(retrieval=retrieval, codebook_words=words)
    return resolve_retrieval(config, checkpoint=folder / CHECKPOINT, channels=channels, progress=listener or Listener())


def photos(places: int, of_each: int) -> list[Encoding]:
    generator = np.random.default_rng(0)
    encodings = []
    for _ in range(places):
        place = generator.standard_normal((60, CHANNELS))
        for _ in range(of_each):
            tokens = place + 0.02 * generator.standard_normal(place.shape)
            encodings.append(
                Encoding(
                    tokens=generator.permutation(tokens).astype(np.float16),
                    xy=np.zeros((60, 2), np.float32),
                    attention=np.ones(60, np.float32),
                    transform=PixelTransform(matrix=np.eye(2, 3)),
                    network_size=(64, 64),
                )
            )
    return encodings


def test_files_beside_the_checkpoint_are_taken(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    listener = Listener()
    official = resolve(tmp_path, listener=listener)
    assert official is not None
    assert official.path == path
    assert listener.notes == [f"photos are compared by {path.name}, in 64 visual words"]
    assert listener.warnings == []
    assert len(official.vocabulary().codebook) == 64
    assert resolve(tmp_path, str(path)) is not None


def test_photos_of_one_place_are_found_by_them(tmp_path: Path) -> None:
    path = write_files(tmp_path, words=16)
    official = resolve(tmp_path)
    assert official is not None
    encodings = photos(places=3, of_each=4)
    # Words as they would be learnt: from tokens of such photos.
    features = np.concatenate([official.vocabulary().features.of(encoding) for encoding in encodings])
    words = Codebook.train(features, 16, seed=0).centroids
    stored = {"type": "Codebook", "params": {"size": 16}, "state": {"centroids": words}}
    codebook_path(path).write_bytes(pickle.dumps(stored))

    def similarity_by(vocabulary: Vocabulary, seed: int = 0) -> Float32:
        listener = Listener()
        similarity = measure_similarity(
            encodings, PairsConfig(), model_tokens=5, seed=seed, progress=listener, vocabulary=vocabulary
        )
        assert listener.steps == 2 * len(encodings)
        assert listener.notes == []  # nothing was learnt
        return similarity.rows(np.arange(len(encodings)))

    similarity = similarity_by(official.vocabulary())
    place = np.repeat(np.arange(3), 4)
    same = (place[:, None] == place) & ~np.eye(12, dtype=bool)
    assert similarity[same].min() > 1.5 * similarity[place[:, None] != place].max() > 0
    # Neither the seed nor the number of tokens that suits the model matters, but that which the user asks for does.
    np.testing.assert_array_equal(similarity_by(official.vocabulary(), seed=9), similarity)
    assert np.abs(similarity_by(official.vocabulary(7)) - similarity).max() > 0.01


def test_nothing_is_taken_where_nothing_lies_or_nothing_may(tmp_path: Path) -> None:
    listener = Listener()
    assert resolve(tmp_path, listener=listener) is None
    write_files(tmp_path, name="another")
    assert resolve(tmp_path, listener=listener) is None
    write_files(tmp_path)
    assert resolve(tmp_path, "collection", listener=listener) is None
    # A size can only be asked of a codebook that is learnt.
    assert resolve(tmp_path, words=512, listener=listener) is None
    config = PairsConfig()
    assert resolve_retrieval(config, checkpoint=None, channels=0, progress=listener) is None
    assert listener.notes == listener.warnings == []


def test_files_for_other_tokens_are_not_taken_and_the_widths_are_told(tmp_path: Path) -> None:
    path = write_files(tmp_path, channels=16)
    listener = Listener()
    assert resolve(tmp_path, listener=listener) is None
    assert listener.notes == [f"{path} takes tokens of 16 channels, and the model's have 12: it is not used"]
    with pytest.raises(WeightsError) as raised:
        resolve(tmp_path, str(path))
    assert f"pairs.retrieval: {path} takes tokens of 16 channels, and the model's have 12;" in str(raised.value)
    assert "pairs.retrieval=collection" in str(raised.value)


def test_a_codebook_that_is_missing(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    (tmp_path / "tiny_retrieval_codebook.pkl").unlink()
    listener = Listener()
    assert resolve(tmp_path, listener=listener) is None
    (warning,) = listener.warnings
    assert warning == f"{path} is not used, since its codebook is missing: put tiny_retrieval_codebook.pkl beside it"
    with pytest.raises(
        ConfigError, match=r"its codebook is missing; put it beside it, as tiny_retrieval_codebook\.pkl"
    ):
        resolve(tmp_path, str(path))


def test_a_path_that_cannot_be(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    for retrieval in ("official", str(tmp_path), str(tmp_path / "none.pth")):
        with pytest.raises(ConfigError, match="there is no such file; write auto, collection, or the path of"):
            resolve(tmp_path, retrieval)
    with pytest.raises(ConfigError, match=r"pairs\.codebook_words = 512: leave out one of both"):
        resolve(tmp_path, str(path), words=512)
    config = PairsConfig(retrieval=str(path))
    with pytest.raises(ConfigError, match="the model in use has no such files; leave it at auto"):
        resolve_retrieval(config, checkpoint=None, channels=0, progress=Listener())
    with pytest.raises(ConfigError, match=r"pairs\.retrieval = '': must be auto, collection or the path"):
        PairsConfig(retrieval="")


class Malice:
    """Unpickled naively, it would make a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("asked", [False, True])
def test_broken_files_end_in_words_and_are_not_passed_over(asked: bool, tmp_path: Path) -> None:
    path = write_files(tmp_path)
    codebook = tmp_path / "tiny_retrieval_codebook.pkl"
    good, good_words = path.read_bytes(), codebook.read_bytes()
    hostile = pickle.dumps({"type": "Codebook", "state": {"centroids": Malice(tmp_path / "ran")}})
    other_words = write_codebook(tmp_path / "other.pkl", 65, LOCAL).read_bytes()
    wider_words = write_codebook(tmp_path / "other.pkl", 64, 9).read_bytes()
    unknown = write_retrieval_model(tmp_path / "x.pth", CHANNELS, unknown=1).read_bytes()
    for file, data, part in (
        (codebook, hostile, "nothing of it was run: it names code to be run by whoever reads it: 'posix.mkdir'"),
        (codebook, good_words[:-50], "not whole; nothing of it was run"),
        (codebook, other_words, "has 65 words, but the model beside it asks for 64: they do not belong together"),
        (
            codebook,
            wider_words,
            "has words of 9 channels, but tiny_retrieval_trainingfree.pth gives local features of 32",
        ),
        (path, good[:-50], "is not a file of weights, or not whole"),
        (path, b"text", "is not a file of weights"),
        (path, unknown, "settings that are not known"),
    ):
        path.write_bytes(good)
        codebook.write_bytes(good_words)
        assert resolve(tmp_path, str(path) if asked else "auto") is not None
        file.write_bytes(data)
        with pytest.raises(WeightsError) as raised:
            resolve(tmp_path, str(path) if asked else "auto")
        assert part in str(raised.value)
        assert str(file) in str(raised.value)
        assert str(raised.value).endswith("; to learn from the photos instead, set pairs.retrieval=collection")
        assert resolve(tmp_path, "collection") is None
    assert not (tmp_path / "ran").exists()


def test_the_fingerprint_is_that_of_the_contents(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    codebook = tmp_path / "tiny_retrieval_codebook.pkl"

    def fingerprint(retrieval: str = "auto") -> str:
        official = resolve(tmp_path, retrieval)
        assert official is not None
        return official.fingerprint

    found = [fingerprint()]
    assert len(found[0]) == 64
    (tmp_path / "elsewhere").mkdir()
    copy = Path(shutil.copy(path, tmp_path / "elsewhere" / "my_model.pth"))
    shutil.copy(codebook, tmp_path / "elsewhere" / "my_codebook.pkl")
    assert fingerprint(str(copy)) == found[0]
    write_codebook(codebook, 64, LOCAL, protocol=2)
    found.append(fingerprint())
    write_retrieval_model(path, CHANNELS, hdims="32", nfeat=3)
    found.append(fingerprint())
    assert len(set(found)) == 3
