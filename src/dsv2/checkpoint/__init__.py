"""Model to disk and back: step folders in the Hugging Face layout, complete or not there at all."""
