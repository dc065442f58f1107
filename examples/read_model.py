"""Open a COLMAP model and print its cameras and poses.

python examples/read_model.py out/sparse/0
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pycolmap


def main() -> None:
    """Parse the arguments, read, print."""
    parser = argparse.ArgumentParser(description="Print the cameras and poses of a COLMAP model.")
    parser.add_argument("model", type=Path, help="folder with cameras.bin, images.bin, points3D.bin")
    model = pycolmap.Reconstruction(parser.parse_args().model)
    print(f"{model.num_reg_images()} images, {model.num_points3D()} points")
    for number, camera in sorted(model.cameras.items()):
        parameters = ", ".join(
            f"{name} {value:.6g}" for name, value in zip(camera.params_info.split(", "), camera.params, strict=True)
        )
        print(f"camera {number}: {camera.model.name}, {camera.width} x {camera.height} px, {parameters}")
    for image in sorted(model.images.values(), key=lambda image: image.name):
        # x_camera = rotation @ x_world + translation; the camera looks along its z axis, y points down.
        cam_from_world = image.cam_from_world().matrix()
        rotation, translation = cam_from_world[:, :3], cam_from_world[:, 3]
        centre = -rotation.T @ translation
        print(
            f"{image.name}: camera {image.camera_id}, centre {np.round(centre, 3).tolist()}, "
            f"looks along {np.round(rotation[2], 3).tolist()}, {image.num_points3D} points"
        )


if __name__ == "__main__":
    main()
