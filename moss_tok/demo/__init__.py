"""The demo: a page on this machine that reconstructs files and the microphone, `moss-tok demo`."""
