"""What refinement is worth on the example's photos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pycolmap
import pytest

from mast3r_sfm.evaluation.metrics import compare
from mast3r_sfm.evaluation.truth import read_truth_json
from tests.pipeline.conftest import PHOTOS, Reconstruct, Run


@pytest.fixture(scope="module")
def refined_run(run_small: Reconstruct, house: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """With the network's keypoints alone, which are less exact than SIFT's."""
    return run_small(house, tmp_path_factory.mktemp("refined"), "match.features=model")


@pytest.fixture(scope="module")
def plain_run(refined_run: Run, run_small: Reconstruct, house: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same without refinement; all up to the matches is taken from it."""
    output = tmp_path_factory.mktemp("plain")
    (output / "cache").symlink_to(refined_run.output / "cache")
    run = run_small(house, output, "map.refine=false", "match.features=model")
    assert run.resumed["encode"] == run.resumed["pairs"] == 1
    return run


def test_refinement_makes_the_model_more_accurate(refined_run: Run, plain_run: Run, repository: Path) -> None:
    names = list(plain_run.model.cam_from_world)
    assert list(refined_run.model.cam_from_world) == names
    assert len(names) == PHOTOS
    truth = read_truth_json(repository / "examples" / "house" / "gt.json").restricted_to(names)
    plain, refined = (compare([run.model.cam_from_world], truth) for run in (plain_run, refined_run))
    assert np.median(refined.pairs.error_deg) < 0.5 * np.median(plain.pairs.error_deg)
    assert refined.pairs.error_deg.max() < plain.pairs.error_deg.max()
    assert refined.auc[1] > plain.auc[1] + 0.1
    before, after = plain_run.report.models[0], refined_run.report.models[0]
    assert after.mean_reprojection_error_px < 0.4 * before.mean_reprojection_error_px
    # It rejects what does not fit, but not much.
    assert 0.75 * before.points < after.points < 1.1 * before.points
    assert 0.7 * before.observations < after.observations < 2 * before.observations


@pytest.mark.parametrize("which", ["first_run", "refined_run", "plain_run"])
def test_the_database_has_the_keypoints_of_the_model(which: str, request: pytest.FixtureRequest) -> None:
    run: Run = request.getfixturevalue(which)
    with pycolmap.Database.open(str(run.output / "database.db")) as database:
        for image, xy in run.model.keypoints().items():
            stored = np.asarray(database.read_keypoints(image + 1))[:, :2]
            np.testing.assert_allclose(stored, xy, atol=1e-3)


def test_refined_keypoints_moved(refined_run: Run, plain_run: Run) -> None:
    before, after, tracks = plain_run.model.keypoints(), refined_run.model.keypoints(), refined_run.model.tracks()
    moves = []
    for image, xy in before.items():
        observed = tracks.keypoint[(tracks.image == image) & (tracks.keypoint < len(xy))]
        moves.append(np.linalg.norm(after[image][observed] - xy[observed], axis=1))
    moved = np.concatenate(moves)
    assert 0.2 < np.median(moved[moved > 0]) < 2
    # The best view of each point kept its keypoint.
    assert (moved == 0).sum() >= 0.8 * refined_run.model.num_points


def test_whether_to_refine_enters_the_key_of_the_map(refined_run: Run, plain_run: Run) -> None:
    changed = {stage for stage, key in plain_run.keys.items() if key != refined_run.keys[stage]}
    assert changed == {"map", "export"}
