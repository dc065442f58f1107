"""The scenes: a furnished room, a façade with relief, objects on a pedestal, and a bare plane."""

from __future__ import annotations

import numpy as np

from mast3r_sfm.synthetic.cameras import Kind
from mast3r_sfm.synthetic.scene import Box, Scene, Sphere, Vector
from mast3r_sfm.synthetic.texture import Material, Pattern

_PAINTS: tuple[Vector, ...] = (
    (0.42, 0.16, 0.10),
    (0.12, 0.26, 0.42),
    (0.50, 0.38, 0.14),
    (0.14, 0.33, 0.22),
    (0.45, 0.42, 0.36),
    (0.33, 0.18, 0.34),
    (0.20, 0.20, 0.22),
)


def make_scene(kind: Kind, seed: int = 0) -> Scene:
    """Build a scene; textures and small dimensions follow the seed.

    `rotation` gives the scene of `room`: only its camera path differs.
    """
    makers = {"room": _room, "rotation": _room, "facade": _facade, "object": _object, "plane": _plane}
    return makers[kind](_Workshop(seed))


class _Workshop:
    """Hands out random numbers, and materials that differ from each other, of one scene."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng([seed, 0])
        self._next = int(self._rng.integers(1 << 30))

    def number(self, low: float, high: float) -> float:
        return float(self._rng.uniform(low, high))

    def material(
        self, colour: Vector, pattern: Pattern = "plain", contrast: float = 0.9, marks: float = 0.3
    ) -> Material:
        self._next += 1000
        return Material(seed=self._next, colour=colour, pattern=pattern, contrast=contrast, marks=marks)

    def paint(self, pattern: Pattern = "plain", marks: float = 0.4) -> Material:
        return self.material(_PAINTS[int(self._rng.integers(len(_PAINTS)))], pattern, marks=marks)

    def box(self, centre: Vector, half_size: Vector, material: Material | None = None, yaw: float = 0.0) -> Box:
        return Box(centre=centre, half_size=half_size, material=material or self.paint(), yaw=yaw)


def _room(shop: _Workshop) -> Scene:
    walls = shop.material((0.46, 0.43, 0.37), contrast=0.8, marks=0.28)
    room = Box(centre=(0.0, 0.0, 0.0), half_size=(3.0, 1.4, 2.6), material=walls, hollow=True)
    wood = (0.30, 0.18, 0.09)
    bodies = [
        shop.box((0.0, 1.385, 0.0), (2.99, 0.014, 2.59), shop.material((0.33, 0.27, 0.2), "planks", marks=0.2)),
        shop.box((-2.3, 0.45, 2.3), (0.55, 0.92, 0.24), shop.material(wood, "planks")),
        shop.box((2.5, 0.75, 1.5), (0.3, 0.62, 0.7)),
        shop.box((-2.6, 0.85, 0.3), (0.3, 0.5, 0.8)),
        shop.box((0.3, 0.62, 1.35), (0.75, 0.04, 0.42), shop.material(wood, "planks"), yaw=0.3),
    ]
    for x, z in ((-0.6, -0.3), (0.6, -0.3), (-0.6, 0.3), (0.6, 0.3)):
        sine, cosine = np.sin(0.3), np.cos(0.3)
        bodies.append(shop.box((0.3 + cosine * x - sine * z, 1.01, 1.35 + sine * x + cosine * z), (0.04, 0.36, 0.04)))
    for x in (-0.15, 0.28, 0.72):
        size = (shop.number(0.07, 0.14), shop.number(0.09, 0.22), shop.number(0.07, 0.12))
        bodies.append(shop.box((x, 0.575 - size[1], 1.3 + 0.25 * x), size, yaw=shop.number(-1.0, 1.0)))
    for x in (-1.1, 1.55):
        bodies.append(shop.box((x, 1.1, 0.55), (0.22, 0.28, 0.22), yaw=shop.number(-0.8, 0.8)))
    for x, y in ((-1.1, -0.35), (0.1, -0.55), (1.2, -0.3)):
        half = (shop.number(0.28, 0.45), shop.number(0.25, 0.4), 0.03)
        bodies.append(shop.box((x, y, 2.57), half, shop.paint(marks=0.7)))
    for z in (-0.6, 0.9):
        bodies.append(shop.box((2.97, -0.5, z), (0.03, 0.35, 0.4), shop.paint(marks=0.7)))
        bodies.append(shop.box((-2.97, -0.4, z), (0.03, 0.3, 0.45), shop.paint(marks=0.7)))
    ball = Sphere(centre=(-1.45, 1.1, 1.5), radius=0.27, material=shop.paint(marks=0.5))
    return Scene(enclosure=room, bodies=(*bodies, ball), light=(0.4, -1.25, -0.8), ambient=0.55)


def _street(shop: _Workshop) -> Box:
    """The far surroundings of outdoor scenes."""
    sky = shop.material((0.42, 0.55, 0.72), contrast=0.25, marks=0.0)
    return Box(centre=(0.0, -8.0, 0.0), half_size=(24.0, 12.0, 20.0), material=sky, hollow=True)


def _facade(shop: _Workshop) -> Scene:
    wall = shop.material((0.40, 0.22, 0.15), "brick", contrast=0.7, marks=0.16)
    stone = (0.52, 0.48, 0.40)
    bodies: list[Box | Sphere] = [
        shop.box((0.0, -1.2, 0.5), (6.0, 3.0, 0.5), wall),
        shop.box((0.0, 2.3, 0.0), (20.0, 0.5, 15.0), shop.material((0.36, 0.35, 0.33), "tiles", marks=0.25)),
        shop.box((0.0, -1.12, 0.0), (6.02, 0.09, 0.16), shop.material(stone)),
        shop.box((0.0, 1.55, 0.0), (6.04, 0.26, 0.1), shop.material(stone)),
    ]
    for x in (-3.9, -1.35, 1.35, 3.9):
        bodies.append(shop.box((x, 0.1, 0.0), (0.17, 1.2, 0.22), shop.material(stone)))
        bodies.append(shop.box((x, -1.3, 0.0), (0.24, 0.14, 0.3), shop.material(stone)))
    for x in (-2.6, 2.6):
        bodies += _window(shop, x, 0.15, 0.55, 0.75)
    for x in (-2.6, 0.0, 2.6):
        bodies += _window(shop, x, -2.35, 0.5, 0.65)
    bodies.append(shop.box((0.0, 0.55, 0.0), (0.62, 1.24, 0.05), shop.material((0.16, 0.22, 0.17), "planks")))
    bodies.append(shop.box((0.0, -0.78, -0.1), (0.85, 0.09, 0.35), shop.material(stone)))
    bodies.append(shop.box((0.0, 1.72, -0.5), (0.95, 0.08, 0.5), shop.material(stone)))
    bodies.append(shop.box((-1.9, 1.45, -1.0), (0.4, 0.35, 0.22), yaw=0.35))
    bodies.append(shop.box((2.2, 1.5, -0.85), (0.3, 0.3, 0.3), yaw=-0.5))
    bodies.append(Sphere(centre=(2.15, 0.95, -0.85), radius=0.26, material=shop.paint()))
    return Scene(enclosure=_street(shop), bodies=tuple(bodies), light=(-6.0, -9.0, -11.0), ambient=0.45)


def _window(shop: _Workshop, x: float, y: float, width: float, height: float) -> list[Box]:
    """Pane, four frame bars, a sill and a cross bar, standing out from the wall at z = 0."""
    frame = shop.material((0.55, 0.53, 0.48), contrast=0.6)
    glass = shop.material((0.08, 0.11, 0.15), contrast=1.2, marks=0.45)
    return [
        shop.box((x, y, 0.0), (width, height, 0.02), glass),
        shop.box((x - width, y, 0.0), (0.07, height + 0.07, 0.1), frame),
        shop.box((x + width, y, 0.0), (0.07, height + 0.07, 0.1), frame),
        shop.box((x, y - height, 0.0), (width, 0.069, 0.095), frame),
        shop.box((x, y + height + 0.05, 0.0), (width + 0.16, 0.06, 0.2), frame),
        shop.box((x, y, 0.0), (0.03, height, 0.06), frame),
        shop.box((x, y - 0.2, 0.0), (width, 0.028, 0.055), frame),
    ]


def _object(shop: _Workshop) -> Scene:
    floor = shop.material((0.38, 0.36, 0.33), "tiles", contrast=0.8, marks=0.35)
    bodies: list[Box | Sphere] = [
        shop.box((0.0, 1.6, 0.0), (12.0, 0.5, 12.0), floor),
        shop.box((0.0, 0.9, 0.0), (0.72, 0.2, 0.72), shop.material((0.5, 0.46, 0.4)), yaw=0.2),
        shop.box((0.0, 0.55, 0.0), (0.5, 0.15, 0.5), shop.material((0.44, 0.2, 0.13), "brick"), yaw=0.55),
        shop.box((-0.16, 0.12, 0.08), (0.2, 0.28, 0.16), yaw=shop.number(0.0, 1.5)),
        shop.box((0.24, 0.24, -0.16), (0.13, 0.16, 0.13), yaw=shop.number(0.0, 1.5)),
        Sphere(centre=(0.24, -0.08, -0.16), radius=0.16, material=shop.paint()),
        Sphere(centre=(-0.16, -0.32, 0.08), radius=0.16, material=shop.paint()),
        Sphere(centre=(0.2, 0.28, 0.28), radius=0.12, material=shop.paint()),
    ]
    for number in range(7):
        angle = 0.4 + number * 2 * np.pi / 7
        reach, half = shop.number(1.15, 1.6), shop.number(0.1, 0.22)
        place = (float(reach * np.sin(angle)), 1.1 - half, float(reach * np.cos(angle)))
        if number % 3 == 2:
            bodies.append(Sphere(centre=place, radius=half, material=shop.paint()))
        else:
            bodies.append(shop.box(place, (half, half, half * 0.8), yaw=shop.number(0.0, 1.5)))
    return Scene(enclosure=_street(shop), bodies=tuple(bodies), light=(-4.0, -7.0, -5.0), ambient=0.5)


def _plane(shop: _Workshop) -> Scene:
    wall = shop.material((0.45, 0.40, 0.33), contrast=1.0, marks=0.45)
    bodies = (shop.box((0.0, 0.0, 0.5), (15.0, 14.0, 0.5), wall),)
    surroundings = Box(centre=(0.0, 0.0, 0.0), half_size=(16.0, 15.0, 16.0), material=wall, hollow=True)
    return Scene(enclosure=surroundings, bodies=bodies, light=(-6.0, -9.0, -11.0), ambient=0.5)
