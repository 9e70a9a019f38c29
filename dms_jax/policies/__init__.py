"""Eviction policies: one small frozen dataclass a file."""

from dms_jax.policies.base import REGISTRY as REGISTRY
from dms_jax.policies.base import Candidates as Candidates
from dms_jax.policies.base import Leaving as Leaving
from dms_jax.policies.base import Observation as Observation
from dms_jax.policies.base import Policy as Policy
from dms_jax.policies.base import Retired as Retired
from dms_jax.policies.base import check_rows as check_rows
from dms_jax.policies.base import get as get
from dms_jax.policies.base import register as register
from dms_jax.policies.dmc import DMC as DMC
from dms_jax.policies.dms import DMS as DMS
from dms_jax.policies.expected import ExpectedAttention as ExpectedAttention
from dms_jax.policies.h2o import H2O as H2O
from dms_jax.policies.keydiff import KeyDiff as KeyDiff
from dms_jax.policies.kvzap import KVzap as KVzap
from dms_jax.policies.quest import Quest as Quest
from dms_jax.policies.random import Random as Random
from dms_jax.policies.rkv import RKV as RKV
from dms_jax.policies.snapkv import SnapKV as SnapKV
from dms_jax.policies.streaming import StreamingLLM as StreamingLLM
from dms_jax.policies.tova import TOVA as TOVA
from dms_jax.policies.triattention import TriAttention as TriAttention
from dms_jax.policies.trimkv import TRIMKV as TRIMKV
from dms_jax.policies.vanilla import Vanilla as Vanilla
from dms_jax.policies.vase import VaSE as VaSE
