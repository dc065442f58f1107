"""Bundle adjustment around cameras and poses that are known and stay as they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import pycolmap

from mast3r_sfm.types import Float64, Rig


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a model is built around. Cameras and images by their numbers in the database, from 1."""

    given_cameras: frozenset[int] = frozenset()
    """Cameras that the user gave: they keep their model and their principal point."""
    fixed_cameras: frozenset[int] = frozenset()
    """Those of them that nothing changes."""
    poses: Mapping[int, Float64] = field(default_factory=dict)
    """cam_from_world [7] of images whose pose nothing changes: quaternion x, y, z, w and translation."""

    @classmethod
    def of(cls, rig: Rig, poses: Mapping[int, Float64] | None = None) -> Held:
        """What is known of the cameras of a collection and, by image number from 0, of its poses."""
        cameras = list(enumerate(rig.cameras, start=1))
        return cls(
            given_cameras=frozenset(number for number, camera in cameras if camera.is_given),
            fixed_cameras=frozenset(number for number, camera in cameras if camera.is_fixed),
            poses={image + 1: np.asarray(pose, np.float64) for image, pose in (poses or {}).items()},
        )

    def loosen(
        self,
        options: pycolmap.IncrementalMapperOptions | pycolmap.IncrementalTriangulatorOptions,
        cameras: pycolmap.CameraMap,
    ) -> None:
        """Have given cameras not taken for nonsense, whatever their parameters."""
        for number in sorted(self.given_cameras & set(cameras.keys())):
            camera = cameras[number]
            ratio = camera.mean_focal_length() / max(camera.width, camera.height)
            options.min_focal_length_ratio = min(options.min_focal_length_ratio, 0.5 * ratio)
            options.max_focal_length_ratio = max(options.max_focal_length_ratio, 2 * ratio)
            extra = np.abs(np.array(camera.params)[list(camera.extra_params_idxs())]).max(initial=0.0)
            options.max_extra_param = max(options.max_extra_param, 2 * float(extra))

    def holds(self, reconstruction: pycolmap.Reconstruction) -> bool:
        """Whether a reconstruction is in the frame of the fixed poses: it holds one of them."""
        return not self.poses.keys().isdisjoint(reconstruction.reg_image_ids())

    def place(self, reconstruction: pycolmap.Reconstruction) -> None:
        """Give the images of fixed pose that pose, to the bit: a solver may have made its quaternion longer."""
        for number in sorted(self.poses.keys() & set(reconstruction.reg_image_ids())):
            frame = reconstruction.frame(reconstruction.image(number).frame_id)
            frame.rig_from_world = rigid(self.poses[number])

    def drop_empty(
        self,
        manager: pycolmap.ObservationManager,
        reconstruction: pycolmap.Reconstruction,
        options: pycolmap.IncrementalMapperOptions,
    ) -> None:
        """Take out images that hold nothing any more, or whose camera became nonsense; not those of fixed pose."""
        bounds = options.min_focal_length_ratio, options.max_focal_length_ratio, options.max_extra_param
        kept = {reconstruction.image(image).frame_id for image in self.poses if reconstruction.exists_image(image)}
        for frame in manager.filter_frames(*bounds, 1):
            if frame not in kept:
                manager.deregister_frame(frame)

    def configure(
        self, reconstruction: pycolmap.Reconstruction, constant_cameras: Collection[int] = ()
    ) -> pycolmap.BundleAdjustmentConfig:
        """All registered images, with what is fixed constant; where no pose is, the gauge is fixed by two cameras."""
        config = pycolmap.BundleAdjustmentConfig()
        registered = sorted(reconstruction.reg_image_ids())
        for image in registered:
            config.add_image(image)
        used = {reconstruction.image(image).camera_id for image in registered}
        for camera in sorted((set(constant_cameras) | self.fixed_cameras) & used):
            config.set_constant_cam_intrinsics(camera)
        held = sorted(self.poses.keys() & set(registered))
        for image in held:
            config.set_constant_rig_from_world_pose(reconstruction.image(image).frame_id)
        if not held:
            config.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
        return config


def rigid(params: Float64) -> pycolmap.Rigid3d:
    """A pose from [7]."""
    return pycolmap.Rigid3d(pycolmap.Rotation3d(params[:4]), params[4:])


def refine_around(
    mapper: pycolmap.IncrementalMapper,
    held: Held,
    options: pycolmap.IncrementalMapperOptions,
    bundle: pycolmap.BundleAdjustmentOptions,
    triangulation: pycolmap.IncrementalTriangulatorOptions,
    rounds: tuple[int, float],
) -> None:
    """What the mapper's own global refinement does, with poses that stay as they are.

    The mapper knows constant poses only as those that it found in the model when it began, and counts images by that.

    Args:
        mapper: has begun a reconstruction.
        held: what is fixed.
        options: of the mapper.
        bundle: of the adjustment.
        triangulation: of completion and merging.
        rounds: how many there are at most, and the share of the observations that the last one may still change.
    """
    reconstruction = mapper.reconstruction
    mapper.complete_and_merge_tracks(triangulation)
    mapper.retriangulate(triangulation)
    for _ in range(rounds[0]):
        observations = max(reconstruction.compute_num_observations(), 1)
        mapper.observation_manager.filter_observations_with_negative_depth()
        config = held.configure(reconstruction, options.constant_cameras)
        pycolmap.create_default_bundle_adjuster(bundle, config, reconstruction).solve()
        changed = mapper.complete_and_merge_tracks(triangulation) + mapper.filter_points(options)
        if changed / observations < rounds[1]:
            break
    held.drop_empty(mapper.observation_manager, reconstruction, options)
