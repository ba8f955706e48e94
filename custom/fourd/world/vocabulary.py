"""The words of the world and the numbers they stand for.

Lengths are in scene units: the scene's box is [-1, 1]^3. Colours are linear RGB in [0, 1].
"""

SHAPES = ("sphere", "cube", "cylinder", "cone", "torus", "pyramid")
SHAPE_SYNONYMS = {"ball": "sphere", "box": "cube", "ring": "torus", "donut": "torus"}

COLOURS = {
    "red": (0.90, 0.12, 0.10),
    "green": (0.12, 0.68, 0.16),
    "blue": (0.12, 0.24, 0.90),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.56, 0.14, 0.72),
    "orange": (0.96, 0.50, 0.06),
    "cyan": (0.10, 0.80, 0.86),
    "pink": (0.97, 0.50, 0.72),
}

SIZES = {"small": 0.52, "medium": 0.66, "large": 0.80}
"""Scale of a lone object; a caption that names no size means medium."""

PAIR_SCALE = 0.62
"""Factor on the sizes of both objects of a two-object scene, so that they fit side by side."""

PAIR_OFFSET = 0.46
"""Distance of each of two objects from the scene's centre."""

PAIR_MOTION = 0.6
"""Further factor on how far the objects of a pair move and on the logarithm of how much they grow,
so that large ones stay in the box at all times."""

MATERIALS = ("plain", "striped", "wooden", "metal")
"""`plain` is the unnamed default."""

MATERIAL_SYNONYMS = {"wood": "wooden"}

MOTIONS = ("bouncing", "growing", "shrinking", "spinning", "orbiting", "sliding")

RELATIONS = ("next to", "on top of")
"""`and` between two objects means `next to`: the first one on the left, seen from the front."""

RELATION_SYNONYMS = {"and": "next to", "beside": "next to", "on": "on top of", "above": "on top of"}

VIEW_SUFFIXES = ("front view", "side view", "back view", "overhead view")
