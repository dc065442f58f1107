from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mast3r_sfm import config as module
from mast3r_sfm.config import PAIR_SOURCES, Config, EncodeConfig, PairsConfig, RunOptions, fingerprint, read_toml
from mast3r_sfm.errors import ConfigError

STAGES = [field.name for field in dataclasses.fields(Config) if field.name != "seed"]
# Some go with another setting only: a source of pairs, or a file.
DEPENDENT = {
    ("pairs", "file"),
    ("known", "intrinsics_mode"),
    ("known", "intrinsics_of_groups"),
    ("known", "poses_mode"),
    ("known", "only_posed"),
}
SETTINGS = [
    f"{stage}.{field.name}"
    for stage in STAGES
    for field in dataclasses.fields(get_type_hints(Config)[stage])
    if (stage, field.name) not in DEPENDENT
]


def is_valid(name: str, value: object) -> bool:
    stage, key = name.split(".")
    try:
        Config.from_mapping({stage: {key: value}})
    except ConfigError:
        return False
    return True


def values_of(name: str) -> st.SearchStrategy[Any]:
    """Valid values of one setting; the ranges are wide enough to have some in the range of any setting."""
    stage, key = name.split(".")
    kind = get_type_hints(get_type_hints(Config)[stage])[key]
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if kind is float:
        return (st.floats(0, 1) | st.floats(-100, 100) | st.floats(0, 1e12)).filter(lambda value: is_valid(name, value))
    if kind is int:
        return (st.integers(1, 100) | st.integers(0, 2**62)).filter(lambda value: is_valid(name, value))
    if kind is bool:
        return st.booleans()
    if name == "pairs.source":
        return st.lists(st.sampled_from([one for one in PAIR_SOURCES if one != "file"]), min_size=1).map(",".join)
    return st.text(st.characters(exclude_categories=["C"]), min_size=1)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    tables: dict[str, Any] = {"seed": draw(st.integers(0, 2**31 - 1))}
    for name in draw(st.sets(st.sampled_from(SETTINGS))):
        stage, key = name.split(".")
        tables.setdefault(stage, {})[key] = draw(values_of(name))
    if tables.get("known"):
        tables.get("map", {}).pop("mapper", None)
    return Config.from_mapping(tables)


@pytest.mark.parametrize("mapper", ["global", "incremental"])
@pytest.mark.parametrize("known", ["known.intrinsics", "known.poses"])
def test_mappers_of_colmap_hold_nothing_that_is_known(mapper: str, known: str) -> None:
    Config().with_overrides([f"{known}=gt.json", "map.mapper=align"])
    with pytest.raises(ConfigError, match=r"map\.mapper = .* must be align where cameras or poses are known"):
        Config().with_overrides([f"{known}=gt.json", f"map.mapper={mapper}"])


@given(config=configs())
def test_toml_round_trip(config: Config, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("config") / "settings.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert Config.from_toml(path) == config


@given(data=st.data(), name=st.sampled_from(SETTINGS))
def test_set_gives_what_toml_gives(data: st.DataObject, name: str) -> None:
    value = data.draw(values_of(name).filter(lambda value: value == value.strip() if isinstance(value, str) else True))
    stage, key = name.split(".")
    assert Config().with_overrides([f"{name}={value}"]) == Config.from_mapping({stage: {key: value}})


@given(data=st.data(), name=st.sampled_from(SETTINGS))
def test_every_setting_enters_the_fingerprint(data: st.DataObject, name: str) -> None:
    value = data.draw(values_of(name))
    stage, key = name.split(".")
    changed = Config.from_mapping({stage: {key: value}})
    assert (fingerprint(changed) == fingerprint(Config())) == (changed == Config())


def test_overrides_keep_everything_else() -> None:
    config = Config.from_mapping({"seed": 7, "match": {"min_inliers": 40}})
    changed = config.with_overrides(["pairs.neighbours=5", " match.min_similarity = 0.5"])
    assert changed.pairs == PairsConfig(neighbours=5)
    assert (changed.seed, changed.match.min_inliers, changed.match.min_similarity) == (7, 40, 0.5)


def test_the_last_override_wins() -> None:
    assert Config().with_overrides(["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pairs.neighbors=5", r"no setting pairs\.neighbors; did you mean pairs\.neighbours\?"),
        ("pears.neighbours=5", r"no setting pears; did you mean pairs\?"),
        ("zzz=1", r"no setting zzz; known: seed, prepare"),
        ("pairs.neighbours", r"write it as stage\.key=value"),
        ("pairs=5", r"pairs is a stage; set one of its keys"),
        ("seed.x=5", r"seed is a value, not a stage"),
        ("pairs.neighbours.x=5", r"neighbours is a value, not a stage"),
        ("pairs.neighbours=five", r"pairs\.neighbours = 'five': must be a number of type int"),
        ("pairs.neighbours=2.5", r"must be a number of type int"),
        ("pairs.neighbours=0", r"pairs\.neighbours = 0: must be at least 1"),
        ("encode.max_size_px=63", r"encode\.max_size_px = 63: must be 0 \(auto\) or at least 64"),
        ("encode.max_size_px=-1", r"must be 0 \(auto\) or at least 64"),
        ("prepare.cameras=many", r"must be one of auto, single, folder, image"),
        ("match.min_similarity=nan", r"match\.min_similarity = nan: must be finite"),
        ("match.max_epipolar_error_px=inf", r"match\.max_epipolar_error_px = inf: must be finite"),
        ("map.min_angle_deg=90", r"must be in \(0, 90\)"),
        ("seed=-1", r"seed = -1: must be in \[0, 2\^31\)"),
        ("seed=2147483648", r"must be in \[0, 2\^31\)"),
    ],
)
def test_wrong_overrides_say_what_and_what_to_do(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config().with_overrides([text])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": "1"}, r"seed = '1': must be of type int"),
        ({"seed": True}, r"must be of type int"),
        ({"pairs": 5}, r"pairs is a stage"),
        ({"pairs": {"neighbours": 5.0}}, r"must be of type int"),
        ({"match": {"min_similarity": "0.5"}}, r"must be of type float"),
        ({"encode": {"model": 3}}, r"must be of type str"),
        ({"prepare": {"cameras": 1}}, r"must be one of"),
        ({"match": {"min_similarity": False}}, r"must be of type float"),
    ],
)
def test_wrong_types_from_toml(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_mapping(values)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), (" FALSE ", False)])
def test_refinement_can_be_left_out(text: str, value: bool) -> None:
    assert Config().map.refine is True
    assert Config().with_overrides([f"map.refine={text}"]).map.refine is value
    assert Config.from_mapping({"map": {"refine": value}}).map.refine is value


@pytest.mark.parametrize("wrong", ["no", "0", "1", ""])
def test_whether_to_refine_is_true_or_false(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"map\.refine = .*must be of type bool"):
        Config().with_overrides([f"map.refine={wrong}"])
    with pytest.raises(ConfigError, match=r"map\.refine = 0: must be of type bool"):
        Config.from_mapping({"map": {"refine": 0}})


def test_an_integer_will_do_where_a_float_is_asked() -> None:
    value = Config.from_mapping({"match": {"max_epipolar_error_px": 3}}).match.max_epipolar_error_px
    assert value == 3.0
    assert isinstance(value, float)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text("seed = ", encoding="utf-8"),
        lambda path: path.write_bytes(b"seed = 1 # \xff"),
        lambda path: path.mkdir(),
        lambda _: None,
    ],
    ids=["syntax", "not UTF-8", "folder", "absent"],
)
def test_unreadable_toml_names_the_file(spoil: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    spoil(path)
    with pytest.raises(ConfigError, match=r"settings\.toml"):
        read_toml(path)


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_is_documented(stage: str) -> None:
    kind = get_type_hints(Config)[stage]
    source = Path(module.__file__).read_text(encoding="utf-8").split(f"class {kind.__name__}:")[1]
    for field in dataclasses.fields(kind):
        after = source.split(f"\n    {field.name}: ")[1].split("\n")[1]
        assert after.startswith('    """'), f"{stage}.{field.name} has no documentation"


def test_threads_must_not_be_negative() -> None:
    with pytest.raises(ConfigError, match="threads = -1"):
        RunOptions(threads=-1)


def test_settings_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().pairs.neighbours = 3  # type: ignore[misc]


def test_fingerprint_is_the_same_on_every_machine() -> None:
    # A changed value here means that every cache of every user is computed anew: intended, or a mistake?
    assert fingerprint("encode", 1, {"b": 2, "a": 0.5}) == fingerprint("encode", 1, {"a": 0.5, "b": 2})
    assert fingerprint("encode", 1) == "262666a3b010077608ba3f0fe8b1cead33390dc4e35f570a9a14e5ca10f16f30"
    assert fingerprint("encode", 1) != fingerprint("encode", 1.0)
    assert fingerprint("a", "b") != fingerprint("ab")


def test_fingerprint_refuses_what_has_no_fixed_text() -> None:
    with pytest.raises(TypeError, match="cannot fingerprint object"):
        fingerprint(object())
    with pytest.raises(ValueError, match="JSON"):
        fingerprint(float("nan"))


def test_few_photos_keep_more_keypoints() -> None:
    assert [EncodeConfig().keypoints_of(count) for count in (1, 2, 5, 8, 9, 10, 5000)] == [
        *(8192, 8192, 8192, 5120, 4551, 4096, 4096)
    ]
    assert EncodeConfig(keypoints=100).keypoints_of(2) == 100
