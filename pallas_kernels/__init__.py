"""Attention over a cache whose heads forget: decode, prefill and retrofit, usable without dms_jax.

Each operation is a folder: `ref` (plain numpy in float64, straight from the formula), `xla` (works everywhere) and
`api` (checks shapes, chooses an implementation). Layouts: q [B, T, N, H]; keys and values [B, T, K, H] or, cached, one
row of 2H per slot (K first, then V); N = G * K query heads, query head n reads KV head n // G.
"""
