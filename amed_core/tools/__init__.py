"""What shows: nothing in it is needed to sample or to fit."""
