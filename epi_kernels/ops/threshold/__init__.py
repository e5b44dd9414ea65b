"""Threshold: the k-th largest score, found from histograms of the scores' bits, and the locks that it decides."""
