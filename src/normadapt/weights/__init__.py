"""How much of an observed shift is believed: the matrix weight of a window, and the scalar weight of one batch."""
