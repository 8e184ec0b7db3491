"""A trained model at work: scores, decisions with a stated error rate, heatmaps, the page."""
