"""The offline page: parsed as HTML, its frames decoded, and nothing in it that leads outside."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from custom.fourd.systems.exports.page import scene_page

FRAMES = np.zeros((3, 2, 16, 24, 3), np.uint8)
for _view in range(3):
    for _time in range(2):
        FRAMES[_view, _time] = (80 * _view, 120 * _time, 60)
AZIMUTHS = [0.0, 120.0, 240.0]
PROMPT = 'a "red" cube </script><img src=x onerror=alert(1)> & $friends'


class Reader(HTMLParser):
    """Collects elements with their attributes, and the text of each script."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.text, self._open = [], {}, {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "img"):
            self._open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        tag, attrs = self._open[-1] if self._open else (None, {})
        if tag == "script":
            self.scripts[attrs.get("id", "program")] = data
        elif data.strip():
            self.text.setdefault(tag, "")
            self.text[tag] += data

    def of(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def text():
    return scene_page(FRAMES, AZIMUTHS, [0.0, 1.0], 2.5, PROMPT, ["moving", "7 steps"])


@pytest.fixture(scope="module")
def page(text):
    return Reader(text)


def test_every_frame_is_inside_and_is_its_view_and_time(page):
    data = json.loads(page.scripts["scene"])
    assert data["azimuths_deg"] == AZIMUTHS and data["times"] == [0.0, 1.0]
    assert data["seconds"] == 2.5 and data["type"] == "image/webp"
    for view, row in enumerate(data["frames"]):
        for time, frame in enumerate(row):
            with Image.open(io.BytesIO(base64.b64decode(frame))) as image:
                read = np.asarray(image.convert("RGB")).astype(int)
            assert read.shape == (16, 24, 3)
            assert np.abs(read - FRAMES[view, time]).max() < 16


def test_nothing_leads_outside(text, page):
    policy = [m["content"] for m in page.of("meta") if "http-equiv" in m]
    assert policy and policy[0].startswith("default-src 'none'; img-src data:;")
    for _, attrs in page.elements:
        for name in ("src", "href", "srcset", "data", "action"):
            assert attrs.get(name, "data:").startswith("data:")
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp", text)
    assert not page.of("link")


def test_any_prompt_is_text_only(page):
    assert page.text["h1"] == PROMPT == page.text["title"]
    assert len(page.of("script")) == 2 and len(page.of("img")) == 1
    assert page.text["p"].startswith("moving \u00b7 7 steps")


def test_controls_have_names_and_work_without_a_mouse(page):
    labels = {label["for"] for label in page.of("label")}
    sliders = {slider["id"] for slider in page.of("input") if slider["type"] == "range"}
    assert labels == sliders == {"time", "view"}
    (button,), (stage,) = page.of("button"), page.of("canvas")
    assert button["aria-label"] == "Play" and button["aria-pressed"] == "false"
    assert stage["tabindex"] == "0" and stage["aria-label"] == PROMPT
    assert page.of("html")[0]["lang"] == "en"
    for needed in ("keydown", "ArrowLeft", "prefers-reduced-motion", "pointerdown"):
        assert needed in page.scripts["program"]


DOM = """
const made = {};
const element = (id) => made[id] ??= {
  id, value: "0", attributes: {}, listeners: {}, textContent: "", hidden: false,
  clientWidth: 100, clientHeight: 100, classList: { add() {}, remove() {} },
  setAttribute(name, value) { this.attributes[name] = value; },
  addEventListener(name, call) { this.listeners[name] = call; },
  setPointerCapture() {}, getContext() { return { drawImage(image) { made.drawn = image.src; } }; },
};
globalThis.document = { getElementById: element, listeners: {},
  addEventListener(name, call) { this.listeners[name] = call; } };
globalThis.window = { matchMedia: () => ({ matches: true }), devicePixelRatio: 2 };
globalThis.ResizeObserver = class { observe() {} };
globalThis.Image = class { complete = true; naturalWidth = 1; };
element("scene").textContent = process.argv[2];
"""
ACTS = """
const key = (name, target) => document.listeners.keydown(
  { key: name, target: target ?? document, preventDefault() {} });
const state = () => [
  element("view").value, element("time").value, element("view-text").textContent,
  element("time-text").textContent, element("play").attributes["aria-pressed"] ?? "false",
].join(" ");
const log = [state()];
key("ArrowLeft"); log.push(state());
key("."); log.push(state());
key("ArrowRight", element("view")); log.push(state());
key(" "); log.push(state());
key(" "); log.push(state());
const at = (x) => ({ clientX: x, pointerId: 1 });
element("stage").listeners.pointerdown(at(50)); element("stage").listeners.pointermove(at(15));
log.push(state());
element("stage").listeners.pointerup(at(15)); element("stage").listeners.pointermove(at(90));
log.push(state());
log.push(made.drawn.slice(0, 23));
console.log(JSON.stringify(log));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the page's program")
def test_the_program_turns_steps_and_plays(page, tmp_path):
    program = tmp_path / "page.js"
    program.write_text(DOM + page.scripts["program"] + ACTS)
    done = subprocess.run(
        ["node", str(program), page.scripts["scene"]],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        "0 0 0\u00b0 0.00 false",  # less motion is asked for, so nothing plays
        "2 0 240\u00b0 0.00 false",  # the turn goes around
        "2 1 240\u00b0 1.00 false",
        "2 1 240\u00b0 1.00 false",  # a slider's own keys are left to it
        "2 1 240\u00b0 1.00 true",
        "2 1 240\u00b0 1.00 false",
        "0 1 0\u00b0 1.00 false",  # a third of the width is a third of a turn
        "0 1 0\u00b0 1.00 false",  # let go
        "data:image/webp;base64,",
    ]


def test_a_scene_at_rest_has_one_time():
    page = Reader(scene_page(FRAMES[:, :1], AZIMUTHS, [0.0], 1.0, "", []))
    assert json.loads(page.scripts["scene"])["times"] == [0.0]
    assert page.text["h1"] == "Scene"


def test_the_first_pixel_is_the_stage_s_colour(text):
    assert "background: rgb(0, 0, 60)" in text and "aspect-ratio: 24 / 16" in text


def test_refusals():
    with pytest.raises(ValueError, match=r"shape \(3, 2, 16, 24, 3\); expected 2 views x 2 times"):
        scene_page(FRAMES, [0.0, 1.0], [0.0, 1.0], 1.0, "x")
    with pytest.raises(ValueError, match="lasts 0 s"):
        scene_page(FRAMES, AZIMUTHS, [0.0, 1.0], 0, "x")
