"""Questions to Hugging Face models and the score of their answers."""
