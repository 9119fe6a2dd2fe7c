"""Evaluation of models on text that training has not seen."""
