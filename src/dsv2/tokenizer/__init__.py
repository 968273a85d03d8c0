"""Text to token ids and back: DeepSeek's byte-level BPE, its markers and its chat templates."""
