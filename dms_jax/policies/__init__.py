"""Eviction policies: one small frozen dataclass a file."""

from dms_jax.policies.base import REGISTRY as REGISTRY
from dms_jax.policies.base import Policy as Policy
from dms_jax.policies.base import get as get
from dms_jax.policies.base import register as register
from dms_jax.policies.dms import DMS as DMS
from dms_jax.policies.vanilla import Vanilla as Vanilla
