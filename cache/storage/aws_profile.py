"""Keys of Amazon's own configuration files, which object store libraries in other languages leave unread.

~/.aws/credentials and ~/.aws/config, or the files that AWS_SHARED_CREDENTIALS_FILE and AWS_CONFIG_FILE name, in the
section of AWS_PROFILE (https://docs.aws.amazon.com/cli/latest/userguide/cli-configure-files.html).
"""

from __future__ import annotations

import configparser
import os
from pathlib import Path

# What says where keys come from, so that the files are not asked.
_OTHER_SOURCES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SKIP_SIGNATURE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_FIELDS = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
    "region": "region",
    "endpoint_url": "endpoint",
}


def aws_profile() -> dict[str, str]:
    """What the files say and the environment does not, by the names of obstore's S3 options."""
    if any(os.environ.get(name) for name in _OTHER_SOURCES):
        return {}
    profile = os.environ.get("AWS_PROFILE") or "default"
    words: dict[str, str] = {}
    for variable, file, section in (
        ("AWS_CONFIG_FILE", "config", profile if profile == "default" else f"profile {profile}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", profile),
    ):
        parser = configparser.RawConfigParser()
        try:
            parser.read(Path(os.environ.get(variable) or f"~/.aws/{file}").expanduser())
        except configparser.Error:
            continue  # as if it were not there: the store will say that keys are missing
        if parser.has_section(section):
            words |= dict(parser.items(section))
    if os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        words.pop("region", None)
    if os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL_S3"):
        words.pop("endpoint_url", None)
    return {option: words[field] for field, option in _FIELDS.items() if words.get(field)}
