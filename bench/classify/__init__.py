"""An encoder or a decoder on a classification task."""
