"""How good a reconstruction is, compared with the truth.

The pose error of a pair is the larger of the angle between the true and the estimated relative rotation and the angle
between the true and the estimated direction of translation, as P.-E. Sarlin et al. ("SuperGlue", CVPR 2020) and Y. Jin
et al. ("Image Matching Across Wide Baselines", IJCV 2021) measure it; no alignment of frames and no scale is needed.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mast3r_sfm.errors import InputError
from mast3r_sfm.evaluation.pairs import PairErrors, join, measure_pairs
from mast3r_sfm.evaluation.trajectory import TrajectoryError, measure_trajectory
from mast3r_sfm.evaluation.truth import Truth
from mast3r_sfm.types import Float64

AUC_THRESHOLDS_DEG = (1, 3, 5, 10)
ACCURACY_THRESHOLDS_DEG = (5, 15)


@dataclass(frozen=True, kw_only=True)
class SceneComparison:
    """One scene of the truth and the model that holds most of it."""

    scene: str
    images: int
    """Images of the scene in the truth."""
    model: int | None
    """Index of the model with the most images of the scene; None where no model holds any."""
    registered: int
    """Images of the scene in that model."""
    trajectory: TrajectoryError | None
    """None where it cannot be measured: see `measure_trajectory`."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` found. Medians and shares count a pair without a common model as an error of 180°."""

    images: int
    """Images with a true pose."""
    registered: int
    """Of these, images in any model."""
    registered_in_largest: int
    """Of these, images in the first model."""
    models: int
    pairs: PairErrors
    auc: Mapping[int, float]
    """Area under the recall curve of the pose error, in [0, 1], by threshold in degrees: 1, 3, 5, 10."""
    rotation_accuracy: Mapping[int, float]
    """RRA: share of the pairs whose rotation error is below 5 and 15 degrees."""
    translation_accuracy: Mapping[int, float] | None
    """RTA: the same for the direction of translation, over pairs with a baseline; None where there are none."""
    median_rotation_deg: float
    median_translation_deg: float | None
    """Over pairs with a baseline; None where there are none."""
    scenes: tuple[SceneComparison, ...]
    missing: tuple[str, ...]
    """Images with a true pose that stand in no model."""
    intruders: tuple[str, ...]
    """Images that stand in a model where they do not belong: see `find_intruders`."""
    unknown: tuple[str, ...]
    """Images of the models that the truth does not mention; they are not judged."""

    @property
    def wrong_joins(self) -> int:
        """Number of intruders."""
        return len(self.intruders)

    @property
    def ate_of_size(self) -> float | None:
        """The largest ATE of a scene, as a share of that scene's size; None where none could be measured."""
        shares = [scene.trajectory.rmse_of_size for scene in self.scenes if scene.trajectory is not None]
        return max(shares, default=None)

    def to_dict(self) -> dict[str, Any]:
        """The figures, without the single pairs, as JSON can hold them."""
        values: dict[str, Any] = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("pairs", "scenes")
        }
        values["pairs"] = len(self.pairs)
        values["pairs_measured"] = int(self.pairs.is_measured.sum())
        values["wrong_joins"] = self.wrong_joins
        for name in ("auc", "rotation_accuracy", "translation_accuracy"):
            values[name] = values[name] and {str(threshold): share for threshold, share in values[name].items()}
        values["scenes"] = [_scene_dict(scene) for scene in self.scenes]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def compare(models: Sequence[Mapping[str, Float64]], truth: Truth) -> Comparison:
    """Compare the models of one reconstruction with the truth.

    Args:
        models: for each model, largest first, cam_from_world [3, 4] by image name; frames and scales are free. May be
            empty: then every pair has failed.
        truth: the true poses, two images of one scene at least.

    Raises:
        InputError: there are models, but none of their images is in the truth, or no scene has two images.
        ShapeError: a pose is not finite or not [3, 4].
    """
    _check_names(models, truth)
    by_scene = truth.names_by_scene
    pairs = join([measure_pairs(models, truth.cam_from_world, names) for names in by_scene.values()])
    if len(pairs) == 0:
        raise InputError("no scene of the truth has two images; it takes two or more to compare poses")
    registered = {name for model in models for name in model}
    known = {*truth.cam_from_world, *truth.unrelated}
    moving = pairs.translation_deg[pairs.has_baseline]
    return Comparison(
        images=len(truth.scene),
        registered=len(registered & set(truth.scene)),
        registered_in_largest=len(set(models[0]) & set(truth.scene)) if models else 0,
        models=len(models),
        pairs=pairs,
        auc={threshold: area_under_recall(pairs.error_deg, threshold) for threshold in AUC_THRESHOLDS_DEG},
        rotation_accuracy=_shares_below(pairs.rotation_deg),
        translation_accuracy=_shares_below(moving) if len(moving) else None,
        median_rotation_deg=float(np.median(pairs.rotation_deg)),
        median_translation_deg=float(np.median(moving)) if len(moving) else None,
        scenes=tuple(_compare_scene(scene, names, models, truth) for scene, names in by_scene.items()),
        missing=tuple(sorted(set(truth.scene) - registered)),
        intruders=find_intruders(models, truth.scene, truth.unrelated),
        unknown=tuple(sorted(registered - known)),
    )


def area_under_recall(errors: Float64, threshold: float) -> float:
    """Area under the curve of recall over error, from 0 to `threshold`, divided by `threshold`.

    The curve starts at (0, 0), goes straight from one sorted error to the next, rising by 1/P at each, and is level
    after the last error below the threshold: the trapezoid rule as the field applies it.

    Args:
        errors: [P] not negative, P > 0.
        threshold: positive, in the unit of the errors.

    Returns:
        In [0, 1].
    """
    below = np.sort(errors[errors < threshold])
    recall = np.arange(len(below) + 1) / len(errors)
    ends = np.concatenate([[0.0], below, [threshold]])
    heights = np.concatenate([recall, recall[-1:]])
    return float((np.diff(ends) * (heights[1:] + heights[:-1])).sum() / (2.0 * threshold))


def find_intruders(
    models: Sequence[Iterable[str]], scene: Mapping[str, str], unrelated: Collection[str]
) -> tuple[str, ...]:
    """Names of the images that stand in a model where they do not belong.

    A model belongs to the scene that most of its images show (the first by name where two have as many). Images of
    other scenes are intruders in it; images of no scene are intruders in every model.

    Args:
        models: the image names of each model.
        scene: the scene of each image that belongs to one; a name that is neither here nor in `unrelated` is ignored.
        unrelated: the names of images that belong to no scene.

    Returns:
        Sorted, each name once.
    """
    found: set[str] = set()
    for model in models:
        names = sorted(set(model))
        found.update(name for name in names if name in unrelated)
        counts = Counter(scene[name] for name in names if name in scene)
        if counts:
            owner = min(counts, key=lambda candidate: (-counts[candidate], candidate))
            found.update(name for name in names if scene.get(name, owner) != owner)
    return tuple(sorted(found))


def _check_names(models: Sequence[Mapping[str, Float64]], truth: Truth) -> None:
    registered = {name for model in models for name in model}
    if registered and not registered & {*truth.cam_from_world, *truth.unrelated}:
        raise InputError(
            f"no image of the model is in the truth: the model has {min(registered)!r}, the truth "
            f"{min(truth.cam_from_world, default='nothing')!r}; names are paths relative to the image folder"
        )


def _shares_below(errors_deg: Float64) -> dict[int, float]:
    return {threshold: float((errors_deg < threshold).mean()) for threshold in ACCURACY_THRESHOLDS_DEG}


def _compare_scene(
    scene: str, names: tuple[str, ...], models: Sequence[Mapping[str, Float64]], truth: Truth
) -> SceneComparison:
    counts = [sum(name in model for name in names) for model in models]
    registered = max(counts, default=0)
    best = counts.index(registered) if registered else None
    return SceneComparison(
        scene=scene,
        images=len(names),
        model=best,
        registered=registered,
        trajectory=None if best is None else measure_trajectory(models[best], truth.cam_from_world, names),
    )


def _scene_dict(scene: SceneComparison) -> dict[str, Any]:
    values = dataclasses.asdict(scene)
    if scene.trajectory is not None:
        values["trajectory"]["outliers"] = list(scene.trajectory.outliers)
        values["trajectory"]["rmse_of_size"] = scene.trajectory.rmse_of_size
        values["trajectory"]["rmse_of_path"] = scene.trajectory.rmse_of_path
    return values
