"""Checkpoint to tokens: requests in, text out, many at a time."""
