"""Batches and a model to a loss to a checkpoint: one loop, with a thin file per stage."""
