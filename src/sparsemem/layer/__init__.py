"""The memory itself, in torch alone: product keys, value rows, the gate."""
