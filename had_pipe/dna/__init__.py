"""What DNA is to us: genomes, windows, k-mers. Knows no file format of ours and no model."""
