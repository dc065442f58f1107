"""Views as a folder of photos with their truth, in the form that the readers of ground truth take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from PIL import Image

from mast3r_sfm.errors import ArtifactError, ConfigError, InputError
from mast3r_sfm.synthetic.render import View

_HALF_PIXEL = 0.5
"""gt.json counts pixels from the centre of the top-left one, COLMAP from its corner."""


def write_photos(folder: Path, views: Mapping[str, View], *, quality: int = 92) -> None:
    """Write `folder`/images/<name> and `folder`/gt.json.

    Args:
        folder: made where it does not exist.
        views: by name, a relative POSIX path whose suffix says the format.
        quality: of JPEG, 1–95.

    Raises:
        ConfigError: impossible quality.
        InputError: a name leads out of the folder or has no suffix of an image format.
        ArtifactError: the folder cannot be written.
    """
    if not 1 <= quality <= 95:
        raise ConfigError(f"quality = {quality}: must be 1–95")
    known = Image.registered_extensions()
    for name in views:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or path.suffix.lower() not in known:
            raise InputError(f"image name {name!r} must be a relative path that ends in .jpg, .png or the like")
    try:
        for name, view in views.items():
            target = folder / "images" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(view.image).save(target, quality=quality)
        text = json.dumps({"images": {name: _truth(view) for name, view in views.items()}}, indent=1)
        (folder / "gt.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"cannot write photos to {folder}: {error}; choose another folder") from error


def _truth(view: View) -> dict[str, object]:
    intrinsics = view.K.copy()
    intrinsics[:2, 2] -= _HALF_PIXEL
    return {
        "R": view.cam_from_world[:, :3].tolist(),
        "t": view.cam_from_world[:, 3].tolist(),
        "K": intrinsics.tolist(),
        "width": view.camera.width_px,
        "height": view.camera.height_px,
    }
