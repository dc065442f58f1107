"""Official weights: which there are, what their licence allows, where they lie, and whether they are whole.

Nothing here needs torch until weights are verified.
"""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mast3r_sfm.errors import WeightsError

if TYPE_CHECKING:
    from mast3r_sfm.models.mast3r.architecture import Architecture
    from mast3r_sfm.models.mast3r.checkpoint import Checkpoint

FOLDER_VARIABLE = "MAST3R_SFM_WEIGHTS"
LICENSE = "CC BY-NC-SA 4.0"
HUB_FILES = ("config.json", "model.safetensors")
RECORD = "source.json"
RETRIEVAL_SUFFIX = "_retrieval_trainingfree.pth"

_PUBLISHER = "https://download.europe.naverlabs.com/ComputerVision"
_DATA_LICENSES = (
    "- Training data: the publisher also binds users of these weights to the licences of all data sets that they were\n"
    "  trained on; that of the map-free relocalisation data set is very restrictive. Read the publisher's notice first."
)


@dataclass(frozen=True, kw_only=True)
class OfficialWeights:
    """One of the weights that their authors publish."""

    name: str
    """As commands take it."""
    about: str
    stem: str
    """Of the official file, and name of the hub's repository."""
    parameters: int
    """All of them float32."""
    paper: str
    further_terms: str = ""

    @property
    def repo(self) -> str:
        """The hub's repository."""
        return f"naver/{self.stem}"

    @property
    def url(self) -> str:
        """The official file, for getting it by hand."""
        return f"{_PUBLISHER}/{self.stem.partition('_')[0]}/{self.stem}.pth"

    @property
    def size_bytes(self) -> int:
        """Of the hub's file, less its header; the official .pth is about as large."""
        return 4 * self.parameters

    @property
    def license_note(self) -> str:
        """What the licence allows and asks for, in a few lines."""
        lines = [
            f"The weights {self.name} ({self.stem}) are published by NAVER under {LICENSE}",
            "(https://creativecommons.org/licenses/by-nc-sa/4.0/). In short:",
            "- Non-commercial: they may be used, shared and changed, but not for commercial purposes.",
            f"- Attribution: credit their authors ({self.paper}).",
            "- Share alike: weights made from them may be passed on under this licence only.",
            *([self.further_terms] if self.further_terms else []),
            "The licence of mast3r-sfm itself, Apache-2.0, does not extend to them.",
        ]
        return "\n".join(lines)


CATALOGUE: dict[str, OfficialWeights] = {
    weights.name: weights
    for weights in (
        OfficialWeights(
            name="mast3r",
            about="MASt3R: metric pointmaps and descriptors, images of 512 px",
            stem="MASt3R_ViTLarge_BaseDecoder_512_catmlpdpt_metric",
            parameters=688_638_856,
            paper="Leroy et al., MASt3R, arXiv 2406.09756",
            further_terms=_DATA_LICENSES,
        ),
        OfficialWeights(
            name="dust3r",
            about="DUSt3R: pointmaps, DPT head, images of 512 px",
            stem="DUSt3R_ViTLarge_BaseDecoder_512_dpt",
            parameters=571_171_208,
            paper="Wang et al., DUSt3R, arXiv 2312.14132",
        ),
        OfficialWeights(
            name="dust3r-512-linear",
            about="DUSt3R: pointmaps, linear head, images of 512 px",
            stem="DUSt3R_ViTLarge_BaseDecoder_512_linear",
            parameters=532_342_784,
            paper="Wang et al., DUSt3R, arXiv 2312.14132",
        ),
        OfficialWeights(
            name="dust3r-224-linear",
            about="DUSt3R: pointmaps, linear head, images of 224 px",
            stem="DUSt3R_ViTLarge_BaseDecoder_224_linear",
            parameters=532_342_784,
            paper="Wang et al., DUSt3R, arXiv 2312.14132",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Record:
    """Where downloaded weights come from; lies beside them as source.json."""

    name: str
    repo: str
    revision: str
    """The commit of the hub's repository."""
    license: str
    license_accepted: str
    """When, in ISO 8601."""
    sha256: dict[str, str]
    """Of each file, by its name."""

    def to_json(self) -> str:
        """As it is stored."""
        return json.dumps(asdict(self), indent=2) + "\n"


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was found out about weights that are in order."""

    path: Path
    architecture: Architecture
    parameters: int
    sha256: dict[str, str]
    """Of each file, by its name."""
    record: Record | None
    """With which the files agree; None where there is none to compare with."""


def official_weights(name: str) -> OfficialWeights:
    """The entry of the catalogue.

    Raises:
        WeightsError: there is none of that name.
    """
    if name in CATALOGUE:
        return CATALOGUE[name]
    close = difflib.get_close_matches(name, CATALOGUE, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise WeightsError(f"there are no official weights {name!r}; known: {', '.join(CATALOGUE)}{hint}")


def weights_folder() -> Path:
    """Where weights are kept: $MAST3R_SFM_WEIGHTS, else mast3r-sfm/weights in the user's cache folder."""
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(os.path.expanduser(chosen))  # noqa: PTH111 (Path.expanduser raises where there is no home)
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification asks for relative paths to be ignored.
    root = Path(cache) if Path(cache).is_absolute() else Path(os.path.expanduser("~/.cache"))  # noqa: PTH111
    return root / "mast3r-sfm" / "weights"


def hub_folder(weights: OfficialWeights) -> Path:
    """Where a download goes."""
    return weights_folder() / weights.stem


def path_by_hand(weights: OfficialWeights) -> Path:
    """Where the official file is looked for when a user has got it by hand."""
    return weights_folder() / f"{weights.stem}.pth"


def find_weights(name: str) -> Path | None:
    """Installed weights of the catalogue, as `read_checkpoint` takes them; None where they are not installed.

    Raises:
        WeightsError: there are no official weights of that name.
    """
    weights = official_weights(name)
    folder = hub_folder(weights)
    if all(_is_file(folder / file) for file in HUB_FILES):
        return folder
    return path_by_hand(weights) if _is_file(path_by_hand(weights)) else None


def find_retrieval_model(checkpoint: Path) -> Path | None:
    """The official retrieval model that lies beside a checkpoint under the checkpoint's own name.

    Args:
        checkpoint: as `read_checkpoint` takes it. With NAME.pth or NAME.safetensors belongs
            NAME_retrieval_trainingfree.pth; with a hub folder, one named after the folder, in it or beside it.
    """
    if checkpoint.name == HUB_FILES[1] or checkpoint.is_dir():
        # Absolute, since "." has no name.
        folder = checkpoint.absolute() if checkpoint.is_dir() else checkpoint.absolute().parent
        candidates = [place / f"{folder.name}{RETRIEVAL_SUFFIX}" for place in (folder, folder.parent)]
    else:
        candidates = [checkpoint.with_name(f"{checkpoint.stem}{RETRIEVAL_SUFFIX}")]
    return next((path for path in candidates if _is_file(path)), None)


def find_retrieval_files(checkpoint: Path) -> Path | None:
    """The retrieval model that lies beside a checkpoint, where its codebook does as well."""
    path = find_retrieval_model(checkpoint)
    return path if path is not None and _is_file(codebook_path(path)) else None


def codebook_path(model: Path) -> Path:
    """Where the codebook of a retrieval model belongs: the model's name up to its last underscore, `_codebook.pkl`."""
    return model.with_name(f"{model.name.rpartition('_')[0] or model.stem}_codebook.pkl")


def missing_text(weights: OfficialWeights) -> str:
    """What to do where weights are not installed."""
    return (
        f"the weights {weights.name} are not installed: mast3r-sfm weights download {weights.name} gets them, and says "
        "what their licence allows"
    )


def mast3r_problem() -> str:
    """ "" where MASt3R's weights are installed, else how to get them."""
    return "" if find_weights("mast3r") is not None else missing_text(official_weights("mast3r"))


def verify_weights(target: str) -> Verification:
    """Check weights: the files against the record of their download, their tensors against their network.

    Args:
        target: a name of the catalogue, or a path as `read_checkpoint` takes it.

    Raises:
        WeightsError: they are not installed, broken, or not what the record says.
    """
    path = find_weights(target) if target in CATALOGUE else Path(target)
    if path is None:
        raise WeightsError(missing_text(CATALOGUE[target]))
    from mast3r_sfm.models.mast3r.checkpoint import find_files, read_checkpoint
    from mast3r_sfm.models.mast3r.network import check_tensors
    from mast3r_sfm.models.tensor_files import sha256_of

    files = find_files(path)
    digests = {file.name: sha256_of(file) for file in files.all}
    record = _read_record(files.weights.parent)
    if record is not None and files.weights.name in record.sha256:
        _compare(digests, record, files.weights.parent)
    else:
        record = None
    checkpoint = read_checkpoint(path)
    try:
        check_tensors(checkpoint.architecture, checkpoint.tensors)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    return Verification(
        path=path,
        architecture=checkpoint.architecture,
        parameters=_parameters(checkpoint),
        sha256=digests,
        record=record,
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False  # in a folder that may not be looked into


def _read_record(folder: Path) -> Record | None:
    path = folder / RECORD
    if not _is_file(path):
        return None
    try:
        values = json.loads(path.read_bytes())
        record = Record(**values)
        if all(isinstance(text, str) for text in (record.repo, record.revision, *record.sha256.values())):
            return record
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        pass
    raise WeightsError(f"{path}, the record of a download, cannot be read: remove {folder} and download again")


def _compare(digests: dict[str, str], record: Record, folder: Path) -> None:
    for name, digest in digests.items():
        if digest != record.sha256.get(name):
            raise WeightsError(
                f"{folder / name} is not what was downloaded: its sha256 is {digest}, that of the download was "
                f"{record.sha256.get(name, 'not recorded')}; remove {folder} and download again"
            )


def _parameters(checkpoint: Checkpoint) -> int:
    """A tensor with several names counts once."""
    distinct = {
        tensor.data_ptr(): tensor.numel()
        for name, tensor in checkpoint.tensors.items()
        if ".scratch.layer_rn." not in name
    }
    return sum(distinct.values())
