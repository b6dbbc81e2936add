"""From raw images and questions to a Hugging Face LLaVA checkpoint, one sealed step at a time."""

__version__ = "0.1.0"
