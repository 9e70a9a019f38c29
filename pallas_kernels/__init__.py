"""Attention kernels for key-value caches that evict tokens, usable without dms_jax.

Three operations, one folder each: `decode` (one query a row against a cache), `prefill` (a chunk of queries against
cached and new keys) and `window_bias` (differentiable, for training). In each, `api` checks shapes and chooses an
implementation, `ref` is the oracle in plain numpy and float64, `xla` runs everywhere, the other files are one backend's
kernels, and `*_common` holds what they share. `paged` holds pages: their format, their layout and writes into them.

Query head n reads KV head n // G, G = N / K. Queries are [B, T, N, H]; keys and values [B, K, S, H] in prefill and
[B, T, K, H] in training; a cache keeps a slot's key and value side by side in one row of 2H.
"""
