"""Readers of the original file formats, one data set each."""
