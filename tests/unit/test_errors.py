from __future__ import annotations

import inspect
import re

import pytest

from mast3r_sfm import errors
from mast3r_sfm.errors import DivergedError, Mast3rSfmError, ReconstructionError, some_of

EVERY = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, Mast3rSfmError) and value is not Mast3rSfmError
]


@pytest.mark.parametrize("kind", EVERY)
def test_exit_code_separates_wrong_use_from_photos_that_carry_no_model(kind: type[Mast3rSfmError]) -> None:
    assert kind("why").exit_code == (1 if kind in (ReconstructionError, DivergedError) else 2)


def test_the_tree_in_the_docstring_is_complete() -> None:
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__ or "")
    assert drawn == [kind.__name__ for kind in EVERY]
    assert len(drawn) >= 7


@pytest.mark.parametrize("kind", EVERY)
def test_one_except_clause_catches_all(kind: type[Mast3rSfmError]) -> None:
    with pytest.raises(Mast3rSfmError, match=r"photo\.jpg is empty"):
        raise kind("photo.jpg is empty")


@pytest.mark.parametrize(
    ("count", "text"), [(0, ""), (1, "a"), (3, "a, b, c"), (4, "a, b, c and 1 more"), (6, "a, b, c and 3 more")]
)
def test_of_many_names_the_first_are_listed_and_the_others_counted(count: int, text: str) -> None:
    assert some_of("abcdef"[:count], most=3) == text
