"""The cache format: the only package that knows how embeddings lie on disk.

It does not decide what to store, nor in which order to read. The format is specified in
docs/cache-format.md. It never imports torch.
"""

from had_pipe.cache.codec import Codec, Statistics
from had_pipe.cache.layout import Part, Plan
from had_pipe.cache.mirror import open_cache
from had_pipe.cache.reader import Block, Cache

__all__ = ["Block", "Cache", "Codec", "Part", "Plan", "Statistics", "open_cache"]
