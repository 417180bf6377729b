"""Where this machine keeps what is fetched or computed once: weights, vocabularies, image sizes."""

from __future__ import annotations

import os
from pathlib import Path


def home_folder(kind: str) -> Path:
    """The folder `kind` under `$REGIONSPOT_HOME`, by default under ~/.cache/regionspot; it need not exist yet."""
    return Path(os.environ.get("REGIONSPOT_HOME") or "~/.cache/regionspot").expanduser() / kind
