import logging

import pytest
from threestudio.utils.redaction import (
    REDACTED,
    RedactingFormatter,
    redact,
    redact_tree,
    redact_values,
    secret_values,
)


def test_values_come_from_variables_that_say_so():
    environment = {
        "WANDB_API_KEY": "0123456789abcdef",
        "HF_TOKEN": "tok-en-value",
        "AWS_SECRET_ACCESS_KEY": "aws-secret",
        "DB_PASSWORD": "hunter2hunter2",
        "TOKENIZERS_PARALLELISM": "falsefalse",
        "HF_TOKEN_PATH": "somewhere/token",
        "KEYBOARD": "qwertzuiop",
        "SHORT_TOKEN": "dryrun",
    }
    assert sorted(secret_values(environment)) == [
        "0123456789abcdef", "aws-secret", "hunter2hunter2", "tok-en-value",
    ]  # fmt: skip


def test_a_known_value_is_replaced_wherever_it_stands(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "abcdefgh")
    monkeypatch.setenv("B_TOKEN", "xxabcdefghxx")
    assert redact_values("a red xxabcdefghxx-cube, abcdefgh") == (
        f"a red {REDACTED}-cube, {REDACTED}"
    )


@pytest.mark.parametrize(
    "text, clean",
    [
        ("https://user:pa-ss@host/x", f"https://{REDACTED}@host/x"),
        ("https://host/f?name=a&token=abc&x=1", f"https://host/f?name=a&token={REDACTED}&x=1"),
        ("https://s3/f?X-Amz-Signature=abc", f"https://s3/f?X-Amz-Signature={REDACTED}"),
        ("key hf_" + "a" * 24 + ".", f"key {REDACTED}."),
        ("ghp_" + "b" * 36, REDACTED),
        ("sk-" + "c" * 30, REDACTED),
        ("AKIA" + "D" * 16, REDACTED),
        ("api_key=abc", f"api_key={REDACTED}"),
        ("system.hub.token: abc", f"system.hub.token: {REDACTED}"),
        ('{"wandb_api_key": "abc"}', f'{{"wandb_api_key": {REDACTED}}}'),
        ("db_password : abc # why", f"db_password : {REDACTED} # why"),
    ],
)
def test_places_and_forms_of_credentials(text, clean):
    assert redact(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "system.prompt_processor.prompt=a red cube",
        "token_merging: true",
        "pad_token: <|endoftext|>",
        "n_tokens: 77",
        "api_key: null",
        "api_key: ${oc.env:KEY}",
        "mail me@host.org about hf_hub",
        "https://huggingface.co/a/b",
        "AKIABC",
        "max_tokens=12",
        "passwordless: abc",
    ],
)
def test_what_is_no_credential_stays(text):
    assert redact(text) == text


def test_trees_are_cleaned_by_their_keys():
    tree = {
        "loggers": {"wandb": {"enable": True, "api_key": "abc", "project": "p"}},
        "token": None,
        "tokens": ["a"],
        "hub": {"token": ["abc"], "url": "https://u:p@h"},
        "steps": (1, 2.5),
        3: "x",
    }
    assert redact_tree(tree) == {
        "loggers": {"wandb": {"enable": True, "api_key": REDACTED, "project": "p"}},
        "token": None,
        "tokens": ["a"],
        "hub": {"token": [REDACTED], "url": f"https://{REDACTED}@h"},
        "steps": (1, 2.5),
        3: "x",
    }


def test_a_traceback_is_cleaned_too(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "canary-canary")
    try:
        raise ValueError("refused canary-canary")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("a", 30, "f", 1, "with %s", ("canary-canary",), info)
    text = RedactingFormatter("%(message)s").format(record)
    assert "canary" not in text.replace("canary-canary", "!") and "!" not in text
    assert f"with {REDACTED}" in text and f"refused {REDACTED}" in text
