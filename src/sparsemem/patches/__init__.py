"""Patches: what one finetuning run changed, as a file that can be applied and reverted."""
