"""From text to token ids: weights and pieces of a prompt, and CLIP's tokenizer."""
