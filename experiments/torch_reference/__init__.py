"""DMS in plain PyTorch, to port findings from: a step and decoding that equal those of dms_jax.

Each file names the paper's section and mirrors a file of dms_jax:

| file | what | of dms_jax |
| --- | --- | --- |
| `gates.py` | both gates, offset, shift, granularity | `gates.py`, `config.py` |
| `attention.py` | log(1 - sigmoid(z)) outside the window to train, hard masks to evaluate | `masks.py` |
| `model.py` | a Llama, Qwen2 or Qwen3 decoder with gates, in float32 | `decoder.py`, `model.py`, `layers.py` |
| `losses.py` | compression loss; forward and reverse KL | `retrofit/losses.py`, `retrofit/batch.py` |
| `schedule.py` | settings; CR, learning rate, phase 1 of a neuron | `retrofit/schedule.py`, `retrofit/config.py` |
| `step.py` | one retrofit step | `retrofit/step.py` |
| `decode.py` | ring of W + 1 slots and append-only archive, a head | `cache/ring.py` |

Use, on a directory that `experiments.export_torch` wrote or any Llama, Qwen2 or Qwen3 in one file of safetensors:

    config = model.ModelConfig.from_hf(json.load(open("hf/config.json")))
    teacher = safetensors.torch.load_file("hf/model.safetensors")
    dms, retrofit = gates.DMSConfig(window=16), schedule.RetrofitConfig(trainable="lora", initial_cr=4.0)
    new = step.init_retrofit(teacher, config, dms, rank=4, generator=torch.Generator().manual_seed(0))
    state = step.init_state(teacher | new, retrofit)
    for tokens in texts:  # [B, T] each
      print(step.train_step(state, teacher, config, dms, retrofit, step.Batch(tokens)))
    student = {name: weight.detach() for name, weight in (state.frozen | state.trained).items()}
    tokens, cache = decode.generate(student, config, dms, texts[0][:, :32], new_tokens=8)
    print(tokens, cache.live())  # tokens held, [L, B, K]

Left to dms_jax: other objectives, gates for a range of ratios, immediate eviction, microbatches, moving averages.
torch is an optional package; `tests/parity/test_torch_reference.py` compares all of it with dms_jax.
"""
