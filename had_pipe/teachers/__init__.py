"""Frozen models: k-mer ids in, embeddings out. Knows no genome, no cache and no student."""
