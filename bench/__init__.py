"""Benchmarks of yolov9_fast: cases derived from the networks, measured interleaved, recorded, compared, reported."""
