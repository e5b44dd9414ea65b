"""Threshold: the k-th largest score from histograms of its bits, and the lock it decides."""
