"""Training traces by the model itself: problems, what judges an answer, `vkvtrain data generate`."""
