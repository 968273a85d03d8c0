"""Text to batches: documents, token shards, packed rows, and a loader whose whole state is one integer."""
