"""Recommender models and data sets on which embedding compression is trained and measured."""
