"""Arrays in, arrays out: the pieces of the estimate and of its evaluation."""
