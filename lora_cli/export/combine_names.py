"""The names of the methods to combine adapters; the command line needs them without torch."""

METHODS = {
    "cat": "exactly the weighted sum; the ranks add up",
    "linear": "A and B are added, an approximation (exact where all have the same A)",
    "svd": "the best adapter of a rank near the weighted sum",
    "ties": "the largest entries of A and B, by the majority's sign",
    "dare_linear": "random entries of A and B, added",
    "dare_ties": "random entries of A and B, by the majority's sign",
    "magnitude_prune": "the largest entries of A and B, added",
    "ties_svd": "as ties, on the updates B A",
    "dare_linear_svd": "as dare_linear, on the updates B A",
    "dare_ties_svd": "as dare_ties, on the updates B A",
    "magnitude_prune_svd": "as magnitude_prune, on the updates B A",
}
PRUNING = tuple(name for name in METHODS if name.startswith(("ties", "dare", "magnitude")))
BY_SVD = tuple(name for name in METHODS if name.endswith("svd"))
