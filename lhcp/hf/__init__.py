"""The finished model in everyone's format: Hugging Face Llama folders, written and read without `transformers`."""
