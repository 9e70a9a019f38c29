"""Retrofit: causal attention with a learned bias on keys that have left the window; differentiable."""

from pallas_kernels.retrofit.api import retrofit_attention as retrofit_attention
from pallas_kernels.retrofit.saved import SAVED as SAVED
