"""Measuring on the device itself: a bundle goes there, a runner in it measures, its figures come back."""
