"""Dynamic Memory Sparsification (arXiv 2506.05345) in JAX: learned eviction from the KV cache.

    import jax, dms_jax

    model, tokenizer = dms_jax.load("checkpoints/smollm2", retrofit="retrofits/smollm2-cr4")
    out = dms_jax.generate(model, ["The capital of France is"], policy=dms_jax.DMS(window=64), max_new_tokens=256)
    out.text, out.tokens, out.logprobs, out.finish_reason    # lists, one entry a row
    out.metrics.achieved_cr, out.metrics.kv_reads            # see `dms_jax.metrics`
    more = dms_jax.generate(model, ["And of Spain?"], continue_from=out)                      # the next turn
    dms_jax.save_conversation("chat", more)                         # on disk; another day:
    past = dms_jax.load_conversation("chat", model)                 # for `continue_from=past`
    dense = dms_jax.generate(model, ["The capital of France is"], policy=dms_jax.Vanilla())   # nothing evicted

Prompts are strings, lists of ids or a padded id matrix with its `mask`. Sampling takes `key`, `temperature`, `top_k`
and `top_p`. `stream(row, tokens, text)` is called during generation. See `generate` for all arguments.

    model, tokenizer = dms_jax.load("checkpoints/qwen3-8b", mesh=dms_jax.make_mesh(data=2, tensor=4))  # `dms_jax.spmd`
"""

from __future__ import annotations

from dms_jax.compilation import keep_compiled as keep_compiled
from dms_jax.config import DMSConfig as DMSConfig
from dms_jax.config import LoRAConfig as LoRAConfig
from dms_jax.config import ModelConfig as ModelConfig
from dms_jax.decoder import Model as Model
from dms_jax.families import PRESETS as PRESETS
from dms_jax.generation.batching import Generator as Generator
from dms_jax.generation.conversation import Conversation as Conversation
from dms_jax.generation.files import load_conversation as load_conversation
from dms_jax.generation.files import save_conversation as save_conversation
from dms_jax.generation.generate import Output as Output
from dms_jax.generation.generate import generate as generate
from dms_jax.generation.pages import BudgetError as BudgetError
from dms_jax.load import load as load
from dms_jax.metrics import Metrics as Metrics
from dms_jax.model import cached_forward as cached_forward
from dms_jax.model import forward as forward
from dms_jax.policies import DMC as DMC
from dms_jax.policies import DMS as DMS
from dms_jax.policies import H2O as H2O
from dms_jax.policies import RKV as RKV
from dms_jax.policies import TOVA as TOVA
from dms_jax.policies import TRIMKV as TRIMKV
from dms_jax.policies import ExpectedAttention as ExpectedAttention
from dms_jax.policies import KeyDiff as KeyDiff
from dms_jax.policies import KVzap as KVzap
from dms_jax.policies import Policy as Policy
from dms_jax.policies import Quest as Quest
from dms_jax.policies import SnapKV as SnapKV
from dms_jax.policies import StreamingLLM as StreamingLLM
from dms_jax.policies import TriAttention as TriAttention
from dms_jax.policies import Vanilla as Vanilla
from dms_jax.policies import VaSE as VaSE
from dms_jax.sharding import make_mesh as make_mesh
