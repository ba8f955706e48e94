"""A key with one letter wrong: the right one is suggested, nearly always."""

import random
import string

import pytest
from threestudio.launcher.validate import known_keys
from threestudio.suggest import did_you_mean
from threestudio.utils.config_sources import load_with_includes

from tests.configs.test_configs import CONFIGS
from tests.fixtures.launched import ROOT

REQUIRED_SHARE = 0.95


def one_edit(word: str, rng: random.Random) -> str:
    """A letter left out, put in, or replaced."""
    place, letter = rng.randrange(len(word)), rng.choice(string.ascii_lowercase + "_")
    before, after = word[:place], word[place + 1 :]
    return rng.choice([before + after, before + letter + word[place:], before + letter + after])


def share_found(config: str, at_most: int | None = None) -> float:
    """Over a config's keys, each with one edit in its last part: how often it is suggested."""
    rng = random.Random(0)
    known = sorted(known_keys(load_with_includes(ROOT / config, ROOT)))
    found = []
    for key in rng.sample(known, at_most or len(known)):
        parent, dot, name = key.rpartition(".")
        wrong = parent + dot + one_edit(name, rng)
        if wrong not in known:
            found.append(did_you_mean(wrong, known) == f" Did you mean {key!r}?")
    assert len(found) > 50
    return sum(found) / len(found)


def test_the_right_key_is_suggested():
    assert share_found("custom/configs/fourdfy_stage_3.yaml", at_most=100) >= REQUIRED_SHARE


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_the_right_key_is_suggested_for_every_key_of_every_config(config):
    assert share_found(config) >= REQUIRED_SHARE
