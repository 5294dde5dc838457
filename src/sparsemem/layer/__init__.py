"""The memory itself, in plain PyTorch: product keys, value rows, relevance gate."""
