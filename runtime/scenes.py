"""A generated scene for demonstrations and tests: a night road as an infrared and a visible camera see it.

The visible camera sees street lamps, lit windows, headlights, lane markings and the text of signs, and nearly nothing
of the people and the animal outside the light. The infrared camera sees warmth: people, the animal, engines, tyres and
exhausts, a cold sky, and no text. No picture is stored; everything is drawn from geometry.

World coordinates are metres: x to the right, y up from the road, z ahead; the camera is at (0, EYE, 0) and looks
along z. While a frame is made it is one HxWx4 float32 array: linear light in blue, green and red, and warmth from 0 to
1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError

SIZE = (480, 640)  # H, W by default
FRAMES_PER_SECOND = 25
PERIOD = 1000  # frames after which the motion repeats

EYE = 2.4  # height of the camera
ROAD = (-5.4, 2.6)  # x of its edges
MIDDLE = -1.4  # x of the line between the lanes
PAVEMENT_END = 4.4  # x where the right pavement ends and the park begins
FACADE = -9.5  # x of the house fronts on the left
CROSSING = (11.2, 13.6)  # z of the zebra crossing
STOREY, WINDOW_CELL = 3.1, 2.4
FAR = 130.0  # z of the skyline

LAMP_X, LAMP_HEIGHT, LAMP_POWER = -4.3, 6.8, 24.0
LAMPS_Z = (20.0, 38.0, 56.0, 74.0, 92.0, 110.0)
LAMP_COLOUR = (0.40, 0.70, 1.0)
AMBIENT = (0.024, 0.018, 0.014)
EXPOSURE = 5.0


class _House(NamedTuple):
    begin: float  # z
    end: float
    height: float
    colour: tuple[float, float, float]  # of the wall, BGR
    shop: bool  # a lit one on the ground floor


HOUSES = (
    _House(2.0, 14.0, 9.4, (0.20, 0.24, 0.30), True),
    _House(14.0, 25.0, 13.0, (0.26, 0.28, 0.28), False),
    _House(25.0, 39.0, 8.5, (0.16, 0.20, 0.31), True),
    _House(39.0, 55.0, 15.5, (0.24, 0.24, 0.22), False),
    _House(55.0, 78.0, 11.0, (0.18, 0.22, 0.28), True),
    _House(78.0, 110.0, 17.0, (0.20, 0.20, 0.20), False),
)
# x and z of the trunk, height of the tree
TREES = ((7.4, 11.5, 5.6), (8.8, 17.0, 6.6), (6.4, 25.0, 6.0), (8.4, 33.0, 7.0), (6.6, 44.0, 6.2), (7.6, 58.0, 6.8))

_SUPERSAMPLE = 3
_MARGIN = 64  # pixels by which the planes of noise are larger than a frame

Point = Sequence[float]  # x, y, z in metres
Paint = tuple[float, float, float, float]  # blue, green, red light and warmth


def night_road(
    frame: int = 0, size: tuple[int, int] = SIZE, seed: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Render one frame of the scene; equal arguments give equal pictures.

    Args:
        frame: number of the frame, at FRAMES_PER_SECOND; the motion repeats after PERIOD frames, the noise doesn't.
        size: (H, W) in pixels, from 32x32 up.
        seed: of the windows, the trees, the stars and the noise.

    Returns:
        infrared HxW uint8 and visible HxWx3 uint8 (BGR), aligned.

    Raises:
        InputError: a size below 32x32, or a negative frame or seed.
    """
    height, width = size
    if min(height, width) < 32:
        raise InputError(f"the scene can't be drawn at {width}x{height}; give at least 32x32 pixels")
    if frame < 0 or seed < 0:
        raise InputError(f"frame {frame} and seed {seed} must be 0 or more")
    return _scene(height, width, seed).render(frame)


@dataclass(frozen=True)
class _Camera:
    height: int
    width: int

    @property
    def focal(self) -> float:
        return 1.06 * self.height

    @property
    def centre(self) -> tuple[float, float]:
        """Pixel of the vanishing point."""
        return 0.5 * self.width, 0.43 * self.height

    def project(self, points: Sequence[Point]) -> np.ndarray:
        """World points (n, 3) with z > 0 -> pixels (n, 2)."""
        x, y, z = np.asarray(points, np.float64).T
        return np.stack((self.centre[0] + x * self.focal / z, self.centre[1] + (EYE - y) * self.focal / z), 1)


class _Canvas:
    """A part of a frame, enlarged, to draw on in world coordinates."""

    def __init__(self, pixels: np.ndarray, camera: _Camera, origin: tuple[int, int]):
        self._pixels, self._camera, self._origin = pixels, camera, np.array(origin)

    def polygon(self, points: Sequence[Point], paint: Paint) -> None:
        cv2.fillPoly(self._pixels, [self._fixed(points)], paint, shift=4)

    def hull(self, points: Sequence[Point], paint: Paint) -> None:
        """The convex hull of the projected points: the outline of a convex body."""
        cv2.fillConvexPoly(self._pixels, cv2.convexHull(self._fixed(points)), paint, shift=4)

    def line(self, points: Sequence[Point], width: float, paint: Paint) -> None:
        """A line with round ends, `width` metres thick."""
        thickness = max(1, round(width * self._pixels_a_metre(points[0][2])))
        cv2.polylines(self._pixels, [self._fixed(points)], False, paint, thickness, shift=4)

    def disc(self, centre: Point, radius: float, paint: Paint) -> None:
        (point,) = self._fixed([centre])
        fixed_radius = max(8, round(16 * radius * self._pixels_a_metre(centre[2])))
        cv2.circle(self._pixels, point.tolist(), fixed_radius, paint, -1, shift=4)

    def text(self, text: str, left_foot: Point, height: float, paint: Paint) -> None:
        """Upright letters, `height` metres tall."""
        scale = height * self._pixels_a_metre(left_foot[2]) / 21  # capitals of this font are 21 pixels tall
        (point,) = self._fixed([left_foot]) >> 4
        letters = np.zeros(self._pixels.shape[:2], np.uint8)  # text can only be drawn on 8-bit pictures
        cv2.putText(letters, text, point.tolist(), cv2.FONT_HERSHEY_DUPLEX, scale, 255, max(1, round(2.2 * scale)))
        self._pixels[letters > 127] = paint

    def _pixels_a_metre(self, z: float) -> float:
        return _SUPERSAMPLE * self._camera.focal / z

    def _fixed(self, points: Sequence[Point]) -> np.ndarray:
        """Pixels of world points with 4 fractional bits."""
        pixels = (self._camera.project(points) - self._origin + 0.5) * _SUPERSAMPLE - 0.5
        return np.rint(np.clip(pixels, -8000, 8000) * 16).astype(np.int32)


class _Light:
    """The light (BGR) that reaches something, which makes paint of what it reflects."""

    def __init__(self, light: np.ndarray):
        self.light = light

    def paint(self, albedo: Sequence[float], warmth: float) -> Paint:
        blue, green, red = (np.asarray(albedo) * self.light).tolist()
        return blue, green, red, warmth


@dataclass(frozen=True)
class _Thing:
    """Something that stands in the scene at (x, 0, z)."""

    x: float
    z: float

    def at(self, dx: float, y: float, dz: float = 0.0) -> Point:
        return self.x + dx, y, self.z + dz

    def box(self) -> list[Point]:
        """World points that span it."""
        raise NotImplementedError

    def draw(self, canvas: _Canvas, light: _Light) -> None:
        raise NotImplementedError


def _draw(frame: np.ndarray, camera: _Camera, thing: _Thing) -> None:
    """Draw on the part of the frame that a thing spans, enlarged and then averaged back, which smooths the edges."""
    pixels = camera.project(thing.box())
    left, top = np.maximum(np.floor(pixels.min(0)).astype(int) - 2, 0)
    right, bottom = np.minimum(np.ceil(pixels.max(0)).astype(int) + 3, (camera.width, camera.height))
    if left >= right or top >= bottom:
        return
    part = frame[top:bottom, left:right]
    enlarged = cv2.resize(part, None, fx=_SUPERSAMPLE, fy=_SUPERSAMPLE, interpolation=cv2.INTER_NEAREST)
    thing.draw(_Canvas(enlarged, camera, (left, top)), _light_at(thing.x, thing.z))
    part[:] = cv2.resize(enlarged, (right - left, bottom - top), interpolation=cv2.INTER_AREA)


def _array(values: Sequence[float]) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def _lamp_light(x: np.ndarray, y: np.ndarray, z: np.ndarray, normal_x: float, normal_y: float) -> np.ndarray:
    """Light of all lamps at points of surfaces with the normal (normal_x, normal_y, 0), a number for each point."""
    total = np.zeros(np.broadcast(x, y, z).shape, np.float32)
    for lamp_z in LAMPS_Z:
        dx, dy, dz = LAMP_X - x, LAMP_HEIGHT - y, lamp_z - z
        square = dx * dx + dy * dy + dz * dz + 0.3
        # Lambert's law at the surface, and a lamp that shines downwards.
        total += LAMP_POWER * np.maximum(dx * normal_x + dy * normal_y, 0) * np.maximum(dy, 0) / (square * square)
    return total


def _light_at(x: float, z: float) -> _Light:
    """Light on something that stands at (x, 0, z)."""
    lamps = _lamp_light(np.float32(x), np.float32(1), np.float32(z), normal_x=-0.5, normal_y=0.6)
    return _Light(lamps * np.array(LAMP_COLOUR) + np.array(AMBIENT))


@dataclass(frozen=True)
class _Person(_Thing):
    """Someone walking: `heading` 1 or -1 is along +x or -x, 0 along z; `stride` counts pairs of steps."""

    heading: int
    stride: float
    coat: Sequence[float] = (0.035, 0.03, 0.03)

    def box(self) -> list[Point]:
        return [self.at(-0.7, 0), self.at(0.7, 1.8)]

    def draw(self, canvas: _Canvas, light: _Light) -> None:
        at, paint, swing = self.at, light.paint, np.sin(2 * np.pi * self.stride)
        coat, skin = paint(self.coat, 0.84), (0.16, 0.20, 0.28)
        forward, aside = 0.36 * swing * self.heading, 0.02 if self.heading else 0.10
        for side in (-1, 1):
            step = side * (forward + aside)
            lift = 0.06 if self.heading else 0.06 + 0.10 * max(0.0, side * swing)
            leg = [at(side * aside, 0.9), at(step / 2 + 0.07 * self.heading, 0.5), at(step, lift)]
            canvas.line(leg, 0.15, paint((0.03, 0.025, 0.02), 0.76))
            canvas.line([at(step, 0.05), at(step + 0.12 * self.heading, 0.05)], 0.09, paint((0.02, 0.02, 0.02), 0.58))
        canvas.line([at(0, 0.95), at(0, 1.32)], 0.26 if self.heading else 0.36, coat)
        for side in (-1, 1):
            shoulder = side * (0.03 if self.heading else 0.2)
            hand = shoulder - side * 0.8 * forward + (0.0 if self.heading else 0.04 * side)
            canvas.line([at(shoulder, 1.36), at((shoulder + hand) / 2, 1.1), at(hand, 0.86)], 0.1, coat)
            canvas.disc(at(hand, 0.83), 0.05, paint(skin, 0.95))
        canvas.line([at(0, 1.4), at(0, 1.55)], 0.12, paint(skin, 0.96))
        canvas.disc(at(0.02 * self.heading, 1.64), 0.125, paint((0.02, 0.02, 0.025), 0.88))  # hair
        canvas.disc(at(0.05 * self.heading, 1.60), 0.10, paint(skin, 1.0))


@dataclass(frozen=True)
class _Deer(_Thing):
    """A deer that looks to the left; `nod` goes from 0, head up, to 1, grazing."""

    nod: float

    def box(self) -> list[Point]:
        return [self.at(-1.3, 0), self.at(0.8, 2.0)]

    def draw(self, canvas: _Canvas, light: _Light) -> None:
        at, paint, fur = self.at, light.paint, (0.030, 0.042, 0.058)
        for top, foot in ((-0.36, -0.40), (-0.24, -0.20), (0.36, 0.44), (0.45, 0.30)):
            canvas.line([at(top, 0.75), at((top + foot) / 2 + 0.04, 0.4), at(foot, 0.03)], 0.085, paint(fur, 0.76))
        canvas.line([at(-0.34, 0.93), at(0.05, 0.89), at(0.36, 0.94)], 0.40, paint(fur, 0.88))
        canvas.disc(at(0.40, 0.92), 0.22, paint(fur, 0.88))
        canvas.disc(at(0.61, 0.98), 0.05, paint((0.15, 0.15, 0.15), 0.64))
        x, y = -0.70 - 0.10 * self.nod, 1.48 - 1.05 * self.nod  # where the head is
        canvas.line([at(-0.42, 0.98), at(-0.55, 1.20 - 0.45 * self.nod), at(x, y)], 0.17, paint(fur, 0.88))
        canvas.line([at(x, y), at(x - 0.24, y - 0.07 - 0.12 * self.nod)], 0.13, paint(fur, 0.97))
        canvas.line([at(x, y), at(x + 0.1, y + 0.18)], 0.06, paint(fur, 0.9))  # ear
        for reach in (0.0, 0.16):
            antler = [at(x, y), at(x + reach, y + 0.22), at(x + reach - 0.1, y + 0.42)]
            canvas.line(antler, 0.03, paint((0.05, 0.06, 0.07), 0.42))


@dataclass(frozen=True)
class _Car(_Thing):
    """A car, its nearest end at z; `oncoming` shows the front, else the rear. Parked, it is dark and cold."""

    oncoming: bool
    colour: Sequence[float]
    parked: bool = False

    LENGTH = 4.2
    LAMP_SIDES = (-0.66, 0.66)

    def box(self) -> list[Point]:
        return [self.at(dx, y, dz) for dx in (-1.1, 1.1) for y in (0, 1.6) for dz in (0, self.LENGTH)]

    def draw(self, canvas: _Canvas, light: _Light) -> None:
        self._draw_body(canvas, light)
        self._draw_end(canvas, light)

    def _warmth(self, driven: float) -> float:
        return 0.16 + 0.18 * driven if self.parked else driven

    def _bar(self, half_width: float, y: float, dz: float) -> list[Point]:
        """Left and right end of a level line across the car."""
        return [self.at(-half_width, y, dz), self.at(half_width, y, dz)]

    def _face(self, lower: list[Point], upper: list[Point]) -> list[Point]:
        """Quadrilateral between two level lines."""
        return [*lower, *reversed(upper)]

    def _draw_body(self, canvas: _Canvas, light: _Light) -> None:
        paint, warmth, bar, face = light.paint, self._warmth, self._bar, self._face
        canvas.polygon(face(bar(0.95, 0, 0.1), bar(0.95, 0, 4.2)), paint((0.01, 0.01, 0.01), warmth(0.44)))  # shadow
        for dx in (-0.84, 0.84):
            for dz in (3.4, 0.75):
                tyre = [self.at(dx + w, y, dz) for w in (-0.1, 0.1) for y in (0.0, 0.62)]
                canvas.hull(tyre, paint((0.02, 0.02, 0.02), warmth(0.74)))
        side = paint([0.7 * c for c in self.colour], warmth(0.42))
        canvas.hull([p for dz in (0.12, 4.2) for y in (0.28, 0.86) for p in bar(0.9, y, dz)], side)
        if self.oncoming:
            canvas.polygon(face(bar(0.86, 0.84, 0.1), bar(0.82, 0.95, 1.3)), paint(self.colour, warmth(0.86)))  # bonnet
        cabin = [*bar(0.8, 0.86, 1.1), *bar(0.6, 1.46, 1.9), *bar(0.6, 1.42, 3.3), *bar(0.78, 0.9, 3.9)]
        canvas.hull(cabin, paint((0.02, 0.02, 0.02), warmth(0.24)))
        canvas.hull([*bar(0.62, 1.43, 1.8), *bar(0.62, 1.40, 3.2)], paint(self.colour, warmth(0.32)))
        screen = face(bar(0.76, 0.92, 1.05), bar(0.58, 1.39, 1.75))
        canvas.polygon(screen, paint((0.04, 0.036, 0.03), warmth(0.29)))

    def _draw_end(self, canvas: _Canvas, light: _Light) -> None:
        paint, warmth, bar, face = light.paint, self._warmth, self._bar, self._face
        canvas.polygon(face(bar(0.92, 0.26, 0), bar(0.86, 0.86, 0)), paint(self.colour, warmth(0.50)))
        canvas.polygon(face(bar(0.90, 0.24, 0), bar(0.90, 0.42, 0)), paint((0.03, 0.03, 0.03), warmth(0.44)))
        if self.oncoming:
            grille = face(bar(0.42, 0.5, 0), bar(0.42, 0.72, 0))
            canvas.polygon(grille, paint((0.02, 0.02, 0.02), warmth(0.98)))
        elif not self.parked:
            canvas.disc(self.at(0.55, 0.30), 0.10, paint((0.02, 0.02, 0.02), 1.0))  # exhaust
        canvas.polygon(face(bar(0.26, 0.44, 0), bar(0.26, 0.55, 0)), paint((0.6, 0.6, 0.6), warmth(0.40)))  # plate
        lamp = (3.6, 3.8, 4.0) if self.oncoming else (0.08, 0.08, 2.2)
        for dx in self.LAMP_SIDES:
            glass = paint((0.2, 0.2, 0.25), warmth(0.4)) if self.parked else (*lamp, 0.58)
            canvas.line([self.at(dx - 0.09, 0.72), self.at(dx + 0.09, 0.72)], 0.14, glass)


@dataclass(frozen=True)
class _Lamp(_Thing):
    """A street lamp: pole, arm, and a head at (LAMP_X, LAMP_HEIGHT)."""

    def box(self) -> list[Point]:
        return [self.at(-0.4, 0), (LAMP_X + 0.6, LAMP_HEIGHT + 0.6, self.z)]

    def draw(self, canvas: _Canvas, light: _Light) -> None:
        at, metal, reach = self.at, light.paint((0.10, 0.10, 0.10), 0.26), LAMP_X - self.x
        canvas.line([at(0, 0), at(0, LAMP_HEIGHT - 0.5)], 0.14, metal)
        arm = [at(0, LAMP_HEIGHT - 0.5), at(0.3, LAMP_HEIGHT + 0.1), at(reach, LAMP_HEIGHT + 0.15)]
        canvas.line(arm, 0.1, metal)
        head = [at(reach - 0.4, LAMP_HEIGHT + 0.06), at(reach + 0.3, LAMP_HEIGHT + 0.06)]
        blue, green, red = LAMP_COLOUR
        canvas.line(head, 0.2, (3 * blue, 3 * green, 3 * red, 0.80))


@dataclass(frozen=True)
class _Tree(_Thing):
    height: float
    seed: int

    def box(self) -> list[Point]:
        return [self.at(-0.6 * self.height, 0), self.at(0.6 * self.height, 1.25 * self.height)]

    def draw(self, canvas: _Canvas, light: _Light) -> None:
        rng, size, bark = np.random.default_rng(self.seed), self.height, light.paint((0.04, 0.05, 0.06), 0.36)
        canvas.line([self.at(0, 0), self.at(0.1, 0.35 * size), self.at(0, 0.7 * size)], 0.05 * size, bark)
        twigs = np.stack((rng.uniform(-0.34, 0.34, 22), rng.uniform(0.46, 1.04, 22)), 1)
        twigs = twigs[np.hypot(twigs[:, 0] / 0.36, (twigs[:, 1] - 0.75) / 0.3) < 1.0]
        for x, y in twigs * size:
            canvas.line([self.at(0, 0.5 * size), self.at(0.8 * x, 0.8 * y + 0.1 * size)], 0.012 * size, bark)
        for x, y in twigs[np.argsort(twigs[:, 1])]:
            for dx, dy in rng.normal(0, 0.045, (90, 2)):
                # Leaves towards the lamps, to the left and above, are lit; the others are in the crown's shade.
                lit = np.clip(0.55 - 1.2 * x - 7 * dx + 6 * dy + 0.3 * rng.normal(), 0.08, 1.6)
                leaf = light.paint((0.035 * lit, 0.085 * lit, 0.055 * lit), 0.205 + 0.05 * float(lit))
                canvas.disc(self.at((x + dx) * size, (y + dy) * size), 0.011 * size * rng.uniform(0.6, 1.3), leaf)


@dataclass(frozen=True)
class _Sign(_Thing):
    """A plate with text on a post, its left edge at x. Text and plate are equally warm; `glow` is light of its own."""

    bottom: float
    width: float
    lines: tuple[str, ...]
    plate: Sequence[float]
    letters: Sequence[float] = (0.8, 0.8, 0.8)
    glow: float = 0.0
    warmth: float = 0.34

    @property
    def _top(self) -> float:
        return self.bottom + 0.42 * len(self.lines) + 0.16

    def box(self) -> list[Point]:
        return [self.at(-0.1, 0), self.at(self.width + 0.1, self._top + 0.1)]

    def draw(self, canvas: _Canvas, light: _Light) -> None:
        at, paint, middle = self.at, _Light(light.light + self.glow).paint, self.width / 2
        canvas.line([at(middle, 0), at(middle, self.bottom)], 0.08, light.paint((0.15, 0.15, 0.15), 0.27))
        corners = [at(0, self.bottom), at(self.width, self.bottom), at(self.width, self._top), at(0, self._top)]
        canvas.polygon(corners, paint(self.plate, self.warmth))
        for number, text in enumerate(self.lines):
            canvas.text(text, at(0.14, self._top - 0.42 * (number + 1)), 0.25, paint(self.letters, self.warmth))


class _Background:
    """What stands still: sky, street, houses, trees, lamps and signs, drawn once for a size and a seed.

    Attributes:
        frame: HxWx4, light and warmth.
        ground: HxWx3, the share of light that the ground at a pixel reflects; 0 where something else is seen.
    """

    def __init__(self, camera: _Camera, seed: int):
        self._rng = np.random.default_rng(seed)
        self._noise = self._rng.random((256, 256), np.float32)
        fine = _Camera(2 * camera.height, 2 * camera.width)
        self._cast_rays(fine)
        self.frame = cv2.resize(self._frame, (camera.width, camera.height), interpolation=cv2.INTER_AREA)
        self.ground = cv2.resize(self._ground, (camera.width, camera.height), interpolation=cv2.INTER_AREA)
        things: list[_Thing] = [_Lamp(-5.75, z) for z in LAMPS_Z]
        things += [_Tree(x, z, height, seed + number) for number, (x, z, height) in enumerate(TREES)]
        things += [
            _Sign(3.0, 19.0, 2.3, 2.9, ("CENTRE 2 km", "HARBOUR 5"), (0.45, 0.16, 0.04), glow=0.35),
            _Sign(-8.9, 23.0, 3.4, 1.5, ("HOTEL",), (0.05, 0.02, 0.10), (0.9, 0.35, 1.0), glow=0.9, warmth=0.46),
            _Car(-6.4, 27.0, False, (0.3, 0.3, 0.32), parked=True),
        ]
        for thing in sorted(things, key=lambda thing: -thing.z):
            _draw(self.frame, camera, thing)
        for z in LAMPS_Z:
            head = (LAMP_X, LAMP_HEIGHT, z)
            _add_glow(self.frame, camera, head, radius=1.9 + 0.03 * z, strength=0.55, colour=LAMP_COLOUR)

    def _cast_rays(self, camera: _Camera) -> None:
        """For each pixel find the nearest of sky, ground, house fronts and side walls, and shade it."""
        (cx, cy), focal = camera.centre, camera.focal
        dy, dx = np.mgrid[0.5 : camera.height, 0.5 : camera.width].astype(np.float32)
        dx, dy = (dx - np.float32(cx)) / np.float32(focal), (dy - np.float32(cy)) / np.float32(focal)
        self._frame = self._sky(dx, dy)
        self._ground = np.zeros((*dx.shape, 3), np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):
            ground_z = np.where(dy > 0, EYE / dy, np.inf)
            front_z = np.where(dx < 0, FACADE / dx, np.inf)
        self._shade_ground(dx, np.where((ground_z < FAR) & (ground_z < front_z), ground_z, 0))
        nearest = np.minimum(ground_z, np.float32(1e6))
        for number, house in enumerate(HOUSES):
            front_y = EYE - dy * front_z
            seen = (front_z > house.begin) & (front_z < house.end) & (front_y > 0) & (front_y < house.height)
            seen &= front_z < nearest
            if seen.any():
                self._shade_wall(seen, front_y[seen], front_z[seen], number)
            nearest[seen] = front_z[seen]
            # The side wall that faces the camera, seen above the roof of the house before.
            wall_x, wall_y = dx * house.begin, EYE - dy * house.begin
            side = (wall_x < FACADE) & (wall_y < house.height) & (wall_y > 0) & (house.begin < nearest)
            self._frame[side] = (*(0.04 * c for c in house.colour), 0.27)
            nearest[side] = house.begin

    def _sky(self, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
        """Night sky with clouds, stars and the glow of a town behind a skyline with lit windows."""
        up = np.clip(-dy / 0.45, 0, 1)
        clouds = sum(self._lookup(dx * f + 3, dy * 3 * f, 1 / f) / f for f in (3.0, 6.0, 12.0, 24.0)) / 0.625
        clouds = np.clip((clouds - 0.42) * 2.5, 0, 1) * np.clip(up * 2, 0.15, 1)
        sky = np.empty((*dx.shape, 4), np.float32)
        town = np.exp(-up * 4.0)
        colours = ((0.007, 0.020, 0.009), (0.004, 0.019, 0.008), (0.003, 0.024, 0.009))
        for channel, (night, glow, cloud) in enumerate(colours):
            sky[..., channel] = night + glow * town + cloud * clouds * (0.4 + town)
        sky[..., 3] = 0.03 + 0.17 * town + 0.09 * clouds
        stars = self._rng.random(dx.shape, np.float32)
        sky[..., :3] += np.where((stars > 0.9992) & (clouds < 0.2), 0.08 * up, 0)[..., None]
        lights = self._lookup(dx * 160, dy * 110, 1.0, smooth=False) > 0.86
        x = -1.3
        while x < 1.3:
            width, height = self._rng.uniform(0.03, 0.10), self._rng.uniform(0.02, 0.10) + 0.04 * (abs(x) < 0.3)
            tower = (dx >= x) & (dx < x + width) & (-dy < height) & (dy < 0.02)
            lit = tower & lights & (-dy < height - 0.006)
            sky[tower] = (0.008, 0.008, 0.009, 0.24)
            sky[lit] = (0.035, 0.065, 0.085, 0.25)
            x += width * self._rng.uniform(0.8, 1.6)
        return sky

    def _shade_ground(self, dx: np.ndarray, z: np.ndarray) -> None:
        """Road with its markings, pavements and the park's grass, where z > 0."""
        seen = z > 0
        z, x = z[seen], (dx * z)[seen]
        near = np.clip(25 / z, 0, 1)  # fine structure fades where pixels are larger than it
        grain = 1 + near * (0.7 * self._lookup(x, z, 0.05) + 0.5 * self._lookup(x, z, 0.4) - 0.6)
        patches = 0.75 + 0.5 * self._lookup(x, z * 0.3, 1.7)
        on_road = (x > ROAD[0]) & (x < ROAD[1])
        albedo = np.where(x < PAVEMENT_END, 0.14, 0.055) * grain * patches
        albedo = np.where(on_road, 0.075 * grain * patches, albedo)
        lanes = np.minimum(np.abs(x - 0.6), np.abs(x + 3.4))
        tracks = np.exp(-(((lanes - 0.75) / 0.22) ** 2))  # where tyres run
        warmth = np.where(on_road, 0.36 + 0.06 * tracks, np.where(x < PAVEMENT_END, 0.30, 0.19))
        warmth += 0.05 * (patches - 1) + 0.03 * (grain - 1)
        slabs = ~on_road & (x < PAVEMENT_END) & (((x % 0.9) < 0.03) | ((z % 0.9) < 0.03)) & (z < 22)
        albedo[slabs] *= 0.6
        kerb = (np.abs(x - ROAD[0]) < 0.09) | (np.abs(x - ROAD[1]) < 0.09)
        crossing = on_road & (z > CROSSING[0]) & (z < CROSSING[1]) & ((x - 0.15) % 1.0 < 0.5)
        dashes = (np.abs(x - MIDDLE) < 0.075) & (z % 6 < 3) & ((z < CROSSING[0] - 1) | (z > CROSSING[1] + 1))
        edges = (np.abs(x - ROAD[0] - 0.3) < 0.06) | (np.abs(x - ROAD[1] + 0.3) < 0.06)
        painted = crossing | dashes | (edges & ((z < CROSSING[0]) | (z > CROSSING[1])))
        albedo = np.where(painted, 0.5 * (0.7 + 0.5 * self._lookup(x, z, 0.12)), np.where(kerb, 0.26, albedo))
        warmth = np.where(painted, warmth - 0.05, np.where(kerb, 0.26, warmth))
        manhole = ((x - 0.2) ** 2 + (z - 8.6) ** 2) < 0.12
        albedo[manhole], warmth[manhole] = 0.03, 0.60
        grass = np.where((x > PAVEMENT_END)[:, None], (0.55, 1.25, 0.8), (1.0, 1.0, 1.0)).astype(np.float32)
        reflected = albedo.astype(np.float32)[:, None] * grass
        self._ground[seen] = reflected
        light = _lamp_light(x, np.float32(0), z, 0.0, 1.0)[:, None] * _array(LAMP_COLOUR) + _array(AMBIENT)
        self._frame[seen] = self._hazed(np.column_stack((reflected * light, warmth)), z)

    def _shade_wall(self, seen: np.ndarray, y: np.ndarray, z: np.ndarray, number: int) -> None:
        """Front of house `number` with windows, some of them lit, and a shop on the ground floor."""
        house = HOUSES[number]
        along = z - house.begin
        brick = 0.75 + 0.3 * self._lookup(along, y, 0.5) + 0.2 * self._lookup(along, y * 3, 0.12)
        ledge = (np.abs((y - 0.35) % STOREY) < 0.12) & (y > 3) | (y > house.height - 0.35)
        wall = _array(house.colour) * (brick * np.where(ledge, 1.5, 1.0))[:, None]
        light = _lamp_light(np.float32(FACADE), y, z, 1.0, 0.0)[:, None] * _array(LAMP_COLOUR) + _array(AMBIENT)
        values = np.column_stack((wall * light, 0.29 + 0.06 * (brick - 1) + 0.03 * ledge)).astype(np.float32)
        column, row = np.floor(along / WINDOW_CELL), np.floor((y - 0.4) / STOREY)
        u, v = along / WINDOW_CELL - column, (y - 0.4) / STOREY - row
        chance = self._lookup(column * 7 + 31 * number, row * 5 + 17 * number, 1.0, smooth=False)
        tint = self._lookup(column * 11 + 5 * number, row * 3 + number, 1.0, smooth=False)[:, None]
        upstairs = (row >= 1) & (y < house.height - 0.8)
        around = upstairs & (np.abs(u - 0.5) < 0.27) & (np.abs(v - 0.52) < 0.30)
        window = upstairs & (np.abs(u - 0.5) < 0.22) & (np.abs(v - 0.52) < 0.26)
        frame = window & ((np.abs(u - 0.5) < 0.015) | (np.abs(v - 0.62) < 0.012))
        glow = (0.4 + 0.6 * tint) * _array((0.07, 0.17, 0.27)) + (1 - tint) ** 3 * _array((0.16, 0.12, 0.08))
        glow *= (0.55 + 0.6 * v - 0.5 * (np.abs(u - 0.5) > 0.13) * (tint[:, 0] > 0.4))[:, None]
        lit = window & (chance > 0.60)
        values[around, 3] += 0.06
        values[window] = (0.004, 0.004, 0.004, 0.16)
        values[lit] = np.column_stack((glow, np.full(len(y), 0.24)))[lit]
        values[frame] = (0.012, 0.012, 0.012, 0.31)
        if house.shop:
            pane = (y > 0.5) & (y < 2.9) & (np.abs((along % 4.8) / 4.8 - 0.5) < 0.42)
            goods = self._lookup(along, y, 0.35)
            bright = (0.35 + 0.5 * goods * (y < 1.9) + 0.9 * np.exp(-(((y - 2.7) / 0.35) ** 2)))[:, None]
            values[pane] = np.column_stack((bright * _array((0.13, 0.19, 0.22)), 0.30 + 0.10 * goods))[pane]
        self._frame[seen] = self._hazed(values, z)

    def _hazed(self, values: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Mix what is far away with the haze above a town."""
        share = (1 - np.exp(-z / 160))[:, None].astype(np.float32)
        return values * (1 - share) + _array((0.018, 0.016, 0.019, 0.23)) * share

    def _lookup(self, x: np.ndarray, y: np.ndarray, cell: float, smooth: bool = True) -> np.ndarray:
        """Random values in [0, 1) that change over `cell`, as a function of the place alone."""
        u, v = (np.asarray(value, np.float32) / np.float32(cell) for value in (x, y))
        shape, columns = u.shape, u.shape[-1] if u.ndim == 2 else 1024  # remap takes at most 32767 columns
        padding = -u.size % columns
        u, v = (np.pad(value.ravel(), (0, padding)).reshape(-1, columns) for value in (u, v))
        method = cv2.INTER_LINEAR if smooth else cv2.INTER_NEAREST
        values = cv2.remap(self._noise, u, v, method, borderMode=cv2.BORDER_WRAP)
        return values.ravel()[: np.prod(shape)].reshape(shape)


def _add_glow(
    frame: np.ndarray, camera: _Camera, point: Point, *, radius: float, strength: float, colour: Sequence[float]
) -> None:
    """Light that a lens and the air scatter around a lamp: a round halo of `radius` metres, added."""
    ((u, v),) = camera.project([point])
    reach = min(max(radius * camera.focal / point[2], 2.0), 0.5 * camera.height)
    left, top, right, bottom = (round(value) for value in (u - reach, v - reach, u + reach, v + reach))
    halo = cv2.resize(_halo(), (right - left + 1, bottom - top + 1), interpolation=cv2.INTER_LINEAR)
    rows = slice(max(top, 0), max(min(bottom + 1, camera.height), 0))
    columns = slice(max(left, 0), max(min(right + 1, camera.width), 0))
    part = halo[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    frame[rows, columns, :3] += part[..., None] * (strength * _array(colour))


@lru_cache(maxsize=1)
def _halo() -> np.ndarray:
    """129x129, 1 in the middle and 0 at the rim."""
    y, x = np.mgrid[-1:1:129j, -1:1:129j]
    radius = np.hypot(x, y)
    halo = np.exp(-((radius / 0.10) ** 2)) + 0.25 * np.exp(-radius / 0.22)
    return (halo * np.clip(1.2 - 1.2 * radius, 0, 1)).astype(np.float32)


class _Scene:
    """The background, and what moves in front of it."""

    def __init__(self, camera: _Camera, seed: int):
        self._camera, self._seed = camera, seed
        self._background = _Background(camera, seed)
        rng = np.random.default_rng(seed)
        # Noise of a frame is a random part of larger planes, which costs less than new numbers.
        plane = (camera.height + _MARGIN, camera.width + _MARGIN)
        self._visible_noise = 2.4 * rng.standard_normal((*plane, 3), np.float32)
        self._infrared_noise = 1.6 * rng.standard_normal(plane, np.float32)
        self._columns = 0.7 * rng.standard_normal(camera.width, np.float32)  # a thermal camera's uneven columns

    def render(self, number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        frame = self._background.frame.copy()
        second = number % PERIOD / FRAMES_PER_SECOND
        cars, walkers = _traffic(second), _walkers(second)
        for car in cars:
            self._light_road(frame, car)
        for thing in sorted([*cars, *walkers], key=lambda thing: -thing.z):
            _draw(frame, self._camera, thing)
            if isinstance(thing, _Car):
                self._add_car_glow(frame, thing)
        return self._expose(frame, np.random.default_rng((self._seed, number)))

    def _light_road(self, frame: np.ndarray, car: _Car) -> None:
        """Headlights on the ground before a car: towards the camera, or away from it."""
        (cx, cy), focal, way = self._camera.centre, self._camera.focal, -1 if car.oncoming else 1
        front = car.z if car.oncoming else car.z + car.LENGTH
        near, far = (max(front - 26, 2.0), front) if car.oncoming else (front, front + 40)
        top = int(np.clip(cy + EYE * focal / far, 0, self._camera.height))
        bottom = int(np.clip(cy + EYE * focal / near + 1, 0, self._camera.height))
        if top >= bottom:
            return
        z = (EYE * focal / (np.arange(top, bottom, dtype=np.float32) + 0.5 - cy))[:, None]
        ahead = np.clip((z - front) * way, 0, None)
        x = (np.arange(self._camera.width, dtype=np.float32)[None] + 0.5 - cx) * z / focal
        beam = np.exp(-(((x - car.x) / (1.1 + 0.13 * ahead)) ** 2)) * np.minimum(ahead, 2) / (1 + (ahead / 8) ** 2)
        light = beam[..., None] * np.array((0.42, 0.45, 0.46), np.float32)
        frame[top:bottom, :, :3] += self._background.ground[top:bottom] * light

    def _add_car_glow(self, frame: np.ndarray, car: _Car) -> None:
        colour, radius, strength = ((0.9, 0.95, 1.0), 2.4, 0.9) if car.oncoming else ((0.03, 0.02, 0.5), 0.7, 0.5)
        for dx in car.LAMP_SIDES:
            point, reach = car.at(dx, 0.72), radius + 0.02 * car.z
            _add_glow(frame, self._camera, point, radius=reach, strength=strength, colour=colour)

    def _expose(self, frame: np.ndarray, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Both cameras' pictures of light and warmth, with their blur and noise."""
        height, width = frame.shape[:2]
        top, left = rng.integers(0, _MARGIN, 2)
        part = np.s_[top : top + height, left : left + width]
        visible = cv2.sqrt(np.maximum(1 - cv2.exp(frame[..., :3] * np.float32(-EXPOSURE)), 0))
        infrared = cv2.GaussianBlur(frame[..., 3], (0, 0), 0.0016 * height + 0.2)
        infrared_noise = self._infrared_noise[part] + self._columns
        infrared = cv2.addWeighted(infrared, 255, infrared_noise, 1, 0, dtype=cv2.CV_8U)
        visible = cv2.addWeighted(visible, 255, self._visible_noise[part], 1, 0, dtype=cv2.CV_8U)
        return infrared.astype(np.uint8, copy=False), visible.astype(np.uint8, copy=False)


@lru_cache(maxsize=2)
def _scene(height: int, width: int, seed: int) -> _Scene:
    return _Scene(_Camera(height, width), seed)


def _traffic(second: float) -> list[_Car]:
    """Cars on the road. Each passes the crossing at its own second of 20, when nobody is on its lane."""
    crossing = sum(CROSSING) / 2
    cars = []
    for passing, colour in ((0.8, (0.30, 0.28, 0.28)), (5.2, (0.10, 0.08, 0.35)), (11.0, (0.35, 0.20, 0.10))):
        until = (passing - second + 1.2) % 20 - 1.2
        cars.append(_Car(-3.4, crossing + 9 * until, True, colour))
    for passing, colour in ((-0.9, (0.30, 0.30, 0.34)), (7.0, (0.12, 0.16, 0.12))):
        since = (second - passing + 1.4) % 20 - 1.4
        cars.append(_Car(0.6, crossing + 7.5 * since, False, colour))
    return [car for car in cars if 2.6 < car.z < 110]


def _walkers(second: float) -> list[_Thing]:
    """Someone on each pavement, someone who crosses the road every 20 s, and a deer at the edge of the park."""
    crossing = (second + 8) % 20 - 8
    walkers: list[_Thing] = [
        _Person(3.5, 58 - (second * 1.35 + 40.5) % 54, 0, second * 0.9, (0.05, 0.04, 0.03)),
        _Person(-7.75, 9 + (second * 1.2 + 7.5) % 48, 0, second * 0.9 + 0.3),
        _Deer(5.0, 9.5, 0.5 - 0.5 * float(np.cos(2 * np.pi * second / 10))),
    ]
    if -6.5 < crossing < 7.3:
        walkers.append(_Person(1.3 * crossing - 1.0, sum(CROSSING) / 2, 1, second * 0.9))
    return walkers
