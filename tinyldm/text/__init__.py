"""From text to token ids: the weights and chunks of a prompt, and CLIP's tokenizer."""
