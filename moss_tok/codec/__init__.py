"""The codec: modules, pure functions at the edges, published weights."""
