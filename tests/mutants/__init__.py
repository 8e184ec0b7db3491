"""A sampled mutation score: which small changes of the code do the tests notice?"""
