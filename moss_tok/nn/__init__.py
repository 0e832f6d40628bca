"""Neural network layers that the codec and the language models share."""
