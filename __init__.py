"""RegionSpot: recognise any region of an image by name.

`regionspot.pipeline` runs frozen backbones over images once, `regionspot.cache` keeps their outputs,
`regionspot.fusion` trains the small head on it, `regionspot.evaluation` puts it all together again.
"""

from importlib.metadata import version

__version__ = version("regionspot")
