"""Batches to logits: MLA, DeepSeekMoE, the whole transformer, and exact arithmetic about it."""
