"""Model families, one file each; importing a family here registers it."""

from dms_jax.config import ModelConfig
from dms_jax.families.base import FAMILIES as FAMILIES
from dms_jax.families.base import Family as Family
from dms_jax.families.base import get as get
from dms_jax.families.base import register as register
from dms_jax.families.gemma2 import GEMMA2 as GEMMA2
from dms_jax.families.gemma3 import GEMMA3 as GEMMA3
from dms_jax.families.gpt2 import GPT2 as GPT2
from dms_jax.families.gpt_neox import GPT_NEOX as GPT_NEOX
from dms_jax.families.gpt_oss import GPT_OSS as GPT_OSS
from dms_jax.families.granite import GRANITE as GRANITE
from dms_jax.families.llama import LLAMA as LLAMA
from dms_jax.families.mistral import MISTRAL as MISTRAL
from dms_jax.families.mixtral import MIXTRAL as MIXTRAL
from dms_jax.families.olmo2 import OLMO2 as OLMO2
from dms_jax.families.olmo3 import OLMO3 as OLMO3
from dms_jax.families.phi3 import PHI3 as PHI3
from dms_jax.families.qwen2 import QWEN2 as QWEN2
from dms_jax.families.qwen3 import QWEN3 as QWEN3
from dms_jax.families.qwen3_moe import QWEN3_MOE as QWEN3_MOE
from dms_jax.families.smollm3 import SMOLLM3 as SMOLLM3

# Public sizes, as their config.json files state them.
PRESETS: dict[str, ModelConfig] = {
  name: family.config(**fields) for family in FAMILIES.values() for name, fields in family.presets.items()
}
