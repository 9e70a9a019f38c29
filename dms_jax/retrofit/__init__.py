"""The retrofit: training a pretrained model to evict tokens from its KV cache."""

from dms_jax.retrofit.config import DataConfig as DataConfig
from dms_jax.retrofit.config import KVzapConfig as KVzapConfig
from dms_jax.retrofit.config import LossConfig as LossConfig
from dms_jax.retrofit.config import MemoryConfig as MemoryConfig
from dms_jax.retrofit.config import OptimizerConfig as OptimizerConfig
from dms_jax.retrofit.config import RecallTextConfig as RecallTextConfig
from dms_jax.retrofit.config import RetrofitConfig as RetrofitConfig
from dms_jax.retrofit.config import SavingConfig as SavingConfig
from dms_jax.retrofit.config import ScheduleConfig as ScheduleConfig
from dms_jax.retrofit.config import SelfTextConfig as SelfTextConfig
from dms_jax.retrofit.config import TRIMKVConfig as TRIMKVConfig
