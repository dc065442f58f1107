"""From the arguments that a checkpoint states to the `Architecture` of its network.

Official `.pth` files state them as text, `ClassName(key=value, …)`, hub folders as JSON. Text is parsed and never
evaluated. What is missing gets a default only where every official model has the same value; an argument that we do not
know is refused by name, since it could change what the network computes.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from typing import Any, cast, get_args

from mast3r_sfm.errors import WeightsError
from mast3r_sfm.models.mast3r.architecture import Architecture, Confidence, DptWidths, Head

_MAST3R = "AsymmetricMASt3R"
_DUST3R = "AsymmetricCroCo3DStereo"

_SIZES = {
    "encoder_width": "enc_embed_dim",
    "encoder_depth": "enc_depth",
    "encoder_heads": "enc_num_heads",
    "decoder_width": "dec_embed_dim",
    "decoder_depth": "dec_depth",
    "decoder_heads": "dec_num_heads",
    "patch_px": "patch_size",
}
# What all official models have in common.
_DEFAULTS: dict[str, object] = {
    "patch_size": 16,
    "mlp_ratio": 4,
    "output_mode": "pts3d",
    "depth_mode": ("exp", -math.inf, math.inf),
    "conf_mode": ("exp", 1, math.inf),
    "two_confs": False,
    "desc_conf_mode": None,
    "patch_embed_cls": "PatchEmbedDust3R",
    "norm_im2_in_dec": True,
    "desc_mode": "norm",
}
# What they differ in, or what no default is documented for.
_REQUIRED = ("head_type", "img_size", "pos_embed", *(name for name in _SIZES.values() if name not in _DEFAULTS))

# Arguments of which one result is supported; the two patch embeddings differ only in how portrait images are stored.
_ONLY: dict[str, tuple[object, ...]] = {
    "patch_embed_cls": ("PatchEmbedDust3R", "ManyAR_PatchEmbed"),
    "norm_im2_in_dec": (True,),
    "desc_mode": ("norm",),
}
# Arguments that matter for training or for the layout of batches only, and what a JSON file may say about itself.
_WITHOUT_EFFECT = ("freeze", "landscape_only", "mask_ratio")
_DESCRIPTIVE = ("architectures", "library_name", "license", "model_type", "tags", "torch_dtype", "transformers_version")
_KNOWN = {*_REQUIRED, *_DEFAULTS, *_WITHOUT_EFFECT, *_DESCRIPTIVE}

_MAX_TEXT = 10_000
# Far beyond any network, and small enough that a wrong figure does not end in an endless loop.
_MAX_SIZE = 65_536


def parse_model_text(text: str) -> tuple[str, dict[str, object]]:
    """Class name and arguments of `ClassName(key=value, …)`.

    Values are numbers, texts, True, False, None, inf, and tuples or lists of such.

    Raises:
        WeightsError: the text is of another form; the part that is wrong is named.
    """
    if len(text) > _MAX_TEXT:
        raise WeightsError(f"the text that states its network has {len(text)} characters; at most {_MAX_TEXT} are read")
    text = text.strip()
    try:
        call = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise WeightsError(f"the text that states its network cannot be parsed: {_excerpt(text)}") from error
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise WeightsError(f"the text that states its network is not of the form Name(key=value, …): {_excerpt(text)}")
    if call.args:
        raise WeightsError(f"an argument of its network has no name: {_source(text, call.args[0])}")
    arguments: dict[str, object] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise WeightsError(f"an argument of its network has no name: **{_source(text, keyword.value)}")
        if keyword.arg in arguments:
            raise WeightsError(f"an argument of its network is given twice: {keyword.arg}")
        try:
            arguments[keyword.arg] = _literal(keyword.value)
        except ValueError as error:
            raise WeightsError(f"an argument of its network is no plain value: {_source(text, keyword)}") from error
    return call.func.id, arguments


def architecture_from(
    arguments: Mapping[str, object], *, class_name: str | None = None, dpt: Mapping[str, object] | None = None
) -> Architecture:
    """The architecture that constructor arguments describe.

    Args:
        arguments: by the names that the official models use; tuples may be lists, infinities may be "inf" and "-inf".
        class_name: of the official class; hub folders do not state it, and nothing depends on it.
        dpt: feature_dim, last_dim, layer_dims of the DPT head where they are not the official ones.

    Raises:
        WeightsError: an argument is missing, unknown, or has a value that is not supported.
    """
    if class_name not in (None, _MAST3R, _DUST3R):
        raise WeightsError(f"its network is {class_name}; supported are {_MAST3R} and {_DUST3R}")
    if missing := [name for name in _REQUIRED if name not in arguments]:
        raise WeightsError(f"the description of its network lacks {', '.join(missing)}")
    if unknown := sorted(arguments.keys() - _KNOWN):
        raise WeightsError(
            f"its network has arguments that are not known, and could change its results: {', '.join(unknown)}"
        )
    given = {**_DEFAULTS, **arguments}
    for name, values in _ONLY.items():
        if given[name] not in values:
            raise _unsupported(name, given[name])
    if _limits("depth_mode", given["depth_mode"]) != (-math.inf, math.inf):
        raise _unsupported("depth_mode", given["depth_mode"])
    head = given["head_type"]
    if head not in get_args(Head) or (head == "catmlp+dpt" and class_name == _DUST3R):
        raise _unsupported("head_type", head)
    channels = _descriptor_channels(given["output_mode"], str(head))
    sizes = {ours: _size(name, given[name]) for ours, name in _SIZES.items()}
    return Architecture(
        **sizes,
        image_size_px=_image_size(given["img_size"]),
        mlp_ratio=_mlp_ratio(given["mlp_ratio"]),
        rope_base=_rope_base(given["pos_embed"]),
        head=cast(Head, head),
        descriptor_channels=channels,
        confidence=_confidence("conf_mode", given["conf_mode"]),
        descriptor_confidence=_descriptor_confidence(given) if channels else Confidence(low=0.0),
        dpt=_dpt_widths(dpt or {}),
    )


def _literal(node: ast.expr) -> object:
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
        return node.value
    if isinstance(node, ast.Name) and node.id == "inf":
        return math.inf
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        number = _literal(node.operand) if isinstance(node.operand, ast.Constant | ast.Name) else None
        if isinstance(number, int | float) and not isinstance(number, bool):
            return -number
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_literal(element) for element in node.elts)
    raise ValueError("not a literal")


def _excerpt(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else f"{line[:77]}…"


def _source(text: str, node: ast.AST) -> str:
    return _excerpt(ast.get_source_segment(text, node) or "")


def _unsupported(name: str, value: object) -> WeightsError:
    return WeightsError(f"its network has {name}={value!r}, which is not supported")


def _size(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_SIZE:
        raise _unsupported(name, value)
    return value


def _sizes(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise _unsupported(name, value)
    return tuple(_size(name, element) for element in value)


def _image_size(value: object) -> int:
    sizes = _sizes("img_size", value if isinstance(value, list | tuple) else (value, value))
    if len(sizes) != 2:
        raise _unsupported("img_size", value)
    return max(sizes)


def _mlp_ratio(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 64:
        raise _unsupported("mlp_ratio", value)
    return float(value)


def _rope_base(value: object) -> float:
    match = re.fullmatch(r"RoPE(\d{1,6}(?:\.\d{1,6})?)", value) if isinstance(value, str) else None
    if match is None or float(match[1]) <= 0:
        raise _unsupported("pos_embed", value)
    return float(match[1])


def _descriptor_channels(mode: object, head: str) -> int:
    match = re.fullmatch(r"pts3d(?:\+desc(\d{1,5}))?", mode) if isinstance(mode, str) else None
    channels = 0 if match is None or match[1] is None else int(match[1])
    # The head's type and what it puts out are stated separately, and must say the same.
    if match is None or (channels > 0) != (head == "catmlp+dpt") or channels > _MAX_SIZE:
        raise WeightsError(f"its network has output_mode={mode!r} with head_type={head!r}, which is not supported")
    return channels


def _limits(name: str, value: object) -> tuple[float, float]:
    """Of ("exp", low, high)."""
    if not isinstance(value, list | tuple) or len(value) != 3 or value[0] != "exp":
        raise _unsupported(name, value)
    limits = [math.inf if text == "inf" else -math.inf if text == "-inf" else text for text in value[1:]]
    if any(isinstance(limit, bool) or not isinstance(limit, int | float) for limit in limits):
        raise _unsupported(name, value)
    try:
        low, high = map(float, limits)
    except OverflowError as error:
        raise _unsupported(name, value) from error
    if not low < high:
        raise _unsupported(name, value)
    return low, high


def _confidence(name: str, value: object) -> Confidence:
    low, high = _limits(name, value)
    if not math.isfinite(low):
        raise _unsupported(name, value)
    return Confidence(low=low, high=high)


def _descriptor_confidence(given: Mapping[str, object]) -> Confidence:
    if given["two_confs"] is not True:
        raise WeightsError("its network gives descriptors without a confidence of their own, which is not supported")
    # Its default is not documented, and a wrong one would go unnoticed.
    if given["desc_conf_mode"] is None:
        raise WeightsError("the description of its network lacks desc_conf_mode")
    return _confidence("desc_conf_mode", given["desc_conf_mode"])


def _dpt_widths(given: Mapping[str, object]) -> DptWidths:
    names = {"feature_dim": "fusion", "last_dim": "last", "layer_dims": "levels"}
    if unknown := sorted(given.keys() - names.keys()):
        raise WeightsError(f"its DPT head has arguments that are not known: {', '.join(unknown)}")
    widths: dict[str, Any] = {}
    for name, value in given.items():
        widths[names[name]] = _sizes(name, value) if name == "layer_dims" else _size(name, value)
    if len(widths.get("levels", range(4))) != 4:
        raise _unsupported("layer_dims", given["layer_dims"])
    return DptWidths(**widths)
