"""Every key of the export that has a range is checked before anything is rendered."""

import pytest

from custom.fourd.systems.exports.settings import (
    FORMATS,
    SceneExportConfig,
    check_export_config,
)


def test_the_defaults_write_everything():
    config = SceneExportConfig()
    check_export_config(config)
    assert set(config.formats) == set(FORMATS) and config.formats is not SceneExportConfig().formats
    check_export_config(SceneExportConfig(background=None, height=1, obj_time=1.0))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"formats": ["mp3"]}, "formats has 'mp3'; expected some of scene, mp4.*mp4"),
        ({"formats": []}, "formats is empty; expected some of"),
        ({"path": "spiral"}, "path is 'spiral'; expected one of orbit, fixed, motion_smooth"),
        ({"fps": 0}, "fps is 0; expected at least 1"),
        ({"height": 0}, "height is 0; expected at least 1"),
        ({"obj_time": 1.5}, "obj_time is 1.5; expected a scene time in"),
        ({"background": [1, 2]}, r"background is \[1, 2\]; expected three numbers"),
    ],
)
def test_refusals(config, message):
    with pytest.raises(ValueError, match=message):
        check_export_config(SceneExportConfig(**config))
