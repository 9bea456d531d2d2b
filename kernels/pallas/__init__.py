"""Pallas kernels (Mosaic GPU backend) that stream the state pool through shared memory; for sm90 up."""
