"""One HTML page that shows a scene offline: a slider for time, one for the view, frames inside.

It works from `file://`, fetches nothing (its content policy forbids it), obeys the keyboard, and
neither plays by itself where the reader asked for less motion, nor needs more than a browser.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template

import numpy as np

from .clips import webp_bytes

TEMPLATE = Path(__file__).with_name("page.html")
IMAGE_TYPE = "image/webp"


def scene_page(
    frames: np.ndarray,
    azimuths_deg: Sequence[float],
    times: Sequence[float],
    seconds: float,
    title: str,
    facts: Sequence[str] = (),
    quality: int = 90,
) -> str:
    """The text of the page.

    Args:
        frames: uint8 [views, times, h, w, 3]; the background of the first one is the stage's.
        azimuths_deg: of the views, in degrees.
        times: scene times in [0, 1]; a single one makes a page of a scene at rest.
        seconds: how long the clip plays.
        title: heading, such as the prompt; any text.
        facts: short phrases below it; any text.
        quality: of the WebP frames, 1 to 100.

    Raises:
        ValueError: the frames do not fit the views and times, or there are none.
    """
    shape = (len(azimuths_deg), len(times))
    if frames.ndim != 5 or frames.shape[:2] != shape or 0 in frames.shape:
        raise ValueError(
            f"frames have shape {frames.shape}; expected {shape[0]} views x {shape[1]} times x "
            "height x width x 3."
        )
    if seconds <= 0:
        raise ValueError(f"the clip lasts {seconds} s; expected more than 0.")
    encoded = [
        [base64.b64encode(webp_bytes(frame, quality)).decode() for frame in row] for row in frames
    ]
    data = {
        "type": IMAGE_TYPE,
        "seconds": float(seconds),
        "azimuths_deg": [round(float(value), 3) for value in azimuths_deg],
        "times": [round(float(value), 4) for value in times],
        "frames": encoded,
    }
    red, green, blue = (int(value) for value in frames[0, 0, 0, 0])
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title or "Scene"),
        facts=html.escape(" \u00b7 ".join(facts)),
        width=frames.shape[3],
        height=frames.shape[2],
        backdrop=f"rgb({red}, {green}, {blue})",
        poster=f"data:{IMAGE_TYPE};base64,{encoded[0][0]}",
        # Numbers and base64 only: nothing in it can end the script element.
        data=json.dumps(data, separators=(",", ":")),
    )
