"""4D rendering: registered volume renderers and `Scene`, the way everything else sees a scene."""
