"""Evaluation of models: loss and bits per byte on a corpus or text, and HellaSwag."""
