"""Image and boxes to region scores: the head, the baselines, and resumable inference over a dataset."""
