"""Artifacts: the files that a build leaves."""
