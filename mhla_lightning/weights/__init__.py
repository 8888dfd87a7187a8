"""Files of weights: read, write, split over ranks, stream, start a model from them."""
