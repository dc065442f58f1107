"""From what checkpoints state to the architecture of their network."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mast3r_sfm.errors import WeightsError
from mast3r_sfm.models.mast3r.architecture import Architecture, Confidence, DptWidths
from mast3r_sfm.models.mast3r.arguments import architecture_from, parse_model_text
from mast3r_sfm.models.mast3r.network import check_tensors
from tests.checkpoints import DPT, DUST3R, MAST3R, model_text

OFFICIAL = ("mast3r_vitlarge_512_catmlpdpt_metric", "dust3r_vitlarge_512_dpt", "dust3r_vitlarge_512_linear")
# As the public training command of MASt3R documents it.
MAST3R_TEXT = (
    "AsymmetricMASt3R(pos_embed='RoPE100', patch_embed_cls='ManyAR_PatchEmbed', img_size=(512, 512), "
    "head_type='catmlp+dpt', output_mode='pts3d+desc24', depth_mode=('exp', -inf, inf), conf_mode=('exp', 1, inf), "
    "enc_embed_dim=1024, enc_depth=24, enc_num_heads=16, dec_embed_dim=768, dec_depth=12, dec_num_heads=12, "
    "two_confs=True, desc_conf_mode=('exp', 0, inf))"
)


def parse(text: str) -> Architecture:
    class_name, arguments = parse_model_text(text)
    return architecture_from(arguments, class_name=class_name)


def test_the_official_text_gives_the_official_architecture() -> None:
    assert parse(MAST3R_TEXT) == Architecture()


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_texts_fit_the_official_lists_of_tensors(name: str, golden_dir: Path) -> None:
    spec = json.loads((golden_dir / "official_checkpoint_spec.json").read_text(encoding="utf-8"))[name]
    keys = {key: torch.empty(tensor["shape"], device="meta") for key, tensor in spec["keys"].items()}
    architecture = parse(spec["model_args_string_documented"])
    check_tensors(architecture, keys)
    with pytest.raises(WeightsError, match="missing: mask_token"):
        check_tensors(architecture, {key: tensor for key, tensor in keys.items() if key != "mask_token"})


def test_the_224_model(golden_dir: Path) -> None:
    spec = json.loads((golden_dir / "official_checkpoint_spec.json").read_text(encoding="utf-8"))
    architecture = parse(spec["dust3r_vitlarge_224_linear"]["model_args_string_documented"])
    assert (architecture.image_size_px, architecture.head, architecture.descriptor_channels) == (224, "linear", 0)


def test_the_hub_configuration_of_the_spec(golden_dir: Path) -> None:
    layout = json.loads((golden_dir / "official_checkpoint_spec.json").read_text(encoding="utf-8"))["hf_hub_layout"]
    architecture = architecture_from(json.loads(layout["config_json_raw_text"]))
    assert (architecture.encoder_width, architecture.decoder_depth, architecture.descriptor_channels) == (32, 10, 24)
    assert architecture.confidence == Confidence(low=1.0, high=math.inf)
    assert architecture.descriptor_confidence == Confidence(low=0.0, high=math.inf)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_arguments_does_not_matter(seed: int) -> None:
    class_name, arguments = parse_model_text(MAST3R_TEXT)
    items = list(arguments.items())
    random.Random(seed).shuffle(items)
    text = model_text(dict(items), class_name).replace(", ", ",\n\t ").replace("=(", " = (")
    assert parse(f"\n  {text}  ") == Architecture()


def test_arguments_without_effect_are_accepted() -> None:
    text = MAST3R_TEXT.removesuffix(")") + (
        ", landscape_only=False, freeze='encoder', patch_size=16, mlp_ratio=4, norm_im2_in_dec=True, desc_mode='norm', "
        "mask_ratio=0.9)"
    )
    assert parse(text) == Architecture()
    assert parse(text.replace("ManyAR_PatchEmbed", "PatchEmbedDust3R")) == Architecture()


def test_every_size_reaches_its_field() -> None:
    changes: dict[str, Any] = {
        **MAST3R,
        "img_size": [384, 512],
        "pos_embed": "RoPE50.5",
        "mlp_ratio": 2.5,
        "enc_embed_dim": 24,
        "enc_depth": 5,
        "enc_num_heads": 3,
        "dec_embed_dim": 40,
        "dec_depth": 7,
        "dec_num_heads": 5,
        "output_mode": "pts3d+desc11",
        "conf_mode": ["exp", 2, "inf"],
        "desc_conf_mode": ["exp", 0.5, 3],
    }
    assert architecture_from(changes, dpt=DPT) == Architecture(
        image_size_px=512,
        encoder_width=24,
        encoder_depth=5,
        encoder_heads=3,
        decoder_width=40,
        decoder_depth=7,
        decoder_heads=5,
        mlp_ratio=2.5,
        rope_base=50.5,
        head="catmlp+dpt",
        descriptor_channels=11,
        confidence=Confidence(low=2.0),
        descriptor_confidence=Confidence(low=0.5, high=3.0),
        dpt=DptWidths(levels=(4, 4, 8, 8), fusion=8, last=4),
    )
    assert architecture_from({**DUST3R, "img_size": 224, "patch_size": 14}).patch_px == 14


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "cannot be parsed"),
        ("AsymmetricMASt3R(", "cannot be parsed"),
        ("AsymmetricMASt3R(a=1) + 1", "not of the form"),
        ("AsymmetricMASt3R", "not of the form"),
        ("models.AsymmetricMASt3R(a=1)", "not of the form"),
        ("[print(1)]", "not of the form"),
        ("AsymmetricMASt3R(512, a=1)", "no name: 512"),
        ("AsymmetricMASt3R(*sizes)", r"no name: \*sizes"),
        ("AsymmetricMASt3R(**{'a': 1})", r"no name: \*\*\{'a': 1\}"),
        ("AsymmetricMASt3R(a=1, a=2)", "twice: a"),
        ("AsymmetricMASt3R(a=__import__('os').system('true'))", r"no plain value: a=__import__\('os'\)"),
        ("AsymmetricMASt3R(a=open)", "no plain value: a=open"),
        ("AsymmetricMASt3R(a=math.inf)", "no plain value: a=math.inf"),
        ("AsymmetricMASt3R(a=(1, lambda: 0))", "no plain value"),
        ("AsymmetricMASt3R(a=[x for x in (1, 2)])", "no plain value"),
        ("AsymmetricMASt3R(a=2 ** 99999)", "no plain value"),
        ("AsymmetricMASt3R(a=f'{1}')", "no plain value"),
        ("AsymmetricMASt3R(a=b'x')", "no plain value"),
        ("AsymmetricMASt3R(a={'b': 1})", "no plain value"),
        ("AsymmetricMASt3R(a=-True)", "no plain value"),
        ("AsymmetricMASt3R(a=--1)", "no plain value"),
        ("AsymmetricMASt3R(a=" + "(" * 1000 + ")" * 1000 + ")", "cannot be parsed"),
        ("AsymmetricMASt3R(a=" + "1" * 5000 + ")", "cannot be parsed"),
        ("AsymmetricMASt3R(a='" + "x" * 20_000 + "')", "20022 characters"),
    ],
)
def test_a_text_of_another_form_is_refused_and_says_what_is_wrong(text: str, part: str) -> None:
    with pytest.raises(WeightsError, match=part):
        parse_model_text(text)


@given(st.one_of(st.text(max_size=60), st.text("AsymmetricMASt3R(=,)'-inf1. []*\n", max_size=60).map("A({})".format)))
def test_no_text_ends_in_anything_but_arguments_or_an_error_of_ours(text: str) -> None:
    try:
        class_name, arguments = parse_model_text(text)
    except WeightsError:
        return
    assert class_name.isidentifier()
    assert all(isinstance(value, str | int | float | tuple | None) for value in arguments.values())


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"pos_embed": "cosine"}, "pos_embed='cosine'"),
        ({"pos_embed": "RoPE"}, "pos_embed='RoPE'"),
        ({"pos_embed": "RoPE0"}, "pos_embed='RoPE0'"),
        ({"pos_embed": None}, "pos_embed=None"),
        ({"head_type": "gs"}, "head_type='gs'"),
        ({"head_type": ["dpt"]}, "head_type"),
        ({"head_type": "dpt"}, "output_mode='pts3d.desc6' with head_type='dpt'"),
        ({"output_mode": "pts3d"}, "output_mode='pts3d' with head_type='catmlp.dpt'"),
        ({"output_mode": "pts3d+desc0"}, "output_mode"),
        ({"output_mode": "pts3d+desc24+sem"}, "output_mode"),
        ({"depth_mode": ("linear", -math.inf, math.inf)}, "depth_mode"),
        ({"depth_mode": ("exp", 0, math.inf)}, "depth_mode"),
        ({"conf_mode": ("sigmoid", 0, 1)}, "conf_mode"),
        ({"conf_mode": ("exp", 1)}, "conf_mode"),
        ({"conf_mode": ("exp", 1, 1)}, "conf_mode"),
        ({"conf_mode": ("exp", math.nan, math.inf)}, "conf_mode"),
        ({"conf_mode": ("exp", -math.inf, math.inf)}, "conf_mode"),
        ({"conf_mode": ("exp", True, math.inf)}, "conf_mode"),
        ({"conf_mode": ("exp", 1, 10**400)}, "conf_mode"),
        ({"conf_mode": "exp"}, "conf_mode"),
        ({"two_confs": False}, "without a confidence of their own"),
        ({"desc_conf_mode": None}, "lacks desc_conf_mode"),
        ({"desc_mode": "raw"}, "desc_mode='raw'"),
        ({"norm_im2_in_dec": False}, "norm_im2_in_dec=False"),
        ({"patch_embed_cls": "ConvStem"}, "patch_embed_cls='ConvStem'"),
        ({"enc_depth": 0}, "enc_depth=0"),
        ({"enc_depth": 10**9}, "enc_depth=1000000000"),
        ({"enc_depth": 2.0}, "enc_depth=2.0"),
        ({"enc_depth": True}, "enc_depth=True"),
        ({"img_size": (512, 512, 3)}, "img_size"),
        ({"img_size": "512"}, "img_size"),
        ({"img_size": 8}, "no smaller than a patch"),
        ({"mlp_ratio": 0}, "mlp_ratio"),
        ({"mlp_ratio": math.nan}, "mlp_ratio"),
        ({"enc_num_heads": 3}, "do not split"),
        ({"dec_depth": 3}, "at least four blocks"),
        ({"patch_size": 14}, "patches of 16 px"),
        ({"encoder": "dune", "qk_norm": True}, "not known.*: encoder, qk_norm"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(WeightsError, match=part):
        architecture_from({**MAST3R, **changes})


def test_what_is_missing_is_named() -> None:
    arguments = {name: value for name, value in MAST3R.items() if name not in ("enc_depth", "pos_embed")}
    with pytest.raises(WeightsError, match="lacks pos_embed, enc_depth"):
        architecture_from(arguments)


@pytest.mark.parametrize("name", ["CroCoNet", "AsymmetricMASt3RWithDUNE", ""])
def test_other_networks_are_refused_by_name(name: str) -> None:
    with pytest.raises(WeightsError, match="supported are AsymmetricMASt3R and AsymmetricCroCo3DStereo"):
        architecture_from(MAST3R, class_name=name)


def test_a_dust3r_has_no_head_for_descriptors() -> None:
    with pytest.raises(WeightsError, match=r"head_type='catmlp\+dpt'"):
        architecture_from(MAST3R, class_name="AsymmetricCroCo3DStereo")
    assert architecture_from(DUST3R, class_name="AsymmetricMASt3R").descriptor_channels == 0


@pytest.mark.parametrize(
    "dpt",
    [{"hooks": [0, 1, 2, 3]}, {"layer_dims": [4, 8, 16]}, {"layer_dims": 4}, {"last_dim": 0}, {"feature_dim": "8"}],
)
def test_wrong_widths_of_the_dpt_head_are_named(dpt: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match=next(iter(dpt))):
        architecture_from(MAST3R, dpt=dpt)
