"""had-pipe: distil a DNA language model through a cache of its embeddings."""

__version__ = "0.1.0"
