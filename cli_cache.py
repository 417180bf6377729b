"""`regionspot cache ...`: what can be done with a cache that is there already; no logic of its own.

`--cache` of the other commands and PATH here are a folder, the URL of one in an object store, or an .h5 file.
"""

from __future__ import annotations

from typing import Annotated

import typer

cache_app = typer.Typer(help="Look at a cache, check it, grow it, copy it.", no_args_is_help=True)

CachePath = Annotated[str, typer.Argument(metavar="PATH", help="the cache: a folder, a URL such as s3://..., or .h5")]
