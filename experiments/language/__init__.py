"""Small language models, trained here: the WikiText row of ASTRA, and what scales in attributing language models."""
