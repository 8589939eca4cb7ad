"""How good a model is: loss and bits per byte of a corpus or a text, HellaSwag."""
