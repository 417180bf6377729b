"""The toy world: a synthetic dataset and the small trained backbones that go with it."""

from pathlib import Path

TOY_WEIGHTS = {name: Path(__file__).parent / f"{name}.safetensors" for name in ("toy_sam", "toy_clip")}
