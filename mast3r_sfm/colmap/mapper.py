"""From approximate poses to a bundle-adjusted model, with COLMAP's triangulator, registration and Ceres problem."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pycolmap

from mast3r_sfm.colmap.held import Held, refine_around, rigid
from mast3r_sfm.colmap.held_out import gains_of_shifts
from mast3r_sfm.colmap.model import ColmapModel
from mast3r_sfm.colmap.observations import drop_misfits, one_observation_per_image
from mast3r_sfm.colmap.principal_point import MIN_IMAGES, confirmed_shifts, off_centre_cameras
from mast3r_sfm.colmap.registration import Evidence, register_by_points
from mast3r_sfm.colmap.sample import place_points, take_over, thinned
from mast3r_sfm.colmap.solving import adjust_around, cameras_of, solve, solve_with_shifts
from mast3r_sfm.config import MapConfig
from mast3r_sfm.types import Float64, Tracks

MAX_REFINEMENTS, TOLERANCE = 5, 1e-5
"""Rounds of global bundle adjustment, each to a relative change of its cost."""
ROUGH_TOLERANCE = 1e-4
"""The same where observations are still to be refined, which gains more than the last rounds would."""
REFINED_TRUST, REFINED_SCALE = 0.5, 0.25
"""By which thresholds, and the scale of the loss, shrink once observations are refined: a coordinate errs by 0.12 px
instead of 0.8, at which a Cauchy loss of this scale loses a twelfth of what they say."""
PARALLEL_RESIDUALS = 1_000_000
"""Below so many, Ceres computes in one thread: several sum up in any order, and the same photos would not give the same
model twice."""
THIN = 50
"""Points of three views or more below which a confirmed image is held by those of two as well."""
MAX_LOSS = 0.001
"""Share of the error of held-out observations that a significant principal point may add: the draw's own noise."""
MAX_CHANGE = 0.0005
"""Share of the observations that a round of refinement may still change when it is the last."""


@dataclass(frozen=True, kw_only=True)
class MapperSettings:
    """What mapping depends on besides the database."""

    config: MapConfig
    pixel_scale: float
    """Photo pixels per pixel of matching: thresholds are given at the resolution of matching."""
    threads: int
    seed: int


class Mapper:
    """Builds one model after the other from one database."""

    def __init__(
        self, database: Path, settings: MapperSettings, held: Held | None = None, confirmed: Collection[int] = ()
    ) -> None:
        """Load the correspondences of `database`.

        Args:
            database: of all images.
            settings: thresholds and threads.
            held: what is known and stays as it is.
            confirmed: images (0-based) whose place is known from pairs that confirmed each other: the points of two
                views may hold them. Of others, these would hide that next to nothing says where they are.
        """
        self._confirmed = {image + 1 for image in confirmed}
        options = pycolmap.DatabaseCacheOptions()
        # An image of known pose stands in the model even where it matches nothing.
        options.load_all_images = held is not None and bool(held.poses)
        with pycolmap.Database.open(str(database)) as opened:
            self._cache = pycolmap.DatabaseCache.create(opened, options)
        self._cameras = {number: (camera.model, list(camera.params)) for number, camera in self._cache.cameras.items()}
        self._settings = settings
        self._held = held or Held()
        self._options = self._mapper_options()

    def build(self, poses: Mapping[int, Float64], *, grow: bool = True, rough: bool = False) -> ColmapModel:
        """Triangulate from given poses, adjust everything, and register what else the model can hold.

        Args:
            poses: cam_from_world [3, 4] by image number (0-based), approximate.
            grow: whether further images are tried.
            rough: whether observations will be refined and adjusted again, so that less will do.
        """
        self._hold_distortion(poses)
        reconstruction = self._placed(poses)
        triangulation = self._triangulation_options(len(poses))
        mapper = self._triangulated(reconstruction, triangulation)
        if rough:
            mapper = self._adjust_sampled(mapper, triangulation, grow=grow)
        else:
            self._adjust(mapper, triangulation)
            while grow and self._register_more(mapper, triangulation):
                self._adjust(mapper, triangulation)
            self._settle_principal_points(mapper, triangulation)
        built = mapper.reconstruction
        tracks = one_observation_per_image(mapper.observation_manager, built)
        mapper.end_reconstruction(False)
        return self._finish(built, tracks)

    def readjust(self, model: ColmapModel, *, settle: bool = True) -> ColmapModel:
        """Adjust a model whose observations were refined: they are trusted more, and nothing is added to them.

        The database is not asked: observations may be there that it does not know. Poses and cameras are found by a
        sample of the tracks, and all points placed by them.

        Args:
            model: it is not changed.
            settle: whether this is the last word, for which all observations are adjusted; otherwise principal points
                stay where they are as well.
        """
        reconstruction = pycolmap.Reconstruction(model.reconstruction)
        self._hold_distortion(number - 1 for number in reconstruction.reg_image_ids())
        for number, camera in reconstruction.cameras.items():
            if camera.model != self._cache.camera(number).model:
                _change_model(camera, self._without_distortion)
        options, bundle = self._mapper_options(), self._bundle_options()
        options.filter_max_reproj_error *= REFINED_TRUST
        bundle.ceres.loss_function_scale *= REFINED_SCALE
        tracks = model.tracks()
        sample = thinned(reconstruction, tracks)
        solve(sample, bundle, self._held)
        shifted = confirmed_shifts(sample, bundle, self._held) if settle else frozenset()
        take_over(reconstruction, sample)
        place_points(reconstruction, tracks, bundle.ceres.loss_function_scale)
        drop_misfits(reconstruction, options, self._held)
        if settle:
            solve_with_shifts(reconstruction, bundle, self._held, shifted)
            drop_misfits(reconstruction, options, self._held)
        return self._finish(reconstruction)

    def register_again(self, model: ColmapModel, images: Iterable[int]) -> ColmapModel | None:
        """Try images (0-based) that stand in no model against a finished one: it is better than that which they failed.

        Args:
            model: it is not changed. Observations of it may be where the database does not know them.
            images: those of known pose are passed over.

        Returns:
            the model with those that it holds, each adjusted together with its neighbours; None where it holds none.
        """
        candidates = {image + 1 for image in images} - self._held.poses.keys()
        # A camera that the model does not know would be one of few images.
        self._hold_distortion(())
        found = register_by_points(model.reconstruction, self._cache, candidates, self._evidence(), self._held)
        if found is None:
            return None
        found.tear_down()
        return self._finish(found)

    def _evidence(self) -> Evidence:
        bundle = self._bundle_options(rough=True)
        # A camera of its own would have a single image.
        bundle.refine_extra_params = False
        return Evidence(max_error_px=self._max_error, bundle=bundle, seed=self._settings.seed)

    def _placed(self, poses: Mapping[int, Float64]) -> pycolmap.Reconstruction:
        """All images of the database with some of them registered, cam_from_world [3, 4] by image number (0-based)."""
        reconstruction = pycolmap.Reconstruction()
        reconstruction.load(self._cache)
        for image, pose in poses.items():
            frame = reconstruction.frame(reconstruction.image(image + 1).frame_id)
            fixed = self._held.poses.get(image + 1)
            frame.rig_from_world = (
                pycolmap.Rigid3d(pycolmap.Rotation3d(pose[:, :3]), pose[:, 3]) if fixed is None else rigid(fixed)
            )
            reconstruction.register_frame(frame.frame_id)
        return reconstruction

    def _triangulated(
        self, reconstruction: pycolmap.Reconstruction, triangulation: pycolmap.IncrementalTriangulatorOptions
    ) -> pycolmap.IncrementalMapper:
        """A mapper that has begun a reconstruction and triangulated what its images match."""
        mapper = pycolmap.IncrementalMapper(self._cache)
        mapper.begin_reconstruction(reconstruction)
        numbers = sorted(reconstruction.reg_image_ids())
        for number in numbers:
            mapper.triangulate_image(triangulation, number)
        thin = [
            number
            for number in numbers
            if number in self._confirmed and reconstruction.image(number).num_points3D < THIN
        ]
        as_of_few = self._triangulation_options(0)
        for number in thin:
            mapper.triangulate_image(as_of_few, number)
        mapper.complete_and_merge_tracks(triangulation)
        return mapper

    def _adjust_sampled(
        self,
        mapper: pycolmap.IncrementalMapper,
        triangulation: pycolmap.IncrementalTriangulatorOptions,
        *,
        grow: bool,
    ) -> pycolmap.IncrementalMapper:
        """Adjust poses and cameras to a sample of the tracks, and triangulate anew what they all match.

        Returns:
            what holds the adjusted reconstruction.
        """
        mapper, most = self._triangulated_again(mapper, triangulation), 0
        # An image that is registered and lost in every round must not go on for ever.
        while grow and self._waiting(mapper) and mapper.reconstruction.num_reg_images() > most:
            reconstruction, most = mapper.reconstruction, mapper.reconstruction.num_reg_images()
            self._place_all(mapper, ColmapModel(reconstruction).tracks())
            if not self._register_more(mapper, triangulation):
                break
            mapper = self._triangulated_again(mapper, triangulation)
        reconstruction, bundle = mapper.reconstruction, self._bundle_options(rough=True)
        tracks = ColmapModel(reconstruction).tracks()
        sample = self._adjusted_sample(reconstruction, tracks, bundle)
        shifted = self._off_centre(sample, sample, bundle)
        for number, params in shifted.items():
            sample.camera(number).params = params.tolist()
        if shifted:
            solve_with_shifts(sample, bundle, self._held, shifted.keys())
        take_over(reconstruction, sample)
        self._place_all(mapper, tracks)
        self._held.drop_empty(mapper.observation_manager, reconstruction, self._options)
        return mapper

    def _triangulated_again(
        self, mapper: pycolmap.IncrementalMapper, triangulation: pycolmap.IncrementalTriangulatorOptions
    ) -> pycolmap.IncrementalMapper:
        """The reconstruction adjusted to a sample of its tracks, and all of them triangulated anew.

        Args:
            mapper: holds the reconstruction as it was.
            triangulation: of the tracks.
        """
        before = mapper.reconstruction
        bundle = self._bundle_options(rough=True)
        # Poses that are off a degree would be explained by distortion.
        bundle.refine_extra_params = False
        sample = self._adjusted_sample(before, ColmapModel(before).tracks(), bundle)
        mapper.end_reconstruction(False)
        after = self._placed(ColmapModel(sample).poses())
        take_over(after, sample)
        return self._triangulated(after, triangulation)

    def _adjusted_sample(
        self, reconstruction: pycolmap.Reconstruction, tracks: Tracks, bundle: pycolmap.BundleAdjustmentOptions
    ) -> pycolmap.Reconstruction:
        """A sample of all `tracks`, adjusted without what does not fit."""
        sample = thinned(reconstruction, tracks)
        solve(sample, bundle, self._held)
        drop_misfits(sample, self._options, self._held)
        return sample

    def _place_all(self, mapper: pycolmap.IncrementalMapper, tracks: Tracks) -> None:
        """Move all points to where the rays of their `tracks` meet, and drop observations that do not fit."""
        place_points(mapper.reconstruction, tracks, self._settings.pixel_scale)
        mapper.observation_manager.filter_observations_with_negative_depth()
        mapper.filter_points(self._options)

    def _waiting(self, mapper: pycolmap.IncrementalMapper) -> list[int]:
        """Images that may be registered. Those of known pose stand where it says, or in no model."""
        return [number for number in mapper.find_next_images(self._options, False) if number not in self._held.poses]

    def _finish(self, reconstruction: pycolmap.Reconstruction, tracks: Tracks | None = None) -> ColmapModel:
        """All cameras in the model that was asked for, those whose distortion was held too; known ones as they were."""
        for number, camera in reconstruction.cameras.items():
            if number not in self._held.given_cameras and camera.model.name != self._settings.config.camera_model:
                _change_model(camera, self._settings.config.camera_model)
        self._held.place(reconstruction)
        return ColmapModel(reconstruction, tracks)

    def _hold_distortion(self, images: Iterable[int]) -> None:
        """Take the distortion from cameras that took few of the images (0-based).

        With few images, distortion explains away outliers and errors of the focal length: on ten internet photos of
        ten cameras it costs a tenth of AUC@5.
        """
        taken = Counter(self._cache.image(image + 1).camera_id for image in images)
        for number, (model, params) in self._cameras.items():
            # In the database's copy: the mapper registers images by it, and wants both to agree.
            camera = self._cache.camera(number)
            camera.model, camera.params = model, params
            if taken[number] < MIN_IMAGES and number not in self._held.given_cameras:
                _change_model(camera, self._without_distortion)

    @property
    def _without_distortion(self) -> str:
        """The model of a camera whose distortion is held, near to that which was asked for."""
        return "SIMPLE_FISHEYE" if self._settings.config.camera_model.endswith("FISHEYE") else "SIMPLE_PINHOLE"

    def _settle_principal_points(
        self, mapper: pycolmap.IncrementalMapper, triangulation: pycolmap.IncrementalTriangulatorOptions
    ) -> None:
        """Refine the principal points that are determined and out of the middle; leave the others there."""
        reconstruction = mapper.reconstruction
        options = self._bundle_options()
        sample = thinned(reconstruction, ColmapModel(reconstruction).tracks())
        refined = self._off_centre(reconstruction, sample, options)
        if not refined:
            return
        for number, params in refined.items():
            reconstruction.camera(number).params = params.tolist()
        held = self._mapper_options()
        held.constant_cameras = cameras_of(reconstruction) - set(refined)
        options.refine_principal_point = True
        self._refine(mapper, held, options, triangulation, 1)

    def _off_centre(
        self,
        reconstruction: pycolmap.Reconstruction,
        sample: pycolmap.Reconstruction,
        bundle: pycolmap.BundleAdjustmentOptions,
    ) -> dict[int, Float64]:
        """Refined parameters of the cameras whose principal points are determined and out of the middle.

        Significant against the noise of the observations, and not by what these have in common with no others: the
        sample of them that was held out must not be explained worse.
        """
        found = off_centre_cameras(reconstruction, bundle, self._held)
        gains = gains_of_shifts(sample, bundle, self._held, found.keys()) if found else {}
        return {number: params for number, params in found.items() if gains[number] > -MAX_LOSS}

    def _adjust(
        self, mapper: pycolmap.IncrementalMapper, triangulation: pycolmap.IncrementalTriangulatorOptions
    ) -> None:
        self._refine(mapper, self._options, self._bundle_options(), triangulation, MAX_REFINEMENTS)

    def _refine(
        self,
        mapper: pycolmap.IncrementalMapper,
        options: pycolmap.IncrementalMapperOptions,
        bundle: pycolmap.BundleAdjustmentOptions,
        triangulation: pycolmap.IncrementalTriangulatorOptions,
        rounds: int,
    ) -> None:
        """Adjust everything in so many rounds at most, and take out images that hold nothing any more."""
        if self._held.holds(mapper.reconstruction):
            refine_around(mapper, self._held, options, bundle, triangulation, (rounds, MAX_CHANGE))
            return
        mapper.iterative_global_refinement(rounds, MAX_CHANGE, options, bundle, triangulation, True)
        mapper.filter_frames(options)

    def _register_more(
        self, mapper: pycolmap.IncrementalMapper, triangulation: pycolmap.IncrementalTriangulatorOptions
    ) -> int:
        """Try the images that see enough of the model's points; returns how many were registered."""
        added = 0
        for number in self._waiting(mapper):
            if mapper.register_next_image(self._registering(self._cache.image(number).camera_id), number):
                mapper.triangulate_image(triangulation, number)
                adjust_around(mapper.reconstruction, number, self._bundle_options(rough=True), self._held)
                added += 1
        return added

    def _registering(self, camera: int) -> pycolmap.IncrementalMapperOptions:
        """Options with which an image of a camera is registered: what is fixed is not refined by it either."""
        if camera not in self._held.fixed_cameras:
            return self._options
        options = self._mapper_options()
        options.abs_pose_refine_focal_length = options.abs_pose_refine_extra_params = False
        return options

    def _mapper_options(self) -> pycolmap.IncrementalMapperOptions:
        options = _mapper_options(self._settings)
        options.constant_cameras = set(self._held.fixed_cameras)
        self._held.loosen(options, self._cache.cameras)
        return options

    def _triangulation_options(self, num_images: int) -> pycolmap.IncrementalTriangulatorOptions:
        options = pycolmap.IncrementalTriangulatorOptions()
        options.min_angle = self._settings.config.min_angle_deg
        options.complete_max_reproj_error = self._max_error
        options.merge_max_reproj_error = self._max_error
        # Two or three images have hardly any longer tracks.
        options.ignore_two_view_tracks = num_images > 3
        options.random_seed = self._settings.seed
        self._held.loosen(options, self._cache.cameras)
        return options

    def _bundle_options(self, *, rough: bool = False) -> pycolmap.BundleAdjustmentOptions:
        options = pycolmap.BundleAdjustmentOptions()
        options.print_summary = False
        # Wrong observations of two views cannot be told, and with few photos soft L1 lets them bend the focal length.
        options.ceres.loss_function_type = pycolmap.LossFunctionType.CAUCHY
        options.ceres.loss_function_scale = self._settings.pixel_scale
        options.ceres.solver_options.max_num_iterations = 50
        options.ceres.solver_options.num_threads = self._settings.threads
        options.ceres.min_num_residuals_for_cpu_multi_threading = PARALLEL_RESIDUALS
        options.ceres.solver_options.function_tolerance = ROUGH_TOLERANCE if rough else TOLERANCE
        return options

    @property
    def _max_error(self) -> float:
        return self._settings.config.max_reprojection_error_px * self._settings.pixel_scale


def _change_model(camera: pycolmap.Camera, model: str) -> None:
    """Give a camera another model of COLMAP's with the same pinhole part, and no distortion."""
    changed = pycolmap.Camera.create_from_model_name(
        camera.camera_id, model, camera.mean_focal_length(), camera.width, camera.height
    )
    changed.principal_point_x, changed.principal_point_y = camera.principal_point_x, camera.principal_point_y
    camera.model, camera.params = changed.model, changed.params.tolist()


def _mapper_options(settings: MapperSettings) -> pycolmap.IncrementalMapperOptions:
    options = pycolmap.IncrementalMapperOptions()
    options.filter_max_reproj_error = settings.config.max_reprojection_error_px * settings.pixel_scale
    options.filter_min_tri_angle = settings.config.min_angle_deg
    options.abs_pose_max_error = 3 * options.filter_max_reproj_error
    options.num_threads = settings.threads
    options.random_seed = settings.seed
    return options
