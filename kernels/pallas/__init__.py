"""Pallas kernel (Mosaic GPU backend) that streams the state pool through shared memory; for sm90 up."""
