"""How a model is made to forget: the unlearning objectives and the algorithms made of them."""
