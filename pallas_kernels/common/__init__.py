"""What all kernels share: dispatch, compatibility with JAX versions, measured block sizes, Hopper primitives."""
