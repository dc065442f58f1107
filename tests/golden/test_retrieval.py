"""Parity of the retrieval with retrieval.npz and graph.json.

The reference counts an image among its own nearest neighbours, may pick a keyframe twice and may run without
keyframes; the last two are not comparable and left out.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mast3r_sfm.models.retrieval_files import RetrievalModel
from mast3r_sfm.retrieval.asmk import BinaryFeatures, aggregate, describe, score
from mast3r_sfm.retrieval.codebook import Codebook
from mast3r_sfm.retrieval.features import strongest_tokens
from mast3r_sfm.retrieval.graph import exhaustive_graph, farthest_keyframes, retrieval_graph
from mast3r_sfm.retrieval.projection import Projector, strongest
from mast3r_sfm.retrieval.sources import swin_pairs
from mast3r_sfm.retrieval.whitening import TokenMoments, Whitening
from mast3r_sfm.types import Encoding, Float32, Float64, Int32, PixelTransform, Reason

BINARY = ("A", "B", "C48")
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> dict[str, Any]:
    with np.load(golden_dir / "retrieval.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def scenes(golden_dir: Path) -> list[dict[str, Any]]:
    rows = json.loads((golden_dir / "graph.json").read_text())["retrieval_graph"]
    stored = {(row["name"], row["fps_start"]): row["sim"] for row in rows}
    resolved = []
    for row in rows:
        link = re.fullmatch(r"same as the row with name=(\S+), fps_start=(\d+)", str(row["sim"]))
        sim = stored[link[1], int(link[2])] if link else row["sim"]
        resolved.append({**row, "sim": np.array(sim, dtype=np.float64)})
    return resolved


def _local(golden: dict[str, Any], config: str) -> tuple[Float32, Int32, int]:
    num_images = len(golden[f"{config}/scores"])
    local = [golden[f"{config}/img{index}/local"] for index in range(num_images)]
    return np.concatenate(local), golden[f"{config}/ids"], num_images


def _features(golden: dict[str, Any], config: str, assigned: int) -> BinaryFeatures:
    local, ids, num_images = _local(golden, config)
    codebook = Codebook(golden[f"{config}/codebook/centroids"])
    return describe(local, ids, codebook.nearest(local, assigned), codebook.centroids, num_images)


def _encoding(tokens: Float32, attention: Float32) -> Encoding:
    return Encoding(
        tokens=tokens.astype(np.float16),
        xy=np.zeros((len(tokens), 2), np.float32),
        attention=attention,
        transform=PixelTransform(matrix=np.eye(2, 3)),
        network_size=(64, 64),
    )


def _retrieval_model(golden: dict[str, Any], config: str) -> RetrievalModel:
    """As `read_retrieval_model` gives it: the settings are those of the README."""
    start = f"{config}/param/"
    arrays = {name.removeprefix(start): array for name, array in golden.items() if name.startswith(start)}
    return RetrievalModel(
        hidden=(96, 64) if config == "B" else (),
        residual=config == "B",
        prewhitened=True,
        postwhitened=config == "B",
        features={"A": 30, "B": -0.6, "C48": 300, "Dnobin": 25}[config],
        words=len(golden[f"{config}/codebook/centroids"]),
        arrays={name: array.astype(np.float64) for name, array in arrays.items()},
    )


@pytest.mark.parametrize("config", [*BINARY, "Dnobin"])
def test_local_features_by_the_official_model(golden: dict[str, Any], config: str) -> None:
    model = _retrieval_model(golden, config)
    projector = Projector(model)
    for index in range(len(golden[f"{config}/scores"])):
        tokens = golden[f"{config}/img{index}/tokens"]
        expected = {name: golden[f"{config}/img{index}/{name}"] for name in ("attn", "topk_idx", "local")}
        attention = projector.project(tokens)[1]
        np.testing.assert_allclose(attention, expected["attn"], rtol=0, atol=TOLERANCE)
        np.testing.assert_array_equal(strongest(attention, model.features), expected["topk_idx"])
        local = projector.local_features(tokens, model.features)
        np.testing.assert_allclose(local, expected["local"], rtol=0, atol=TOLERANCE)
    every = projector.finish(projector.project(golden[f"{config}/img0/tokens"])[0])
    np.testing.assert_allclose(every, golden[f"{config}/img0/feat_all_tokens"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("config", BINARY)
def test_from_tokens_to_scores_by_the_official_model(golden: dict[str, Any], config: str) -> None:
    model = _retrieval_model(golden, config)
    projector, codebook = Projector(model), Codebook(golden[f"{config}/codebook/centroids"])
    tokens = [golden[f"{config}/img{index}/tokens"] for index in range(len(golden[f"{config}/scores"]))]
    local = [projector.local_features(some, model.features) for some in tokens]
    ids = np.repeat(np.arange(len(local), dtype=np.int32), [len(part) for part in local])
    np.testing.assert_array_equal(ids, golden[f"{config}/ids"])
    words = codebook.nearest(np.concatenate(local), 5)
    np.testing.assert_array_equal(words, golden[f"{config}/words_query_ma5"])
    query, database = (
        describe(np.concatenate(local), ids, words[:, :assigned], codebook.centroids, len(local)) for assigned in (5, 1)
    )
    for index in (0, 1):
        for features, side in ((database, "db"), (query, "query")):
            mine = features.image == index
            np.testing.assert_array_equal(features.word[mine], golden[f"{config}/img{index}/{side}_words"])
            np.testing.assert_array_equal(features.code[mine], golden[f"{config}/img{index}/{side}_agg_packed_u32"])
    np.testing.assert_allclose(score(query, database), golden[f"{config}/scores"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("config", ["A", "C48", "Dnobin"])
def test_local_features_are_the_whitened_tokens_of_highest_attention(golden: dict[str, Any], config: str) -> None:
    whitening = Whitening(
        mean=golden[f"{config}/param/prewhiten.m"][0], projection=golden[f"{config}/param/prewhiten.p"]
    )
    for index in range(len(golden[f"{config}/scores"])):
        tokens = golden[f"{config}/img{index}/tokens"]
        expected = golden[f"{config}/img{index}/local"]
        white = whitening.apply(tokens)
        attention = np.linalg.norm(white, axis=1)
        np.testing.assert_allclose(attention, golden[f"{config}/img{index}/attn"], rtol=1e-6, atol=TOLERANCE)
        chosen = strongest_tokens(_encoding(tokens, attention), len(expected))
        np.testing.assert_array_equal(chosen, golden[f"{config}/img{index}/topk_idx"])
        np.testing.assert_allclose(white[chosen], expected, rtol=1e-6, atol=TOLERANCE)


@pytest.mark.parametrize("config", [*BINARY, "Dnobin"])
def test_nearest_words(golden: dict[str, Any], config: str) -> None:
    local, _, _ = _local(golden, config)
    codebook = Codebook(golden[f"{config}/codebook/centroids"])
    np.testing.assert_array_equal(codebook.nearest(local, 1), golden[f"{config}/words_db_ma1"])
    np.testing.assert_array_equal(codebook.nearest(local, 5), golden[f"{config}/words_query_ma5"])


@pytest.mark.parametrize("config", BINARY)
@pytest.mark.parametrize(("side", "assigned"), [("db", 1), ("query", 5)])
def test_binary_codes(golden: dict[str, Any], config: str, side: str, assigned: int) -> None:
    features = _features(golden, config, assigned)
    for index in (0, 1):
        mine = features.image == index
        np.testing.assert_array_equal(features.word[mine], golden[f"{config}/img{index}/{side}_words"])
        np.testing.assert_array_equal(features.code[mine], golden[f"{config}/img{index}/{side}_agg_packed_u32"])


@pytest.mark.parametrize(("side", "assigned"), [("db", 1), ("query", 5)])
def test_residual_sums_before_the_binarisation(golden: dict[str, Any], side: str, assigned: int) -> None:
    local, ids, _ = _local(golden, "Dnobin")
    codebook = Codebook(golden["Dnobin/codebook/centroids"])
    image, word, sums = aggregate(local, ids, codebook.nearest(local, assigned), codebook.centroids)
    unit = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    for index in (0, 1):
        np.testing.assert_array_equal(word[image == index], golden[f"Dnobin/img{index}/{side}_words"])
        np.testing.assert_allclose(unit[image == index], golden[f"Dnobin/img{index}/{side}_agg"], atol=5e-6)


@pytest.mark.parametrize("config", BINARY)
def test_scores(golden: dict[str, Any], config: str) -> None:
    found = score(_features(golden, config, 5), _features(golden, config, 1))
    np.testing.assert_allclose(found, golden[f"{config}/scores"], rtol=0, atol=TOLERANCE)


def test_scores_without_binarisation(golden: dict[str, Any]) -> None:
    """Unit residual sums instead of codes; the product has none of this, but what leads to it."""
    local, ids, num_images = _local(golden, "Dnobin")
    codebook = Codebook(golden["Dnobin/codebook/centroids"])
    sides = []
    for assigned in (5, 1):
        image, word, sums = aggregate(local, ids, codebook.nearest(local, assigned), codebook.centroids)
        sums = sums / (np.linalg.norm(sums, axis=1, keepdims=True) + 1e-6)
        sides.append([dict(zip(word[image == one], sums[image == one], strict=True)) for one in range(num_images)])
    for row, query in enumerate(sides[0]):
        for column, database in enumerate(sides[1]):
            cosines = np.array([query[word] @ database[word] for word in query.keys() & database.keys()])
            found = (np.maximum(cosines, 0) ** 3).sum() / np.sqrt(len(query) * len(database))
            assert abs(found - golden["Dnobin/scores"][row, column]) < TOLERANCE


def test_whitening_is_learnt(golden: dict[str, Any]) -> None:
    tokens: Float64 = golden["whiten_learn/X"]
    moments = TokenMoments(tokens.shape[1])
    for part in np.array_split(tokens, 7):
        moments.add(part)
    whitening = moments.whitening()
    expected = golden["whiten_learn/P"]
    np.testing.assert_allclose(whitening.mean, golden["whiten_learn/m"][0], atol=1e-12)
    sign = np.sign((whitening.projection * expected).sum(axis=0))
    np.testing.assert_allclose(whitening.projection * sign, expected, rtol=1e-8, atol=1e-9)

    applied = whitening.apply(golden["whiten_apply/X_f64"]) * sign
    applied = applied / np.linalg.norm(applied, axis=1, keepdims=True)
    np.testing.assert_allclose(applied, golden["whiten_apply/Y_l2norm_f64"], atol=5e-6)


def _comparable(row: dict[str, Any]) -> bool:
    keyframes = row["keyframes"][: min(row["Na"], row["N"])]
    return 0 < len(keyframes) == len(set(keyframes))


def test_keyframes(scenes: list[dict[str, Any]]) -> None:
    compared = [row for row in scenes if _comparable(row)]
    assert len(compared) >= 5
    for row in compared:
        found = farthest_keyframes(row["sim"], row["Na"], start=row["fps_start"])
        assert found.tolist() == row["keyframes"][: row["N"]], row["name"]


def test_pairs(scenes: list[dict[str, Any]]) -> None:
    # Of the k images that the reference finds nearest to image i, one is i itself; where similarities of an image
    # with itself are low this may not be so, and the graphs are not comparable.
    compared = [row for row in scenes if _comparable(row) and (_more_similar_than_itself(row) < max(row["k"], 1)).all()]
    assert len(compared) >= 5
    for row in compared:
        neighbours = max(row["k"] - 1, 0)
        graph = retrieval_graph(row["sim"], keyframes=row["Na"], neighbours=neighbours, start=row["fps_start"])
        expected = sorted(tuple(sorted(pair)) for pair in row["pairs_unordered"])
        assert [tuple(pair) for pair in graph.pairs.tolist()] == expected, row["name"]
        assert not (graph.reason == Reason.BRIDGE).any()


def _more_similar_than_itself(row: dict[str, Any]) -> NDArray[np.int64]:
    sim: Float64 = row["sim"]
    return (sim > sim.diagonal()[:, None]).sum(axis=1)


def test_pairs_by_the_order_of_names(golden_dir: Path) -> None:
    """Without the reference's prefilters, self pairs and orientations."""
    rows = json.loads((golden_dir / "graph.json").read_text())["other_scene_graphs"]
    compared = 0
    for row in rows:
        kind = re.fullmatch(r"complete|swin(?:-(\d+))?", row["scene_graph"])
        if row["prefilter"] is not None or kind is None:
            continue
        names = [f"{index}.jpg" for index in range(row["n"])]
        if row["scene_graph"] == "complete":
            found = exhaustive_graph(np.eye(row["n"], dtype=np.float32)).pairs
        else:
            found = swin_pairs(names, int(kind[1] or 3))
        expected = {tuple(sorted(pair)) for pair in row["pairs"] if pair[0] != pair[1]}
        assert {tuple(sorted(pair)) for pair in found.tolist()} == expected, row
        compared += 1
    assert compared >= 12
