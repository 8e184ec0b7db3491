"""Before training: how much of the label the files and the captions give away."""
