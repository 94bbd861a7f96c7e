"""Passwords and tokens of URLs in any text: what is masked, what counts as one, what is left alone."""

import json
import logging
import sys

import pytest

from clusters.safe.masking import MaskedFormatter, holds_secret, log_apart, masked, masked_values

SECRET = [
    ("http://ann:pa55@host:5000/x", "http://***@host:5000/x"),
    ("MLflow at http://ann:pa55@host: down", "MLflow at http://***@host: down"),
    ("postgresql+psycopg2://ann:p%40:pa55@db/mlflow", "postgresql+psycopg2://***@db/mlflow"),
    ("mysql://ann:pa55@x@db/mlflow", "mysql://***@db/mlflow"),  # an @ that is not encoded
    ("postgresql://ann:pa55/w?#1@db:5432/x", "postgresql://***@db:5432/x"),  # nor a slash
    ("http://ann:it's<pa55>@host", "http://***@host"),
    ("http://:pa55@host", "http://***@host"),
    ("redis://ann:12345@[::1]:6379/0", "redis://***@[::1]:6379/0"),
    ("https://ghp_0123456789abcdefpa55@github.com/a/b", "https://***@github.com/a/b"),
    ("HTTPS://Ann:pa55@HOST", "HTTPS://***@HOST"),
    ("http://host/x?token=pa55&y=1", "http://host/x?token=***&y=1"),
    ("http://host/x?y=1&access_token=pa55", "http://host/x?y=1&access_token=***"),
    ("postgresql://db/x?user=ann&password=pa55#f", "postgresql://db/x?user=ann&password=***#f"),
    ("s3://b/k?X-Amz-Signature=pa55&X-Amz-Date=1", "s3://b/k?X-Amz-Signature=***&X-Amz-Date=1"),
    ("https://acc.blob.core/x?sv=1&sig=pa55%3D", "https://acc.blob.core/x?sv=1&sig=***"),
    ("a http://a:pa55@b and ftp://c:pa55@d", "a http://***@b and ftp://***@d"),
    ("http://${USER}:pa55@host", "http://***@host"),
]
HARMLESS = [
    "http://host:5000/x@y",
    "http://127.0.0.1:8265",
    "sqlite:////home/me/my folder/mlflow.db",
    "hf://datasets/me/rows@main",
    "write me@example.org",
    "at 12:30, ann: x@y",
    "lora_r=4, tokens=512",
    "http://ann:${MLFLOW_PASSWORD}@host",
    "http://${NAME}:${MLFLOW_PASSWORD}@host",
    "http://host?token=${TOKEN}",
    "kuberay:arn:aws:eks:eu:1:cluster/x/team",
]


@pytest.mark.parametrize(("text", "wanted"), SECRET)
def test_a_password_or_token_in_a_url_is_masked(text, wanted):
    assert masked(text) == wanted
    assert holds_secret(text) and not holds_secret(wanted)
    assert masked(wanted) == wanted


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays(text):
    assert masked(text) == text
    assert not holds_secret(text)


def test_a_user_without_a_password_is_masked_and_is_no_secret():
    assert masked("ssh://git@host/x") == "ssh://***@host/x"
    assert not holds_secret("ssh://git@host/x")


def test_values_are_masked_at_any_depth_and_others_stay():
    values = {"a": ["http://a:pa55@b", 1, None], "http://a:pa55@b": {"c": ("x://a:pa55@b", 1.5, True)}}

    shown = masked_values(values)

    assert shown == {"a": ["http://***@b", 1, None], "http://***@b": {"c": ["x://***@b", 1.5, True]}}
    assert "pa55" not in json.dumps(shown)


def test_a_log_is_masked_with_what_was_raised():
    try:
        raise OSError("no answer from http://ann:pa55@host")
    except OSError:
        record = logging.LogRecord("a", logging.ERROR, "a.py", 1, "at %s", ("http://b:pa55@host",), sys.exc_info())

    line = MaskedFormatter("%(levelname)s %(message)s").format(record)

    assert line.startswith("ERROR at http://***@host") and "Traceback" in line and "b:pa55" not in line


@pytest.mark.parametrize("text", ["a://" * 50_000, "a://b:c/" * 30_000, "a://" + "b" * 200_000, "?key" * 50_000])
def test_long_texts_take_no_long_time(text):
    import time

    began = time.process_time()
    masked(text)

    assert time.process_time() - began < 10


def test_a_logger_writes_into_its_file_and_nowhere_else_for_a_while(tmp_path, caplog):
    logger = logging.getLogger("somebody.else")
    with log_apart("somebody", tmp_path / "logs/file.log"):
        logger.info("to http://me:secret@host")
    with caplog.at_level(logging.INFO):
        logger.info("afterwards")

    written = (tmp_path / "logs/file.log").read_text()
    assert "INFO somebody.else: to http://***@host" in written and "afterwards" not in written
    assert [record.message for record in caplog.records] == ["afterwards"]
