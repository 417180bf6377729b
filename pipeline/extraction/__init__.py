"""One extraction: its configuration, plan, decoding, encoding, writing and retrying."""
