"""The codec: its modules, the functions that encode, decode and stream, and published weights."""
