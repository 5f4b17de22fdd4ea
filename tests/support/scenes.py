"""A scene with one object."""
from tinyldm.shapes.scenes import Scene, Thing


def one(shape, half, x=0.5, y=0.5):
    return Scene((Thing("big", "black", shape, x, y, half),), None, "white")
