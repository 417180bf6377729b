"""The toy world: a synthetic dataset and the small trained backbones that go with it."""
