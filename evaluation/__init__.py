"""Inference end to end from a picture and boxes, LVIS AP, labelled pictures."""
