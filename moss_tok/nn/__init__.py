"""Layers that the codec and the language models share."""
