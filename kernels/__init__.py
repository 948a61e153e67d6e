"""Triton kernels, installed as `yolov9_fast.kernels`; each module imports triton itself, this one imports nothing."""
