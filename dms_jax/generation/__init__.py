"""Generation: prompts in, text out, one request (`generate`) or many on one pool of pages (`batching.Generator`)."""
