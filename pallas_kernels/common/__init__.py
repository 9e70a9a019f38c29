"""Shared by all kernels: dispatch, JAX versions, measured block sizes, Hopper primitives."""
