"""A draft head: late slots of a frozen LLaMA, which guess the tokens after the next one."""
