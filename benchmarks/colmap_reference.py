"""COLMAP's SIFT, exhaustive matching and incremental mapper on a folder of photos; what the tool is compared with.

Defaults throughout, on the CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pycolmap


def main() -> None:
    """Write OUT/sparse/0, OUT/sparse/1, …."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one-camera", action="store_true", help="all photos have the same size and share a camera")
    options = parser.parse_args()
    sparse = options.out / "sparse"
    sparse.mkdir(parents=True, exist_ok=True)
    database = options.out / "database.db"
    mode = pycolmap.CameraMode.SINGLE if options.one_camera else pycolmap.CameraMode.PER_IMAGE
    cpu = pycolmap.Device.cpu
    pycolmap.extract_features(
        database,
        options.images,
        camera_mode=mode,
        extraction_options=pycolmap.FeatureExtractionOptions(num_threads=options.threads),
        device=cpu,
    )
    pycolmap.match_exhaustive(
        database, matching_options=pycolmap.FeatureMatchingOptions(num_threads=options.threads), device=cpu
    )
    mapping = pycolmap.IncrementalPipelineOptions()
    mapping.num_threads = options.threads
    pycolmap.incremental_mapping(database, options.images, sparse, options=mapping)


if __name__ == "__main__":
    main()
