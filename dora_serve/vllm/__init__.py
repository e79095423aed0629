"""vLLM: its command line from a plan, its adapters, its plugin and its supervision."""
