"""Ground truth, detections and AP."""
