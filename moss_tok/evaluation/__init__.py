"""Reconstruction quality: the metrics of the published evaluation protocol."""
