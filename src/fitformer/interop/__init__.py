"""Models in other people's terms: the reference's weights, Hugging Face transformers."""
