"""A causal language model over audio and text: the semantic head, and speech recognition."""
