"""Audio on the host (files, manifests) and on the device (spectra)."""
