"""Speech from text: an autoregressive model over the codes of frames (CAT-TTS)."""
