"""Readers of sessions in their original file formats, one data set each."""
