"""Kernels that jaxinfer runs on: each file is one op, its definition in jnp, and its backends.

Imports jax alone, so that any project can use it.
"""
