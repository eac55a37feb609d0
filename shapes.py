"""The embedded data set: procedural toy scenes with label, box, mask and depth. Nothing is downloaded or stored.

    Shapes("train", size=64, length=2000)[0]                one card: pretraining, k-NN, linear probe, point-in-box
    Shapes("train", size=128, length=2000, cards=5)[0]      three to five cards: the dense probes

A scene is one upright card, cut and painted by its class, on a tiled floor in front of a backdrop 10 m away. A scene of
several cards is the same world through a view twice as wide: independent cards stand in it side by side and one behind
the other, the nearest in front, and at twice the side a card has the size in pixels that it has alone. As all cards are
2 to 3 m away they lie in the middle rows of the wide picture, from 30 to 74 %, and above and below there are none.
Identity: outline, pattern and hue, ten hues around the circle that overlap a little (class spacing 0.63 rad, sd 0.2).
Nuisance: distance, place, height, tilt, stretch, mirror image, light and dark paint swapped, chroma, light, floor, and
a mottle of random colours all over the surroundings. The mottle hides the card's hue from a mere average of colours,
and it carries no identity, because two crops of a scene see different parts of it.

What decides whether DINO learns here: k-NN top-1 on val, untrained -> trained, of this data set and of earlier ones
with cards of other sizes (4 blocks of width 64 or 96, 200 to 600 steps, one seed each):
    this data set                                             0.42 -> 0.82
    grey surroundings                                         0.85 -> 0.95: little is left to learn
    grey surroundings, the wall anything from black to white  0.48 -> 0.32: the wall is what two crops share
    cards in two opposite hues, grey on average               0.31 -> 0.28: the teacher becomes uniform

Camera: 1.2 m above the floor, focal length 1 image side, tilted by shifting the horizon. Floor depth on row y is
height * focal / (y - horizon), at most 10 m; a card has one depth, that of the floor where its lowest point stands.

    S image side in pixels; x to the right and y downwards in sides of the one-card view, which is 0..1 and, in the
    middle of the wide one, -0.5..1.5: a scene is the same at every S
    u, v are card coordinates: to the right and upwards in card radii, along the card's own tilted axes
"""

import functools

import numpy as np
import torch

CLASSES = ("ball", "crate", "tent", "star", "cross", "heart", "flower", "kite", "dome", "gear")
STREAMS = {"train": 0, "val": 1}            # first word of every scene's seed: the two splits never share a stream
CAMERA_HEIGHT, FOCAL, FAR = 1.2, 1.0, 10.0  # metres, image sides, metres
CELLS = 9                                   # the mottle is drawn on this coarse grid over a side of the one-card view
VIEW = 2                                    # sides of the one-card view that a view of several cards is wide
FINGERPRINT = "scenes 1"                    # of the data, in every result: to be raised when a scene's pixels change
TURN = 2 * np.pi
ANGLE = np.arange(720) * TURN / 720         # outlines are tables of radius over angle, 0 = right, pi/2 = up


# ------------------------------------------------------------------------------------------------- the ten classes
def convex(*sides):
    """Radius of the intersection of half-planes, each (degrees of its normal, distance from the centre)."""
    along = np.cos(ANGLE - np.deg2rad([[degrees] for degrees, _ in sides]))
    distance = np.array([[d] for _, d in sides])
    return np.where(along > 1e-6, distance / np.maximum(along, 1e-6), np.inf).min(0)


def rectangle(half_width, half_height):
    return convex((0, half_width), (180, half_width), (90, half_height), (270, half_height))


def star(points=5, inner=0.45):
    """Straight edges between tips at radius 1 and notches at radius `inner`, one tip on top."""
    half = np.pi / points
    t = (ANGLE - np.pi / 2) % (2 * half)
    t = np.minimum(t, 2 * half - t)                                 # angle from the nearest tip
    x, y = 1 - inner * np.cos(half), inner * np.sin(half)           # edge from (1, 0) to (1 - x, y)
    return y / (y * np.cos(t) + x * np.sin(t))


def heart():
    up = np.sin(ANGLE)
    return 0.45 * (2 - 2 * up + up * np.sqrt(np.abs(np.cos(ANGLE))) / (up + 1.4)) ** 0.8


OUTLINES = np.stack([                                               # in the order of CLASSES
    np.ones_like(ANGLE),
    rectangle(0.8, 0.8),
    convex((30, 0.5), (150, 0.5), (270, 0.5)),
    star(),
    np.maximum(rectangle(1.0, 0.38), rectangle(0.38, 1.0)),
    heart(),
    0.76 + 0.24 * np.cos(5 * (ANGLE - np.pi / 2)),
    1 / (np.abs(np.cos(ANGLE)) / 0.65 + np.abs(np.sin(ANGLE))),
    convex(*[(degrees, 1.0) for degrees in range(-10, 191, 5)], (270, 0.35)),
    0.86 + 0.14 * np.tanh(4 * np.cos(8 * ANGLE)),
]).astype(np.float32)

W = TURN * 0.9                                                      # 0.9 periods per card radius: survives blur
PATTERNS = (                                                        # > 0 is painted lighter, < 0 darker, or reversed
    lambda u, v, angle, radius: np.cos(W * v),                                          # ball: bands
    lambda u, v, angle, radius: 2 * np.sin(0.8 * W * u) * np.sin(0.8 * W * v),          # crate: checker
    lambda u, v, angle, radius: np.cos(W * u),                                          # tent: stripes
    lambda u, v, angle, radius: np.cos(W * radius),                                     # star: rings
    lambda u, v, angle, radius: np.cos(W * u) + np.cos(W * v) - 0.4,                    # cross: dots
    lambda u, v, angle, radius: np.cos(0.7 * W * (u + v)),                              # heart: diagonals
    lambda u, v, angle, radius: -np.sin(5 * angle),                                     # flower: half petals
    lambda u, v, angle, radius: 2 * np.sin(0.6 * W * (u + v)) * np.sin(0.6 * W * (u - v)),   # kite: diamonds
    lambda u, v, angle, radius: np.cos(W * (v + 0.15 * np.sin(W * u))),                 # dome: waves
    lambda u, v, angle, radius: np.cos(2 * angle + W * radius),                         # gear: spiral
)


def tint(hue):
    """Zero-mean RGB direction (3, 1, 1) of a hue in radians."""
    return np.cos(hue - np.arange(3) * TURN / 3).astype(np.float32)[:, None, None]


# ------------------------------------------------------------------------------------------------- one scene
def draw(split, index, cards=1):
    """Everything random about a scene: its cards, the farthest first, and what is around them. Independent of S and of
    the data set's length."""
    if cards == 1:
        rng = np.random.default_rng((STREAMS[split], index))
        return dict(cards=[draw_card(rng)], view=1, **draw_surroundings(rng, CELLS))
    rng = np.random.default_rng((STREAMS[split], index, cards))
    drawn = [draw_card(rng) for _ in range(rng.integers(min(3, cards), cards + 1))]
    drawn.sort(key=lambda card: -card["distance"])
    return dict(cards=drawn, view=VIEW, **draw_surroundings(rng, VIEW * (CELLS - 1) + 1))


def draw_card(rng):
    return dict(
        label=int(rng.integers(len(CLASSES))),
        # metres, shares, radians
        distance=rng.uniform(2.1, 3.1), height=rng.uniform(1.1, 1.5), across=rng.uniform(-0.5, 0.5),
        tilt=rng.uniform(-0.35, 0.35), stretch=rng.uniform(0.87, 1.15), mirror=rng.choice((-1, 1)),
        # paint
        sign=rng.choice((-1, 1)), hue=rng.normal(0, 0.2), tone=rng.uniform(0.45, 0.55),
        chroma=rng.uniform(0.15, 0.25), contrast=rng.uniform(0.1, 0.16),
    )


def draw_surroundings(rng, cells):
    return dict(
        horizon=rng.uniform(0.25, 0.4), wall=rng.uniform(0.5, 0.6), floor=rng.uniform(-0.03, 0.03),
        tile_turn=rng.uniform(0, np.pi / 2), tile_shift=rng.random(2), light=rng.normal(0, 0.1, 2),
        mottle=rng.normal(0, 0.1, (3, cells, cells)).astype(np.float32),
    )


@functools.lru_cache(maxsize=8)
def grid(size, view):
    """Pixel centres x (1, S) and y (S, 1), and the (S, cells) matrix of linear interpolation between the mottle's."""
    centre = ((np.arange(size) + 0.5) / size).astype(np.float32)    # 0..1, whatever the view
    cells = view * (CELLS - 1)
    stretch = np.maximum(0, 1 - np.abs(centre[:, None] * cells - np.arange(cells + 1)))
    sides = centre * view - (view - 1) / 2
    return sides[None], sides[:, None], stretch.astype(np.float32)


def surroundings(scene, x, y, stretch):
    """Colours (3, S, S) of floor and backdrop, and their depth (S, 1) in metres."""
    depth = np.minimum(CAMERA_HEIGHT * FOCAL / np.maximum(y - scene["horizon"], 1e-6), FAR).astype(np.float32)
    c, s = np.cos(scene["tile_turn"]), np.sin(scene["tile_turn"])
    across, away = (x - 0.5) * depth / FOCAL + scene["tile_shift"][0], depth + scene["tile_shift"][1]
    tiles = np.cos(TURN * (c * across + s * away)) * np.cos(TURN * (c * away - s * across))    # half-metre tiles
    floor = scene["floor"] + 0.06 * np.exp(-((depth / 5) ** 2)) * tiles    # fades before the tiles alias
    return scene["wall"] + np.where(depth < FAR, floor, 0) + stretch @ scene["mottle"] @ stretch.T, depth


def place(card, horizon, view):
    """(x of the centre, y of the foot, radius) of a card, in sides."""
    radius = card["height"] / 2 * FOCAL / card["distance"]
    foot = horizon + CAMERA_HEIGHT * FOCAL / card["distance"]       # the row where it touches the floor
    return 0.5 + card["across"] * max(0.2, view - 1.7 * radius), foot, radius       # large cards stay near the middle


def cut_and_paint(card, x, y, centre, foot, radius):
    """(S, S) distance of each pixel to the card's edge in sides, > 0 in the card, and its colours (3, S, S)."""
    outline = OUTLINES[card["label"]]
    drop = radius * np.max(-outline * np.sin(ANGLE + card["tilt"]))        # from the card's centre to its lowest point
    dx, dy = (x - centre) / radius * card["stretch"], (foot - drop - y) / radius
    rho, angle = np.sqrt(dx * dx + dy * dy), np.arctan2(dy, dx) - card["tilt"]
    inside = outline[(angle * (720 / TURN)).astype(np.int32) % 720] - rho

    u, v = rho * np.cos(angle) * card["mirror"], rho * np.sin(angle)
    wave = np.clip(3 * PATTERNS[card["label"]](u, v, angle, rho) * card["sign"], -1, 1)        # nearly two flat paints
    hue = card["label"] * TURN / len(CLASSES) + card["hue"]
    return inside, card["tone"] + card["chroma"] * tint(hue) + card["contrast"] * wave


def render(scene, size):
    """image uint8 (3, S, S), depth float32 (S, S), and int (S, S): which of the cards is seen, -1 where none is."""
    cards, view = scene["cards"], scene["view"]
    x, y, stretch = grid(size, view)
    image, depth = surroundings(scene, x, y, stretch)
    places = [place(card, scene["horizon"], view) for card in cards]
    for centre, foot, radius in places:                             # shadows, on the floor only
        shadow = np.exp(-(((x - centre) / (0.8 * radius)) ** 2) - ((y - foot) / (0.15 * radius)) ** 2)
        image = image * (1 - 0.35 * shadow)
    depth, seen = np.broadcast_to(depth, (size, size)), np.full((size, size), -1)
    for i, (card, (centre, foot, radius)) in enumerate(zip(cards, places, strict=True)):       # the nearest last
        inside, paint = cut_and_paint(card, x, y, centre, foot, radius)
        inside = inside * (radius * size / view)                    # pixels
        image = image + np.clip(inside + 0.5, 0, 1) * (paint - image)          # anti-aliased edge
        depth = np.where(inside > 0, np.float32(card["distance"]), depth)
        seen[inside > 0] = i
    light = 1 + scene["light"][0] * (x - 0.5) / view + scene["light"][1] * (y - 0.5) / view
    return (255 * np.clip(image * light, 0, 1) + 0.5).astype(np.uint8), depth, seen


class Shapes(torch.utils.data.Dataset):
    """Item i: dict(image uint8 (3, S, S), label int 0..9, box float32 (x0, y0, x1, y1) half-open pixels,
    mask uint8 (S, S) 0 = background, 1 + class, depth float32 (S, S) metres in (0, 10]).

    `cards`: the most that a scene holds; with more than two, a scene has three at least. Mask and depth are of what is
    seen, label and box of the card of which most is seen.
    """

    def __init__(self, split="train", size=64, length=2000, cards=1):
        if split not in STREAMS:
            raise ValueError(f"split {split!r} is none of {', '.join(STREAMS)}")
        if cards < 1:
            raise ValueError(f"cards {cards}: a scene holds at least one")
        self.split, self.size, self.length, self.cards = split, size, length, cards

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:                            # IndexError is what ends `for item in dataset`
            raise IndexError(f"scene {index} of {self.length}")
        scene = draw(self.split, int(index), self.cards)
        image, depth, seen = render(scene, self.size)
        classes = np.array([card["label"] for card in scene["cards"]])
        largest = np.bincount(seen[seen >= 0]).argmax()
        rows, columns = (np.flatnonzero((seen == largest).any(axis)) for axis in (1, 0))
        box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        mask = np.where(seen >= 0, 1 + classes[seen], 0).astype(np.uint8)
        return dict(image=torch.from_numpy(image), label=int(classes[largest]),
                    box=torch.tensor(box, dtype=torch.float32), mask=torch.from_numpy(mask),
                    depth=torch.from_numpy(depth))
