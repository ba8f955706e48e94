"""The procedural world: a closed grammar of captions and an exact renderer of what they say.

`grammar` turns words into scenes and back, `motion` moves their objects, `shapes` intersects rays
with them, and `render` makes images, depth, normals and flow. Nothing here is learned or random.
"""
