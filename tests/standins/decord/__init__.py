"""Stands in for decord, without which llava_hf of lmms-eval does not load."""
