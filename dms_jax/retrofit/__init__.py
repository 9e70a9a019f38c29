"""The retrofit: teaching a pretrained model which tokens of its cache it can forget."""

from dms_jax.retrofit.config import DataConfig as DataConfig
from dms_jax.retrofit.config import RetrofitConfig as RetrofitConfig
from dms_jax.retrofit.config import SelfTextConfig as SelfTextConfig
