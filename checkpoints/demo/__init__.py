"""The demo pair: two small Qwen3-shaped models of Python, and the scripts that made them."""
